"""Who says, before training, which rows a run cannot take: the collator that will meet them."""

from transformers import ProcessorMixin

from pivot_plugin.config import InstructConfig, RolloutConfig, TowerConfig
from pivot_plugin.data.judging import Collator, Questions, RowJudge
from pivot_plugin.models.image_tokens import ImageTokens

from .batch import ForestCollator
from .conversation_batch import ConversationCollator


def judge_of(config: TowerConfig, processor: ProcessorMixin, image_token_id: int, every_size: bool) -> RowJudge:
    """Who says which rows a run cannot take.

    Args:
        config: of the run.
        processor: the model's.
        image_token_id: the token that stands for one image feature.
        every_size: as for `RowJudge`.
    """
    collator: Collator
    if isinstance(config, RolloutConfig):
        elsewhere = config.use_vllm or config.use_transformers_continuous_batching
        collator = Questions(ImageTokens(processor, image_token_id), given_text=elsewhere)
    elif isinstance(config, InstructConfig):
        collator = ConversationCollator(processor, image_token_id, config.plain, config.max_length)
    else:
        collator = ForestCollator(processor, image_token_id, max_length=config.max_length)  # type: ignore[attr-defined]
    terms, made = (getattr(config, name, None) for name in ("image_terms", "rejected_images"))
    return RowJudge(
        collator, every_size, ("images",) if terms and made else ("images", "rejected_images") if terms else ()
    )
