"""`InstructTrainer`: TRL's SFTTrainer on conversations about images, with the answers of every turn in the loss.

TRL's collator for images trains the last turn of a conversation, or every turn where the chat template marks its
answers, which few templates do. Here each turn's answer is found by writing the conversation out up to it
(conversation_batch.py). The model computes each conversation as TRL does: conversations have no prefix to share.

Overrides, and why each is needed:
    __init__            rows become checked conversations, and the collator loads their images
    _prepare_dataset    conversations are tokenised with their images, in the collator
    compute_loss        a non-finite loss names its conversations
"""

import functools
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin
from trl import SFTTrainer

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import InstructConfig
from pivot_plugin.data.conversations import ConversationDataset
from pivot_plugin.data.launch import this_launch
from pivot_plugin.models.evaluating import evaluating

from .conversation_batch import IGNORED, ConversationCollator
from .forward import experts_named, on_inputs
from .held_out import shares_of
from .looks import Look
from .plan import TrainingPlan, unwrapped
from .rows import Loading, pointing
from .sharding import as_it_is, through_tower, whole_head
from .tower import TowerTraining
from .workers import default_workers

LOSS = "loss (nats per token of an answer, lower is better)"


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
        plan: what trains, where it is known already; made from `args.train`, `args.frozen` and `lora` where not given.

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
        sources = [train_dataset] if eval_dataset is None else [train_dataset, eval_dataset]
        collator = ConversationCollator(
            processor=processing_class,
            image_token_id=self.adapter.image_token_id,
            plain=args.plain,
            max_length=args.max_length,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        if args.default_workers:
            args.dataloader_num_workers = default_workers()
        rows = pointing(sources)
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows[0],
            eval_dataset=rows[1] if len(rows) > 1 else None,
            processing_class=processing_class,
            data_collator=Loading(sources, collator),
            peft_config=peft_config,
        )
        self._count_tokens_of_a_step()
        self._take_part()
        self._watch_training()

    def look_now(self) -> Look:
        """The loss of every held-out conversation under the model as it is now; to be called by every process.

        Returns:
            per row the negative log-probability of its answers' tokens in nats, and how many tokens these are, as
            (n, 1, 2): the ratio of their sums is the held-out loss.
        """
        model, launch = self.accelerator.unwrap_model(self.model), this_launch()
        batches, share = shares_of(len(self.eval_dataset), self.args.per_device_eval_batch_size, launch)
        loader = DataLoader(
            self.eval_dataset,
            batch_sampler=share,
            collate_fn=self.data_collator,
            num_workers=min(self.args.dataloader_num_workers, len(share)),
            # of its own, so that what training draws does not depend on whether rows are held out
            generator=torch.Generator(),
        )
        scored: dict[int, np.ndarray] = {}
        with torch.no_grad(), evaluating(model, self.accelerator.device), as_it_is(model):
            for positions, batch in zip(share, loader, strict=True):
                inputs = self._prepare_inputs(batch)
                labels = inputs.pop("labels")
                inputs.pop("row_ids")
                with self.accelerator.autocast():
                    logits = model(**inputs, use_cache=False).logits
                scored[positions[0]] = np.array([_loss_of(*row) for row in zip(logits, labels, strict=True)])
        everyones = {first: losses for one in launch.gather(scored) for first, losses in one.items()}
        rows = np.concatenate([everyones[positions[0]] for positions in batches])[:, None]
        loss = float(rows[..., 0].sum() / max(rows[..., 1].sum(), 1.0))
        return Look(LOSS, {"loss": loss}, rows)

    def _count_tokens_of_a_step(self) -> None:
        """Have every loss divided by the answers' tokens of the whole optimiser step.

        transformers counts them, over accumulated batches and processes, for models that take the count as an argument
        of their forward, which Qwen2.5-VL, Qwen3-VL, GLM-4V, Gemma 3 and others say they do not; of those TRL averages
        each batch by itself, so that the tokens of a batch of short answers weigh more. TRL hands the count to no
        model, but divides by it itself.
        """
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        # there the model's own loss is TRL's, and transformers switches the count off
        if parallelism is None or not (parallelism.sp_enabled and parallelism.sp_backend == "deepspeed"):
            self.model_accepts_loss_kwargs = True

    def _take_part(self) -> None:
        """Have the model do what other processes wait for, in every forward pass."""
        blank = self._blank()
        if blank is None:
            return
        model = unwrapped(self.accelerator.unwrap_model(self.model))
        fused_forward = model.forward

        # `generate` reads the signature to know what the model takes
        @functools.wraps(fused_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            unseen = {} if blank.keys() & kwargs.keys() else on_inputs(blank, model)
            with whole_head(model), through_tower(model, unseen):
                return fused_forward(*args, **kwargs)

        model.forward = forward

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        names = inputs.pop("row_ids")
        images = bool((inputs["input_ids"] == self.adapter.image_token_id).any())
        with experts_named(unwrapped(self.accelerator.unwrap_model(model))):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self._checked(result[0] if return_outputs else result, model, names, images)
        return (loss, result[1]) if return_outputs else loss


def _loss_of(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Summed loss of a row's answers, in nats, and their tokens.

    Args:
        logits: (L, V).
        labels: (L,), IGNORED where no answer stands.
    """
    following = labels[1:]
    answers = following != IGNORED
    summed = cross_entropy(logits[:-1][answers].float(), following[answers], reduction="sum")
    return summed.item(), int(answers.sum())
