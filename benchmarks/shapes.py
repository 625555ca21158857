"""What the benchmarks of trainers measure: models by their widths and depths, pairs by their pictures and lengths."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

from pivot_plugin.testing.families import TOKEN, byte_tokenizer, chat_template


@dataclass(frozen=True)
class Shape:
    """One situation to measure: which model, how large its images, how many questions on each, how long the answers."""

    name: str
    model: str
    pairs: int
    questions: int
    answer: int
    sizes: tuple[tuple[int, int], ...]


SHAPES = [
    Shape("short-answers", "llava", pairs=2, questions=1, answer=8, sizes=((336, 336),)),
    Shape("eight-questions", "llava", pairs=8, questions=8, answer=8, sizes=((336, 336),)),
    Shape("long-answers", "llava", pairs=2, questions=1, answer=512, sizes=((336, 336),)),
    Shape("variable-resolution", "qwen", pairs=3, questions=1, answer=16, sizes=((448, 336), (224, 560), (336, 336))),
]

# a letter is a token here
GPU_SHAPES = [
    Shape("llava-1.5-7b", "llava", pairs=6, questions=1, answer=40, sizes=((336, 336),)),
    Shape("qwen2.5-vl-7b", "qwen", pairs=8, questions=1, answer=40, sizes=((448, 336), (224, 560), (672, 448))),
    Shape("internvl3-8b", "internvl", pairs=3, questions=1, answer=40, sizes=((896, 448),)),
]


def llava(sizes: dict[str, dict[str, int]]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A LLaVA-1.5 of the given widths and depths: 576 image tokens, features of layer -2."""
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **sizes["vision"]),
            text_config=LlamaConfig(max_position_embeddings=4096, pad_token_id=0, **sizes["text"]),
            image_token_id=TOKEN["<image>"],
            vision_feature_layer=-2,
            image_seq_length=576,
            tie_word_embeddings=False,
        )
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(),
        tokenizer=byte_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("llava"),
    )
    processor.image_processor.size, processor.image_processor.crop_size = (
        {"shortest_edge": 336},
        {"height": 336, "width": 336},
    )
    return model, processor


def qwen(sizes: dict[str, dict[str, int]]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A Qwen2.5-VL of the given widths and depths."""
    width = sizes["text"]["hidden_size"] // sizes["text"]["num_attention_heads"]
    section = [width // 8, width // 2 - width // 8 - (width // 2 - width // 8) // 2, (width // 2 - width // 8) // 2]
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={**sizes["qwen_vision"], "out_hidden_size": sizes["text"]["hidden_size"]},
            text_config={
                **sizes["text"],
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 1e6},
                "pad_token_id": 0,
            },
            image_token_id=TOKEN["<|image_pad|>"],
            video_token_id=TOKEN["<|video_pad|>"],
            vision_start_token_id=TOKEN["<|vision_start|>"],
            vision_end_token_id=TOKEN["<|vision_end|>"],
            tie_word_embeddings=False,
        )
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}),
        tokenizer=byte_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=chat_template("qwen2_5_vl"),
    )
    return model, processor


def internvl(sizes: dict[str, dict[str, Any]]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """An InternVL of the given widths and depths: a token for four patches, twelve tiles at most."""
    side = sizes["internvl_vision"]["image_size"]
    tokens = (side // 14 // 2) ** 2
    vision = {**sizes["internvl_vision"], "image_size": [side, side], "patch_size": [14, 14]}
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(**vision),
            text_config=Qwen2Config(max_position_embeddings=8192, pad_token_id=0, **sizes["text"]),
            image_token_id=TOKEN["<IMG_CONTEXT>"],
            image_seq_length=tokens,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": side, "width": side}, max_patches=12, crop_to_patches=True
        ),
        tokenizer=byte_tokenizer(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        video_processor=InternVLVideoProcessor(),
        image_seq_length=tokens,
        chat_template=chat_template("internvl"),
    )
    return model, processor


MAKERS: dict[str, Callable[..., tuple[PreTrainedModel, ProcessorMixin]]] = {
    "llava": llava,
    "qwen": qwen,
    "internvl": internvl,
}
_CPU_TEXT = {
    "vocab_size": 16_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
_CPU_VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
# of 7B, as in the configurations that their authors publish
_QWEN_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_TOY_TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_TOY_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PRESETS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "cpu": {
        "llava": {"vision": _CPU_VISION, "text": _CPU_TEXT},
        "qwen": {
            "qwen_vision": {"hidden_size": 256, "intermediate_size": 1024, "depth": 6, "num_heads": 4},
            "text": _CPU_TEXT,
        },
    },
    "gpu": {
        "llava": {
            "vision": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
            },
            "text": {
                "vocab_size": 32_064,
                "hidden_size": 4096,
                "intermediate_size": 11_008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
            },
        },
        "qwen": {
            "qwen_vision": {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16},
            "text": {"vocab_size": 152_064, **_QWEN_TEXT},
        },
        "internvl": {
            "internvl_vision": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 448,
            },
            "text": {"vocab_size": 151_674, **_QWEN_TEXT},
        },
    },
    # the preset for GPUs as a rehearsal: the same pictures and code, in seconds
    "toy": {
        "llava": {"vision": _TOY_VISION, "text": _TOY_TEXT},
        "qwen": {
            "qwen_vision": {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2},
            "text": _TOY_TEXT,
        },
        "internvl": {"internvl_vision": {**_TOY_VISION, "image_size": 448}, "text": _TOY_TEXT},
    },
}


def small(shape: Shape) -> Shape:
    """A shape with two pairs a batch, for rehearsals."""
    return replace(shape, pairs=2, sizes=shape.sizes[:2])


def pairs_of(shape: Shape, steps: int) -> list[dict[str, Any]]:
    """Preference pairs of a shape: random pictures, questions and answers of the wanted lengths."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(shape.pairs * steps):
        group = index // shape.questions
        width, height = shape.sizes[group % len(shape.sizes)]
        image = Image.fromarray(np.random.default_rng(group).integers(0, 255, (height, width, 3), dtype=np.uint8))
        letters = [chr(97 + n) for n in rng.integers(0, 26, 2 * shape.answer + 24)]
        rows.append(
            {
                "images": [image],
                "prompt": "".join(letters[:24]),
                "chosen": "".join(letters[24 : 24 + shape.answer]),
                "rejected": "".join(letters[24 + shape.answer :]),
            }
        )
    return rows
