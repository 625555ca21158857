"""A family's own processor: its class, its image processor with small settings, and a tokenizer made in memory."""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from .families import SPECIAL_TOKENS, byte_tokenizer
from .zoo_record import ZooFamily


def zoo_tokenizer(family: ZooFamily) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a family's special tokens, those it names and those it only has."""
    tokenizer = byte_tokenizer(**family.tokens)
    tokenizer.add_tokens([token for token in family.unnamed_tokens if token], special_tokens=True)
    for role, token in family.text_tokens.items():
        setattr(tokenizer, role, token)
    tokenizer.init_kwargs.update(family.tokenizer_settings)
    return tokenizer


def zoo_token_ids(family: ZooFamily, tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Id of every special token, by its text and, for those that have one, by its role in the family."""
    texts = {*SPECIAL_TOKENS, *family.tokens.values(), *family.unnamed_tokens}
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in texts}
    return ids | {role: ids[text] for role, text in {**family.tokens, **family.model_tokens}.items()}


def zoo_chat_template(marker: str) -> str:
    """A ChatML template with a family's image marker, for string and for structured content."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ " + repr(marker) + " }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def zoo_processor(family: ZooFamily) -> ProcessorMixin:
    """A family's processor, of its own class."""
    processor_class = getattr(transformers, family.processor or PROCESSOR_MAPPING_NAMES[family.model_type])
    parts = {name: _part(name, family) for name in processor_class.get_attributes()}
    processor = processor_class(**parts, **family.processor_settings)
    # some classes do not take the template, though all can have one
    processor.chat_template = zoo_chat_template(family.marker)
    return processor


def _part(name: str, family: ZooFamily) -> Any:
    if name == "tokenizer":
        return zoo_tokenizer(family)
    if name.endswith("tokenizer"):
        return byte_tokenizer()
    if name == "image_processor":
        return _made(family.image_processor or IMAGE_PROCESSOR_MAPPING_NAMES[family.model_type], family.image_settings)
    if name == "video_processor":
        return _made(family.video_processor or VIDEO_PROCESSOR_MAPPING_NAMES[family.model_type], family.video_settings)
    if name == "feature_extractor":
        return _made(family.feature_extractor or FEATURE_EXTRACTOR_MAPPING_NAMES[family.model_type], {})
    raise NotImplementedError(f"{family.name}: no recipe for the processor's {name}")


def _made(class_names: str | Mapping[str, str], settings: Mapping[str, Any]) -> Any:
    name = class_names if isinstance(class_names, str) else class_names.get("torchvision") or class_names["pil"]
    return getattr(transformers, name)(**settings)
