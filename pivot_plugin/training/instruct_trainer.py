"""`InstructTrainer`: TRL's SFTTrainer on conversations about images, with the answers of every turn in the loss.

TRL's collator for images trains the last turn of a conversation, or every turn where the chat template marks them,
which few do. Here each turn's answer is found by writing the conversation out up to it.

Overrides, and why each is needed:
    __init__            rows become checked conversations, and the collator loads their images
    _prepare_dataset    conversations are tokenised with their images, in the collator
    compute_loss        a non-finite loss names its conversations
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, ProcessorMixin
from trl import SFTTrainer

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import InstructConfig
from pivot_plugin.data.conversations import ConversationDataset

from .conversation_batch import ConversationCollator
from .plan import TrainingPlan
from .tower import TowerTraining

logger = logging.getLogger(__name__)


class InstructTrainer(TowerTraining, SFTTrainer):
    """Supervised fine-tuning of an MLLM, part by part.

    Args:
        model: the MLLM, loaded.
        args: settings.
        train_dataset: conversations.
        eval_dataset: held-out ones.
        processing_class: the model's processor.
        lora: a LoRA rank, a peft config, or None to train weights themselves.
        adapter: of the model's family; asked from the plugins where not given.
        plan: what trains, where that is decided already; `lora` is not looked at then.

    Raises:
        ModelError: for a model no adapter knows, or a processor that does not belong to it.
        SettingsError: for settings that exclude each other.
    """

    _through_forest = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: InstructConfig,
        train_dataset: ConversationDataset,
        eval_dataset: ConversationDataset | None = None,
        processing_class: ProcessorMixin | None = None,
        lora: int | LoraConfig | None = None,
        adapter: VisionAdapter | None = None,
        plan: TrainingPlan | None = None,
    ) -> None:
        peft_config = self._prepare_model(model, args, processing_class, lora, adapter, plan)
        assert processing_class is not None
        given = [train_dataset] if eval_dataset is None else [train_dataset, eval_dataset]
        collator = ConversationCollator(
            *(processing_class, self.adapter.image_token_id, args.plain, args.max_length, args.pad_to_multiple_of)
        )
        rows = [
            Dataset.from_dict({"source": [source] * len(data), "position": list(range(len(data)))})
            for source, data in enumerate(given)
        ]
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows[0],
            eval_dataset=rows[1] if len(rows) > 1 else None,
            processing_class=processing_class,
            data_collator=_Loading(collator, given),
            peft_config=peft_config,
        )
        self._watch_training()

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        names = inputs.pop("row_ids")
        images = bool((inputs["input_ids"] == self.adapter.image_token_id).any())
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self._checked(result[0] if return_outputs else result, model, names, images)
        return (loss, result[1]) if return_outputs else loss


@dataclass
class _Loading:
    """Collates rows that say where a conversation is: looks it up and loads its images, in the worker."""

    collator: ConversationCollator
    sources: list[ConversationDataset]

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.collator([self.sources[item["source"]][item["position"]] for item in items])
