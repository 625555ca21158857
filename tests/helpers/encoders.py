"""Small encoders and language models of many kinds, and what transformers alone makes of a folder."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from pivot_plugin.encoders.assemble import CHAT_TEMPLATES
from pivot_plugin.files import sha256
from pivot_plugin.testing.families import byte_tokenizer
from tests.helpers.processes import python

SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZED = {**SMALL, "image_size": 84, "patch_size": 14}
SIZE = {"height": 84, "width": 84}
CLASS_TOKEN, REGISTERS = 1, 4


def clip_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 84}, crop_size=SIZE)


def vit_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size=SIZE)


# builder, image processor, tokens beside the patches
ENCODERS: dict[str, tuple[Any, Any, int]] = {
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SIZED)), clip_processor, CLASS_TOKEN),
    "siglip": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**SIZED, vision_use_head=False)),
        lambda: SiglipImageProcessor(size=SIZE),
        0,
    ),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SIZED)), vit_processor, CLASS_TOKEN),
    "dinov2-registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZED)),
        vit_processor,
        CLASS_TOKEN + REGISTERS,
    ),
    "dinov3": (
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZED, num_register_tokens=REGISTERS)),
        vit_processor,
        CLASS_TOKEN + REGISTERS,
    ),
    "vit": (lambda: ViTModel(ViTConfig(**SIZED)), vit_processor, CLASS_TOKEN),
    "vit-mae": (lambda: ViTMAEModel(ViTMAEConfig(**SIZED)), vit_processor, CLASS_TOKEN),
}


TEXT = {"vocab_size": 280, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LANGUAGE_MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT, **HEADS)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT, **HEADS, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, **HEADS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT, **HEADS, head_dim=8)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**TEXT, **HEADS, head_dim=8)),
}


def language_model(name: str = "qwen2") -> tuple[Any, Any]:
    torch.manual_seed(1)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    model = LANGUAGE_MODELS[name]().eval()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer


def encoder(name: str) -> tuple[Any, Any, int]:
    torch.manual_seed(2)
    build, processor, beside = ENCODERS[name]
    return build().eval(), processor(), beside


PLAIN = """
import sys
sys.modules["pivot_plugin"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model, loading = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)
assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"], loading
processor = AutoProcessor.from_pretrained(sys.argv[1])
text = processor.image_token + " what is it?"
inputs = processor(images=[Image.new("RGB", (100, 60), "red")], text=text, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
assert torch.isfinite(logits).all()
print(tuple(logits.shape), round(logits.double().abs().sum().item(), 3))
"""


def plain(folder: Path) -> str:
    """What a process without this package makes of a folder."""
    run = python(PLAIN, folder, folder=folder)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


def rehash(folder: Path) -> None:
    """Have the record know the files as they are now."""
    record = json.loads((folder / "pivot.json").read_text())
    record["sha256"] = {
        path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name not in ("pivot.json", "README.md")
    }
    (folder / "pivot.json").write_text(json.dumps(record))
