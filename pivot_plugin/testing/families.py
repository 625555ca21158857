"""Tiny models of every supported family: real transformers classes, random weights, real processors, no network.

Each has the traits of its family that break code elsewhere: LLaVA reads layer -2 and drops the class token, LLaVA-NeXT
and LLaVA-OneVision cut an image into a varying number of tiles, the Qwen-VL towers take any resolution and use M-RoPE,
Qwen2.5-VL works in window order, InternVL sends one row per tile.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

IMAGE_MARKERS = {
    "llava": "<image>",
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
}
SPECIAL_TOKENS = (
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<video>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
)
WIDTH = 32


@dataclass(frozen=True)
class TinyFamily:
    """How to build one family's tiny model and its processor.

    Attributes:
        name: family name, as in the adapter that serves it.
        build_model: makes the model with random weights drawn from torch's current random state.
        build_processor: makes the family's own processor class around an offline tokenizer.
    """

    name: str
    build_model: Callable[[], PreTrainedModel]
    build_processor: Callable[[], ProcessorMixin]


def byte_tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: any text, no network, 268 tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=named or None
    )


def chat_template(family: str) -> str:
    """A ChatML template with the family's own image marker, for string and for structured content."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + IMAGE_MARKERS[family] + "' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


VOCABULARY = len(byte_tokenizer())
TOKEN = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": TOKEN["<pad>"],
    "bos_token_id": None,
    "eos_token_id": TOKEN["<|im_end|>"],
    "tie_word_embeddings": False,
}
_VIT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
_QWEN_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
_TILES = [[56, 112], [112, 56], [112, 112]]


def _llava() -> PreTrainedModel:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**_VIT),
            text_config=LlamaConfig(**_TEXT),
            image_token_id=TOKEN["<image>"],
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=16,
            tie_word_embeddings=False,
        )
    )


def _llava_processor() -> ProcessorMixin:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=byte_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("llava"),
    )


def _llava_next() -> PreTrainedModel:
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**_VIT),
            text_config=LlamaConfig(**_TEXT),
            image_token_id=TOKEN["<image>"],
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_grid_pinpoints=_TILES,
            image_seq_length=16,
            tie_word_embeddings=False,
        )
    )


def _llava_next_processor() -> ProcessorMixin:
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=_TILES
        ),
        tokenizer=byte_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("llava_next"),
    )


def _llava_onevision() -> PreTrainedModel:
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**_VIT, vision_use_head=False),
            text_config=Qwen2Config(**_TEXT),
            image_token_id=TOKEN["<image>"],
            video_token_id=TOKEN["<video>"],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
            image_grid_pinpoints=_TILES,
            tie_word_embeddings=False,
        )
    )


def _llava_onevision_processor() -> ProcessorMixin:
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size={"height": 56, "width": 56}, image_grid_pinpoints=_TILES),
        tokenizer=byte_tokenizer(),
        video_processor=LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat_template("llava_onevision"),
    )


def _qwen_tokens() -> dict[str, int]:
    return {
        "image_token_id": TOKEN["<|image_pad|>"],
        "video_token_id": TOKEN["<|video_pad|>"],
        "vision_start_token_id": TOKEN["<|vision_start|>"],
        "vision_end_token_id": TOKEN["<|vision_end|>"],
    }


def _qwen2_vl() -> PreTrainedModel:
    vision = {"embed_dim": WIDTH, "hidden_size": WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
            text_config={**_TEXT, "rope_parameters": _MROPE},
            tie_word_embeddings=False,
            **_qwen_tokens(),
        )
    )


def _qwen2_vl_processor() -> ProcessorMixin:
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=_QWEN_SIZE),
        tokenizer=byte_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=chat_template("qwen2_vl"),
    )


def _qwen2_5_vl() -> PreTrainedModel:
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "depth": 2, "num_heads": 4, "patch_size": 14}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={
                **vision,
                "out_hidden_size": WIDTH,
                "window_size": 56,
                "fullatt_block_indexes": [1],
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            text_config={**_TEXT, "rope_parameters": _MROPE},
            tie_word_embeddings=False,
            **_qwen_tokens(),
        )
    )


def _qwen2_5_vl_processor() -> ProcessorMixin:
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=_QWEN_SIZE),
        tokenizer=byte_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=chat_template("qwen2_5_vl"),
    )


def _qwen3_vl() -> PreTrainedModel:
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "depth": 3, "num_heads": 4, "patch_size": 16}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            vision_config={
                **vision,
                "out_hidden_size": WIDTH,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            # with fewer language layers the last deepstack merger's output is added where nothing reads it
            text_config={**_TEXT, "num_hidden_layers": 3, "head_dim": 8, "rope_parameters": _MROPE},
            tie_word_embeddings=False,
            **_qwen_tokens(),
        )
    )


def _qwen3_vl_processor() -> ProcessorMixin:
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, patch_size=16
        ),
        tokenizer=byte_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=chat_template("qwen3_vl"),
    )


def _internvl() -> PreTrainedModel:
    vision = {**_VIT, "image_size": [56, 56], "patch_size": [14, 14]}
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(**vision),
            text_config=Qwen2Config(**_TEXT),
            image_token_id=TOKEN["<IMG_CONTEXT>"],
            image_seq_length=4,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )
    )


def _internvl_processor() -> ProcessorMixin:
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size={"height": 56, "width": 56}, max_patches=4, crop_to_patches=True),
        tokenizer=byte_tokenizer(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        video_processor=InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=chat_template("internvl"),
    )


FAMILIES = {
    family.name: family
    for family in (
        TinyFamily("llava", _llava, _llava_processor),
        TinyFamily("llava_next", _llava_next, _llava_next_processor),
        TinyFamily("llava_onevision", _llava_onevision, _llava_onevision_processor),
        TinyFamily("qwen2_vl", _qwen2_vl, _qwen2_vl_processor),
        TinyFamily("qwen2_5_vl", _qwen2_5_vl, _qwen2_5_vl_processor),
        TinyFamily("qwen3_vl", _qwen3_vl, _qwen3_vl_processor),
        TinyFamily("internvl", _internvl, _internvl_processor),
    )
}


def build(name: str, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A family's tiny model, in float32 and eval mode, and its processor.

    Args:
        name: a key of `FAMILIES`.
        seed: of the random weights; torch's own random state is left as it was.

    Raises:
        KeyError: for a name that is not in `FAMILIES`.
    """
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.build_model()
        # random towers start with tiny outputs; a larger spread makes wrong features visible in the logits
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.08)
    return model.float().eval(), family.build_processor()
