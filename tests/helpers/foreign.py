"""Checkpoints and objects of the repositories' forms, made small, and how far a model of ours is from them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)

from tests.helpers import picture
from tests.helpers import repositories as repo

TILED = {"mm_patch_merge_type": "spatial_unpad"}


LLAVA_CASES = {
    "llama, CLIP": ("llava_llama", "clip", {}, LlavaForConditionalGeneration),
    "mistral, CLIP, last layer, square": (
        *("llava_mistral", "clip"),
        {"mm_vision_select_layer": -1, "image_aspect_ratio": None},
        LlavaForConditionalGeneration,
    ),
    "qwen, own SigLIP": ("llava_qwen", "siglip", {}, LlavaForConditionalGeneration),
    "llama, tiles": (
        *("llava_llama", "clip"),
        {**TILED, "image_aspect_ratio": "anyres"},
        LlavaNextForConditionalGeneration,
    ),
    "qwen, tiles with a limit": (
        *("llava_qwen", "siglip"),
        {**TILED, "image_aspect_ratio": "anyres_max_4"},
        LlavaOnevisionForConditionalGeneration,
    ),
    "qwen, CLIP tiles with a limit": (
        *("llava_qwen", "clip"),
        {**TILED, "image_aspect_ratio": "anyres_max_9"},
        LlavaOnevisionForConditionalGeneration,
    ),
    "qwen, tied": ("llava_qwen", "siglip", {"tie_word_embeddings": True}, LlavaForConditionalGeneration),
}


def llava_made(tmp_path: Path, case: str, **changed: Any) -> tuple[Any, Path]:
    """The repository's model of a case, and its checkpoint folder."""
    kind, tower, settings, _ = LLAVA_CASES[case]
    place = repo.write_tower(tmp_path / f"{tower}-tower", tower)
    config = repo.llava_settings(kind, str(place), **{**settings, **changed})
    model = repo.llava(config)
    tokens = repo.tokenizer("<|im_start|>") if kind == "llava_qwen" else repo.tokenizer("</s>", "<s>")
    return model, repo.write(tmp_path / "checkpoint", config, repo.stored(model), tokens)


def llava_apart(theirs: Any, model: Any, processor: Any, size: tuple[int, int]) -> float:
    """Largest difference of the logits about one picture, on the same pixels."""
    image = picture(*size, seed=3)
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": "a red cat"},
    ]
    text = processor.apply_chat_template(conversation, tokenize=False)
    inputs = processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        ours = model(**inputs).logits[0]
        ids = repo.with_marks(inputs["input_ids"][0], model.config.image_token_id)
        reference = theirs.answer(ids, [inputs["pixel_values"][0]], [size])
    assert ours.shape == reference.shape
    assert reference.std() > 0.1
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def smooth(width: int, height: int) -> Image.Image:
    """A picture whose every part looks different, without edges."""
    across, down = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    return Image.fromarray(np.stack([across, down, 250 - across], axis=-1).astype(np.uint8))


LARGE_VISION = {"qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"}


INTERNVL_CASES: dict[str, dict[str, Any]] = {
    "Qwen2": {"decoder": "Qwen2ForCausalLM"},
    "Qwen3": {"decoder": "Qwen3ForCausalLM"},
    "Llama, normed queries": {"decoder": "LlamaForCausalLM", "vision": LARGE_VISION},
    "InternLM2, normed queries, layer -2": {
        "decoder": "InternLM2ForCausalLM",
        "vision": LARGE_VISION,
        "select_layer": -2,
    },
}


INTERNVL_TOKENS = ("<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>")


def internvl_made(tmp_path: Path, case: str, **changed: Any) -> tuple[Any, Path]:
    """The repository's model of a case, and its checkpoint folder."""
    settings = repo.internvl_settings(**{**INTERNVL_CASES[case], **changed})
    model = repo.internvl(settings)
    return model, repo.write(tmp_path / "checkpoint", settings, repo.stored(model), repo.tokenizer(*INTERNVL_TOKENS))


def internvl_apart(theirs: Any, model: Any, processor: Any, size: tuple[int, int]) -> float:
    """Largest difference of the logits about one picture, on the same pixels."""
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": "a red cat"},
    ]
    text = processor.apply_chat_template(conversation, tokenize=False)
    inputs = processor(images=[picture(*size, seed=3)], text=[text], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        ours = model(**inputs).logits[0]
        reference = theirs.answer(inputs["input_ids"][0], inputs["pixel_values"], model.config.image_token_id)
    assert reference.std() > 0.1
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1))


def object_of(kind: str) -> tuple[Any, Any, Any]:
    """An object of a repository in memory, its tokenizer, and what compares it with a model."""
    if kind == "LLaVA, CLIP":
        return repo.llava(repo.llava_settings("llava_llama")), repo.tokenizer("</s>", "<s>"), llava_apart
    if kind.startswith("LLaVA"):
        settings = repo.llava_settings(
            tower="siglip-tiny", mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres_max_4"
        )
        return repo.llava(settings), repo.tokenizer("<|im_start|>"), llava_apart
    decoder = "Qwen2ForCausalLM" if kind.endswith("Qwen2") else "InternLM2ForCausalLM"
    return repo.internvl(repo.internvl_settings(decoder)), repo.tokenizer(*INTERNVL_TOKENS), internvl_apart
