"""LLaVA, LLaVA-NeXT and the checkpoints of PIVOT's authors: `model.vision_tower`, `model.mm_projector`, `-200`.

Their classes expand an image inside the forward pass. transformers' classes give the same numbers from the same
tensors: LLaVA where an image is one square; LLaVA-NeXT where it is tiled ("anyres"); LLaVA-OneVision where the tiles'
features are shrunk to a limit ("anyres_max_9").

Source:
    haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT, arXiv 2510.16333.
"""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
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
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from pivot_plugin.errors import ModelError

from .building import Elsewhere, Plan
from .names import NameTable, rename
from .tokens import CHATML_DIRECT, LLAMA_3, MISTRAL, QWEN, VICUNA, VIDEO, PromptForm, image_token, ready, started_as
from .weights import ObjectWeights, Weights, configuration

DECODERS: dict[str, type[PreTrainedConfig]] = {
    "LlavaLlamaForCausalLM": LlamaConfig,
    "LlavaQwenForCausalLM": Qwen2Config,
    "LlavaMistralForCausalLM": MistralConfig,
}
TOWER = "model.vision_tower.vision_tower."
TABLE = NameTable(
    (
        # the class of older releases has one more step in its names; written back is that form
        rename(TOWER + "vision_model.{rest}", "model.vision_tower.{rest}"),
        rename(TOWER + "{rest}", "model.vision_tower.{rest}"),
        rename("model.mm_projector.0.{rest}", "model.multi_modal_projector.linear_1.{rest}"),
        rename("model.mm_projector.2.{rest}", "model.multi_modal_projector.linear_2.{rest}"),
        rename("model.image_newline", "model.image_newline"),
        rename("lm_head.{rest}", "lm_head.{rest}"),
        rename("model.{rest}", "model.language_model.{rest}"),
    )
)
# the repositories load a tower by name; these are the ones they are used with, so that nothing need be downloaded
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}
# LLaVA-NeXT's own SigLIP class knows this one alone, whatever it loads
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
}
_SELECT = {"patch": "default", "cls_patch": "full"}
# settings of a model that are no settings of its decoder
_NOT_THE_DECODER = {"architectures", "model_type", "transformers_version", "_name_or_path", "dtype", "torch_dtype"}


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of these repositories'."""
    is_named = any(name in DECODERS for name in config.get("architectures") or ())
    # transformers' own have a configuration for each part
    return (is_named or "mm_vision_tower" in config) and "text_config" not in config


def plan(weights: Weights) -> Plan:
    """What a checkpoint or object is in transformers' words.

    Raises:
        ModelError: for a decoder, projector, tower or way of tiling that transformers has no equal of.
    """
    config = weights.config
    _check(weights)
    text = _decoder_config(weights)
    tower, elsewhere = _tower(weights)
    is_clip = isinstance(tower, CLIPVisionConfig)
    select = str(config.get("mm_vision_select_feature") or "patch")
    common: dict[str, Any] = {
        "text_config": text,
        "vision_config": tower,
        # the SigLIP class ignores both settings: the last of the blocks that are left, all of its tokens
        "vision_feature_layer": int(config.get("mm_vision_select_layer", -2)) if is_clip else -1,
        "vision_feature_select_strategy": _SELECT[select] if is_clip else "full",
        "tie_word_embeddings": bool(text.tie_word_embeddings),
        "dtype": config.get("torch_dtype") or config.get("dtype"),
    }
    side = tower.image_size // tower.patch_size
    back = {"unfreeze_mm_vision_tower": True}
    if not _is_tiled(config):
        tokens = side * side + (1 if is_clip and select == "cls_patch" else 0)
        plain = LlavaConfig(image_seq_length=tokens, **common)
        return Plan(LlavaForConditionalGeneration, plain, TABLE, elsewhere, back)
    common["image_grid_pinpoints"] = pinpoints(config.get("image_grid_pinpoints"), tower.image_size, weights.label)
    if "max" in str(config["image_aspect_ratio"]):
        limited = LlavaOnevisionConfig(vision_aspect_ratio=config["image_aspect_ratio"], **common)
        return Plan(LlavaOnevisionForConditionalGeneration, limited, TABLE, elsewhere, back)
    tiled = LlavaNextConfig(image_seq_length=side * side, **common)
    return Plan(LlavaNextForConditionalGeneration, tiled, TABLE, elsewhere, back)


def _is_tiled(config: Mapping[str, Any]) -> bool:
    return str(config.get("image_aspect_ratio")).startswith("anyres")


def _check(weights: Weights) -> None:
    """Refuse what transformers' classes cannot express.

    Raises:
        ModelError: naming the first such setting.
    """
    config, label = weights.config, weights.label
    architecture = _architecture(weights)
    remedy = "Convert it with the repository's own means, or write a plugin with the hook pivot_model."
    if architecture not in DECODERS:
        raise ModelError(f"{label!r} is a LLaVA of class {architecture!r}; known are {', '.join(DECODERS)}.", remedy)
    kind = config.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise ModelError(
            f"The projector of {label!r} is of type {kind!r}; transformers' LLaVA classes have mlp2x_gelu alone.",
            remedy,
        )
    select = config.get("mm_vision_select_feature") or "patch"
    if select not in _SELECT:
        raise ModelError(
            f"{label!r} selects features by mm_vision_select_feature={select!r}; known are {', '.join(_SELECT)}.",
            remedy,
        )
    aspect, merge = config.get("image_aspect_ratio"), str(config.get("mm_patch_merge_type") or "flat")
    resampler = config.get("mm_resampler_type")
    if resampler not in (None, "identity"):
        raise ModelError(f"{label!r} resamples its features: mm_resampler_type={resampler!r}.", remedy)
    if config.get("mm_use_im_start_end"):
        raise ModelError(f"{label!r} puts tokens of its own around images (mm_use_im_start_end).", remedy)
    fits = (
        merge == "spatial_unpad" and re.fullmatch(r"anyres(_max_\d+)?", str(aspect))
        if _is_tiled(config)
        else merge == "flat" and aspect in (None, "square", "pad")
    )
    if not fits:
        raise ModelError(
            f"{label!r} puts images together by image_aspect_ratio={aspect!r} and mm_patch_merge_type={merge!r}; known "
            "are square or pad with flat, and anyres or anyres_max_<n> with spatial_unpad.",
            remedy,
        )


def _architecture(weights: Weights) -> str:
    if isinstance(weights, ObjectWeights) and type(weights.model).__name__ in DECODERS:
        return type(weights.model).__name__
    return str(next(iter(weights.config.get("architectures") or ()), "unknown"))


def _decoder_config(weights: Weights) -> PreTrainedConfig:
    kind = DECODERS[_architecture(weights)]
    fields = (set(kind().to_dict()) | {"rope_theta", "rope_scaling"}) - _NOT_THE_DECODER
    return kind(**{name: value for name, value in weights.config.items() if name in fields})


def pinpoints(written: object, side: int, label: str) -> list[list[int]]:
    """Sizes an image may be tiled to, as (height, width) in pixels.

    Args:
        written: as the repository has them: a list of (width, height), such a list in words, or a range of tiles in
            words, "(1x1),...,(6x6)".
        side: of a tile, in pixels.
        label: of the model, for errors.

    Raises:
        ModelError: for anything else.
    """
    try:
        if isinstance(written, str) and "x" in written:
            corners = [(int(across), int(down)) for across, down in re.findall(r"\((\d+)x(\d+)\)", written)]
            (first_across, first_down), (last_across, last_down) = corners[0], corners[-1]
            sizes: Any = [
                (across * side, down * side)
                for across in range(first_across, last_across + 1)
                for down in range(first_down, last_down + 1)
            ]
        else:
            sizes = ast.literal_eval(written) if isinstance(written, str) else written
        pairs = [[int(height), int(width)] for width, height in sizes]
    except (IndexError, SyntaxError, TypeError, ValueError) as error:
        raise ModelError(
            f"{label!r} tiles its images, and its image_grid_pinpoints cannot be read: {str(written)[:80]!r}.",
            "They are a list of (width, height), or a range such as '(1x1),...,(6x6)'.",
        ) from error
    if not pairs or any(size % side or size < side for pair in pairs for size in pair):
        raise ModelError(
            f"The image_grid_pinpoints of {label!r} are no multiples of its tiles of {side} px: {pairs[:4]}.",
            "Look whether config.json names the tower that the checkpoint has (mm_vision_tower).",
        )
    return pairs


# The tower


def _tower(weights: Weights) -> tuple[CLIPVisionConfig | SiglipVisionConfig, Elsewhere | None]:
    """The tower's configuration, and where its tensors are if the checkpoint does not keep them."""
    named = str(weights.config.get("mm_vision_tower") or "")
    inside = [name for name in weights.names if name.startswith(TOWER)]
    settings, kind = _tower_settings(weights, named, inside)
    if kind == "clip":
        config: CLIPVisionConfig | SiglipVisionConfig = CLIPVisionConfig(**_of(CLIPVisionConfig, settings))
        blocks = config.num_hidden_layers
    else:
        config = SiglipVisionConfig(**{**_of(SiglipVisionConfig, settings), "vision_use_head": False})
        # LLaVA-NeXT deletes the last block of whatever it loads
        blocks = config.num_hidden_layers - 1
        config.num_hidden_layers = blocks
    if not inside:
        return config, Elsewhere("model.vision_tower", lambda: _tensors_elsewhere(named, config, weights.label))
    block_count = len({match[1] for name in inside if (match := re.search(r"\.encoder\.layers\.(\d+)\.", name))})
    if kind == "siglip" and isinstance(weights, ObjectWeights):
        # whether its configuration goes on counting the deleted block is the object's affair
        config.num_hidden_layers = blocks = block_count
    if block_count != blocks:
        raise ModelError(
            f"The vision tower in {weights.label!r} has {block_count} blocks; {named!r} should leave {blocks} of "
            "them there.",
            "Look whether config.json names the tower that the checkpoint has (mm_vision_tower).",
        )
    return config, None


def _of(kind: type[PreTrainedConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    fields = set(kind().to_dict()) - _NOT_THE_DECODER
    return {name: value for name, value in settings.items() if name in fields}


def _tower_settings(weights: Weights, named: str, inside: list[str]) -> tuple[Mapping[str, Any], str]:
    """Settings of the tower before any block is deleted, and its kind: "clip" or "siglip"."""
    if inside:
        kind = "clip" if any(name.endswith("embeddings.class_embedding") for name in inside) else "siglip"
    else:
        kind = "siglip" if "siglip" in named.lower() else "clip"
    if isinstance(weights, ObjectWeights):
        tower_config = getattr(weights.model.get_submodule(TOWER.removesuffix(".")), "config", None) if inside else None
        if tower_config is not None:
            return (tower_config.to_dict() if hasattr(tower_config, "to_dict") else vars(tower_config)), kind
    tower_folder = Path(named) if named and Path(named).is_dir() else None
    if tower_folder is None and weights.folder is not None and named and (weights.folder / named).is_dir():
        tower_folder = weights.folder / named
    if tower_folder is None and kind == "clip" and Path(named).name in CLIP_TOWERS:
        return CLIP_TOWERS[Path(named).name], kind
    if tower_folder is None and kind == "siglip" and _is_so400m(weights, inside, named):
        return SO400M, kind
    written = configuration(tower_folder or named) if named else None
    if written is not None:
        # a whole CLIP or SigLIP has a configuration for each half
        settings = written.get("vision_config") if isinstance(written.get("vision_config"), dict) else written
        if kind in str(written.get("model_type", kind)) and isinstance(settings, dict):
            return settings, kind
    towers = ", ".join([*CLIP_TOWERS, "siglip-so400m-patch14-384"])
    raise ModelError(
        f"The vision tower of {weights.label!r}, mm_vision_tower={named!r}, is not known and no {kind} configuration "
        f"can be read there; known without looking are {towers}.",
        "Put its folder there, or set mm_vision_tower in config.json to where it is.",
    )


def _is_so400m(weights: Weights, inside: list[str], named: str) -> bool:
    """Whether a SigLIP tower has the sizes of so400m at 384 px, whatever its folder is called."""
    embedding = next((name for name in inside if name.endswith("embeddings.position_embedding.weight")), None)
    if embedding is None or not _has_weights(weights):
        return "so400m-patch14-384" in named
    with weights.reading() as get:
        side = SO400M["image_size"] // SO400M["patch_size"]
        return tuple(get(embedding).shape) == (side * side, SO400M["hidden_size"])


def _has_weights(weights: Weights) -> bool:
    try:
        with weights.reading():
            return True
    except ModelError:
        return False


def _tensors_elsewhere(named: str, config: PreTrainedConfig, label: str) -> dict[str, torch.Tensor]:
    """The tower's tensors by the names within it, from where the checkpoint says they are.

    Raises:
        ModelError: if they cannot be loaded whole.
    """
    remedy = "Put the tower there, or set mm_vision_tower in config.json to its folder or Hub id."
    try:
        kind = CLIPVisionModel if isinstance(config, CLIPVisionConfig) else SiglipVisionModel
        tower, loading = kind.from_pretrained(named, config=config, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{label!r} keeps no vision tower, and none could be loaded from mm_vision_tower={named!r}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy,
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"The vision tower at {named!r} lacks {len(missing)} tensors: {', '.join(missing[:6])}.", remedy
        )
    return dict(tower.state_dict())


# The processor


def processor(weights: Weights, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """transformers' processor around the checkpoint's tokenizer; the plan's configuration gets its image token.

    Args:
        weights: of the model.
        plan: of it.
        tokenizer: of it; the image token is added where there is room.
    """
    config = plan.config
    text, tower = config.get_text_config(), config.vision_config
    marker = image_token(tokenizer, text.vocab_size, weights.label)
    ready(tokenizer)
    config.image_token_id = tokenizer.convert_tokens_to_ids(marker)
    form = _prompt_form(text, tokenizer)
    is_clip = isinstance(tower, CLIPVisionConfig)
    side, others = tower.image_size // tower.patch_size, int(is_clip)
    colours = _colours(weights, is_clip)
    strategy = config.vision_feature_select_strategy
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vision_feature_select_strategy": strategy,
        "image_token": marker,
        "chat_template": form.template(marker),
    }
    square = {"height": tower.image_size, "width": tower.image_size}
    crop = {"size": {"shortest_edge": tower.image_size}, "crop_size": square, **colours}
    if plan.model_class is LlavaForConditionalGeneration:
        if weights.config.get("image_aspect_ratio") == "pad":
            images: object = LlavaImageProcessor(do_pad=True, **crop)
        else:
            images = CLIPImageProcessor(**crop) if is_clip else SiglipImageProcessor(size=square, **colours)
        return LlavaProcessor(
            image_processor=images, patch_size=tower.patch_size, num_additional_image_tokens=others, **common
        )
    if plan.model_class is LlavaNextForConditionalGeneration:
        return LlavaNextProcessor(
            image_processor=LlavaNextImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints, **crop),
            patch_size=tower.patch_size,
            num_additional_image_tokens=others,
            **common,
        )
    # no video is ever passed; its token must not be one that stands for anything else
    config.video_token_id = tokenizer.get_vocab().get(VIDEO, -1)
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=square, image_grid_pinpoints=config.image_grid_pinpoints, **colours
        ),
        video_processor=LlavaOnevisionVideoProcessor(size=square, **colours),
        num_image_tokens=side * side + others,
        vision_aspect_ratio=config.vision_aspect_ratio,
        video_token=VIDEO,
        **common,
    )


def _prompt_form(text: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    """The form a decoder was taught, read off its tokens: the checkpoint does not name it."""
    vocabulary = tokenizer.get_vocab()
    if "<|start_header_id|>" in vocabulary:
        return LLAMA_3
    if "<|im_start|>" in vocabulary:
        return started_as(tokenizer, QWEN if isinstance(text, Qwen2Config) else CHATML_DIRECT)
    return MISTRAL if isinstance(text, MistralConfig) else VICUNA


def _colours(weights: Weights, is_clip: bool) -> dict[str, Any]:
    """Mean and deviation of the pixels: those of the checkpoint or its tower, else of the tower's kind."""
    named = str(weights.config.get("mm_vision_tower") or "")
    beside = weights.folder and named and weights.folder / named
    folders = [folder for folder in (weights.folder, beside, named and Path(named)) if folder]
    for folder in folders:
        file = folder / "preprocessor_config.json"
        if not file.is_file():
            continue
        try:
            written = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if "image_mean" in written and "image_std" in written:
            return {"image_mean": written["image_mean"], "image_std": written["image_std"]}
    if is_clip:
        return {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    return {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
