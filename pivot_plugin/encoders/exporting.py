"""An encoder as other software reads it: file names, tensor names and settings of timm, LLaVA-NeXT and InternVL.

Each target is one function from an encoder to tensors and settings, or a refusal with every reason for which the target
cannot hold this tower. What the other side has to be told beside the folder stands in `export.json` and is returned.

    timm             a folder for timm.create_model("local-dir:<folder>", pretrained=True)
    llava-next       what LLaVA, LLaVA-NeXT and the PIVOT authors' code take as --vision_tower
    internvl         the repository's own InternVisionModel, for --vision_path
    transformers-4   a folder that AutoModel of transformers 4 reads
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pivot_plugin.adapters.base import FEATURE_LAYER
from pivot_plugin.choices import ExportTarget
from pivot_plugin.errors import EncoderError, SettingsError, unknown
from pivot_plugin.files import whole_folder

from .compatibility import checked_releases, settle
from .loading import load_encoder
from .record import origin_of
from .towers import image_processor_of

EXPORT_FILE = "export.json"
Tensors = dict[str, torch.Tensor]
Settings = dict[str, Any]

# timm's names of activations
_TIMM_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
# LLaVA-NeXT's SigLipVisionTower takes these for granted, whatever the folder says
_LLAVA_NEXT_SIGLIP = {"hidden_size": 1152, "image_size": 384, "patch_size": 14}


@dataclass(frozen=True)
class Exported:
    """What was written for another side.

    Attributes:
        folder: to give to it.
        target: whose names it has.
        settings: to set there beside the folder, by the names they have there.
        notes: what is otherwise to be known, in sentences.
    """

    folder: Path
    target: ExportTarget
    settings: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Form:
    """An encoder in the form of a target.

    Attributes:
        tensors: by the target's names.
        config: the target's `config.json`.
        settings, notes: as of `Exported`.
        preprocessor: whether transformers' image processor goes with it.
    """

    tensors: Tensors
    config: Settings
    settings: Settings
    notes: tuple[str, ...] = ()
    preprocessor: bool = True


def export(
    encoder: PreTrainedModel | str | Path,
    target: ExportTarget,
    folder: str | Path,
    *,
    image_processor: object | None = None,
) -> Exported:
    """Write an encoder as timm, LLaVA-NeXT, InternVL or transformers 4 reads it.

    Args:
        encoder: loaded, or its folder or Hub id.
        target: "timm", "llava-next", "internvl" or "transformers-4".
        folder: to write; must be empty or absent.
        image_processor: of a loaded encoder; found by where it comes from where None.

    Returns:
        the folder and what the other side has to be told.

    Raises:
        EncoderError: if the target cannot hold this tower, with every reason; nothing is written then.
        SettingsError: for an unknown target, or a folder that holds something.
    """
    if target not in _FORMS:
        raise unknown("export target", target, get_args(ExportTarget))
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"Folder {str(folder)!r} is not empty.", "Choose another folder, or empty it.")
    if isinstance(encoder, str | Path):
        encoder, loaded = load_encoder(encoder, with_processor=True)
        image_processor = image_processor or loaded
    image_processor = image_processor or image_processor_of(encoder)
    form = _FORMS[target](encoder, image_processor)
    with whole_folder(folder) as aside:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in form.tensors.items()}
        save_file(tensors, aside / "model.safetensors", {"format": "pt"})
        _write(aside / "config.json", form.config)
        if form.preprocessor:
            image_processor.save_pretrained(aside)  # type: ignore[attr-defined]
        if target == "transformers-4":
            settle(aside)
        origin = origin_of(encoder)
        told = {"target": target, "settings": form.settings, "notes": form.notes}
        _write(aside / EXPORT_FILE, told | {"encoder": origin.name if origin else None})
    return Exported(folder, target, form.settings, form.notes)


def _write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _refuse_unless(target: str, encoder: PreTrainedModel, problems: list[str], remedy: str) -> None:
    if problems:
        raise EncoderError(f"{target} cannot hold this {type(encoder).__name__}: {'; '.join(problems)}.", remedy)


def _edge(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def _layer(encoder: PreTrainedModel, depth: int) -> int:
    """How many blocks the features in use have passed; all of them where the tower's output is read."""
    layer = getattr(encoder.config, FEATURE_LAYER, None)
    if layer is None:
        return depth
    return int(layer) if layer >= 0 else depth + 1 + int(layer)


def _fused(tensors: Tensors, path: str, parts: tuple[str, str, str], kind: str) -> torch.Tensor | None:
    found = [tensors.get(f"{path}.{part}.{kind}") for part in parts]
    return None if any(tensor is None for tensor in found) else torch.cat([t for t in found if t is not None])


def _renamed(tensors: Tensors, table: Mapping[str, str]) -> Tensors:
    """The tensors that a table of patterns knows, under the names that it gives them."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in table.items():
            if match := re.fullmatch(pattern, name):
                found[match.expand(replacement)] = tensor
                break
    return found


# timm

_CLIP_BLOCK = r"encoder\.layers\.(\d+)"
_TIMM_CLIP = {
    rf"{_CLIP_BLOCK}\.layer_norm([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
    rf"{_CLIP_BLOCK}\.self_attn\.out_proj\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    rf"{_CLIP_BLOCK}\.mlp\.fc([12])\.(weight|bias)": r"blocks.\1.mlp.fc\2.\3",
    r"embeddings\.patch_embedding\.(weight|bias)": r"patch_embed.proj.\1",
    r"pre_layrnorm\.(weight|bias)": r"norm_pre.\1",
    r"post_layernorm\.(weight|bias)": r"norm.\1",
    r"head\.attention\.out_proj\.(weight|bias)": r"attn_pool.proj.\1",
    r"head\.layernorm\.(weight|bias)": r"attn_pool.norm.\1",
    r"head\.mlp\.fc([12])\.(weight|bias)": r"attn_pool.mlp.fc\1.\2",
}
_INTERN_BLOCK = r"encoder\.layer\.(\d+)"
_TIMM_INTERN = {
    rf"{_INTERN_BLOCK}\.layernorm_before\.(weight|bias)": r"blocks.\1.norm1.\2",
    rf"{_INTERN_BLOCK}\.layernorm_after\.(weight|bias)": r"blocks.\1.norm2.\2",
    rf"{_INTERN_BLOCK}\.attention\.projection_layer\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    rf"{_INTERN_BLOCK}\.mlp\.fc([12])\.(weight|bias)": r"blocks.\1.mlp.fc\2.\3",
    rf"{_INTERN_BLOCK}\.lambda_([12])": r"blocks.\1.ls\2.gamma",
    r"embeddings\.patch_embeddings\.projection\.(weight|bias)": r"patch_embed.proj.\1",
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.position_embeddings": "pos_embed",
}
# by model type: generic architecture, epsilon that it has built in
_TIMM_KINDS = {
    "clip_vision_model": ("vit_base_patch16_clip_224", 1e-5),
    "siglip_vision_model": ("vit_base_patch16_siglip_224", 1e-6),
    "internvl_vision": ("vit_intern300m_patch14_448", 1e-6),
}


def _for_timm(encoder: PreTrainedModel, image_processor: object) -> _Form:
    config = encoder.config
    kind, tensors = config.model_type, dict(encoder.state_dict())
    problems = []
    architecture, epsilon = _TIMM_KINDS.get(kind, ("", 0.0))
    if not architecture:
        problems.append(f"a {kind} has no counterpart there ({', '.join(_TIMM_KINDS)} have)")
    else:
        if abs(config.layer_norm_eps - epsilon) > 1e-12:
            problems.append(f"layer_norm_eps is {config.layer_norm_eps}, {architecture} has {epsilon}")
        if config.hidden_act not in _TIMM_ACTIVATIONS:
            problems.append(f"its activation {config.hidden_act!r} is none of {', '.join(_TIMM_ACTIVATIONS)}")
        if kind == "internvl_vision":
            problems += _intern_problems(encoder)
            if config.use_qk_norm:
                problems.append("its queries and keys are normed over all heads together, timm's head by head")
    _refuse_unless("timm", encoder, problems, "Use the encoder by transformers: AutoModel.from_pretrained.")
    depth, size = config.num_hidden_layers, _edge(config.image_size)
    arguments: Settings = {
        "img_size": size,
        "patch_size": _edge(config.patch_size),
        "embed_dim": config.hidden_size,
        "depth": depth,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "act_layer": _TIMM_ACTIVATIONS[config.hidden_act],
        "num_classes": 0,
    }
    if kind == "internvl_vision":
        arguments |= {"qkv_bias": config.attention_bias, "init_values": 0.1}
        written = _intern_blocks(tensors, _TIMM_INTERN, "blocks.{}.attn.qkv")
    else:
        written = _timm_clip(tensors, depth)
        if kind == "siglip_vision_model" and "attn_pool.latent" not in written:
            architecture = "vit_base_patch16_siglip_gap_224"
    pooled = {"vit_base_patch16_siglip_224": "map", "vit_base_patch16_siglip_gap_224": "avg"}.get(architecture, "token")
    block = _layer(encoder, depth) - 1
    # SigLIP's own output has passed its closing norm
    normed = kind == "siglip_vision_model" and getattr(config, FEATURE_LAYER, None) is None
    reading = (
        f'model.forward_intermediates(images, indices=[{block}], norm={normed}, output_fmt="NLC", '
        "intermediates_only=True)[0]"
    )
    return _Form(
        written,
        {
            "architecture": architecture,
            "num_classes": 0,
            "num_features": config.hidden_size,
            "global_pool": pooled,
            "model_args": arguments,
            "pretrained_cfg": _timm_preprocessing(image_processor, size),
        },
        {"model": 'timm.create_model("local-dir:<folder>", pretrained=True)', "features": reading},
        ("The class token is left out of these features, as it is by LLaVA.",) if kind != "siglip_vision_model" else (),
        preprocessor=False,
    )


def _timm_clip(tensors: Tensors, depth: int) -> Tensors:
    written = _renamed(tensors, _TIMM_CLIP)
    for index in range(depth):
        for kind in ("weight", "bias"):
            path = f"encoder.layers.{index}.self_attn"
            fused = _fused(tensors, path, ("q_proj", "k_proj", "v_proj"), kind)
            if fused is not None:
                written[f"blocks.{index}.attn.qkv.{kind}"] = fused
    written["pos_embed"] = tensors["embeddings.position_embedding.weight"][None]
    if "embeddings.class_embedding" in tensors:
        written["cls_token"] = tensors["embeddings.class_embedding"][None, None]
    if "head.probe" in tensors:
        written["attn_pool.latent"] = tensors["head.probe"]
        for kind in ("weight", "bias"):
            joint = tensors[f"head.attention.in_proj_{kind}"]
            third = joint.shape[0] // 3
            written[f"attn_pool.q.{kind}"], written[f"attn_pool.kv.{kind}"] = joint[:third], joint[third:]
    return written


def _timm_preprocessing(image_processor: Any, size: int) -> Settings:
    names = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    return {
        "input_size": [3, size, size],
        "fixed_input_size": True,
        "interpolation": names.get(int(getattr(image_processor, "resample", None) or 3), "bicubic"),
        "crop_pct": 1.0,
        # stretched where the whole image is shown, cut where its middle is
        "crop_mode": "center" if getattr(image_processor, "do_center_crop", False) else "squash",
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
        "num_classes": 0,
        "custom_load": False,
    }


# InternVL


_INTERNVL = {
    rf"{_INTERN_BLOCK}\.layernorm_before\.(weight|bias)": r"encoder.layers.\1.norm1.\2",
    rf"{_INTERN_BLOCK}\.layernorm_after\.(weight|bias)": r"encoder.layers.\1.norm2.\2",
    rf"{_INTERN_BLOCK}\.attention\.projection_layer\.(weight|bias)": r"encoder.layers.\1.attn.proj.\2",
    rf"{_INTERN_BLOCK}\.attention\.([qk])_norm\.weight": r"encoder.layers.\1.attn.\2_norm.weight",
    rf"{_INTERN_BLOCK}\.mlp\.fc([12])\.(weight|bias)": r"encoder.layers.\1.mlp.fc\2.\3",
    rf"{_INTERN_BLOCK}\.lambda_([12])": r"encoder.layers.\1.ls\2",
    r"embeddings\.patch_embeddings\.projection\.(weight|bias)": r"embeddings.patch_embedding.\1",
    r"embeddings\.cls_token": "embeddings.class_embedding",
    r"embeddings\.position_embeddings": "embeddings.position_embedding",
}


def _intern_problems(encoder: PreTrainedModel) -> list[str]:
    """What keeps an InternViT from being held by a class without a closing norm."""
    problems = []
    if not encoder.config.use_mean_pooling:
        problems.append("it has a norm behind its last block")
    if "embeddings.position_embeddings" not in encoder.state_dict():
        problems.append("it has no absolute position embeddings")
    return problems


def _intern_blocks(tensors: Tensors, table: Mapping[str, str], qkv: str) -> Tensors:
    written = _renamed(tensors, table)
    depth = 1 + max(int(found[1]) for name in tensors if (found := re.match(_INTERN_BLOCK, name)))
    for index in range(depth):
        for kind in ("weight", "bias"):
            path = f"encoder.layer.{index}.attention"
            fused = _fused(tensors, path, ("q_proj", "k_proj", "v_proj"), kind)
            if fused is not None:
                written[f"{qkv.format(index)}.{kind}"] = fused
    return written


def _for_internvl(encoder: PreTrainedModel, image_processor: object) -> _Form:
    config = encoder.config
    problems = (
        _intern_problems(encoder)
        if config.model_type == "internvl_vision"
        else [f"its InternVisionModel is an InternViT, this is a {config.model_type}"]
    )
    _refuse_unless(
        "InternVL",
        encoder,
        problems,
        "Give it the tower of an InternVL; any other encoder goes into an InternVL made by `pivot assemble`.",
    )
    layer = getattr(config, FEATURE_LAYER, None)
    return _Form(
        _intern_blocks(dict(encoder.state_dict()), _INTERNVL, "encoder.layers.{}.attn.qkv"),
        {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "attention_dropout": config.attention_dropout,
            "drop_path_rate": 0.0,
            "dropout": config.hidden_dropout_prob,
            "hidden_act": config.hidden_act,
            "hidden_size": config.hidden_size,
            "image_size": _edge(config.image_size),
            "initializer_factor": 1.0,
            "initializer_range": config.initializer_range,
            "intermediate_size": config.intermediate_size,
            "layer_norm_eps": config.layer_norm_eps,
            "norm_type": config.norm_type,
            "num_attention_heads": config.num_attention_heads,
            "num_channels": config.num_channels,
            "num_hidden_layers": config.num_hidden_layers,
            "patch_size": _edge(config.patch_size),
            "qk_normalization": config.use_qk_norm,
            "qkv_bias": config.attention_bias,
            "torch_dtype": str(encoder.dtype).removeprefix("torch."),
            "use_flash_attn": True,
        },
        {"vision_path": "<folder>", "vision_select_layer": -1 if layer is None else layer},
        ("Read by the repository's InternVisionModel.from_pretrained.",),
    )


# LLaVA-NeXT


def _for_llava_next(encoder: PreTrainedModel, image_processor: object) -> _Form:
    config, kind = encoder.config, encoder.config.model_type
    problems = []
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        problems.append(f"its towers are CLIP and SigLIP, this is a {kind}")
    elif kind == "siglip_vision_model":
        problems += [
            f"its SigLIP class has {name} {expected} built in, this has {_edge(getattr(config, name))}"
            for name, expected in _LLAVA_NEXT_SIGLIP.items()
            if _edge(getattr(config, name)) != expected
        ]
    _refuse_unless(
        "LLaVA-NeXT", encoder, problems, "Use `pivot graft` into a LLaVA of transformers, which takes any encoder."
    )
    if kind == "clip_vision_model":
        depth = config.num_hidden_layers
        layer = _layer(encoder, depth) - depth - 1
        settings = {"vision_tower": "<folder>", "mm_vision_select_layer": layer, "mm_vision_select_feature": "patch"}
        return _Form(dict(_outer_names(encoder.state_dict())), _transformers_4_config(encoder), settings)
    return _llava_next_siglip(encoder)


def _llava_next_siglip(encoder: PreTrainedModel) -> _Form:
    """A SigLIP whose last block the other side deletes, so that what it keeps ends where the features in use end."""
    depth, used = encoder.config.num_hidden_layers, _layer(encoder, encoder.config.num_hidden_layers)
    tensors = {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if not (found := re.match(_CLIP_BLOCK, name)) or int(found[1]) <= used
    }
    if used == depth:
        last = f"encoder.layers.{depth - 1}."
        tensors |= {
            name.replace(last, f"encoder.layers.{depth}."): tensor
            for name, tensor in encoder.state_dict().items()
            if name.startswith(last)
        }
        note = f"One block more than the encoder's {depth} is written, a copy of the last, which LLaVA-NeXT deletes."
    else:
        note = f"LLaVA-NeXT deletes block {used + 1} of those written, the first behind the features in use."
    config = _transformers_4_config(encoder) | {"num_hidden_layers": used + 1}
    return _Form(
        dict(_outer_names(tensors)),
        config,
        {"vision_tower": "<Hub id with siglip in it>"},
        (
            note,
            "Its builder takes a local folder for a CLIP: put this one on the Hub under a name with 'siglip' in it.",
            "What it reads is the hidden state behind the last block it keeps, before the closing norm.",
        ),
    )


# transformers 4


def _outer_names(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"vision_model.{name}": tensor for name, tensor in tensors.items()}


def _transformers_4_config(encoder: PreTrainedModel) -> Settings:
    settings: Settings = encoder.config.to_dict()
    dtype = str(encoder.dtype).removeprefix("torch.")
    for name in ("_name_or_path", "dtype", "transformers_version"):
        settings.pop(name, None)
    return settings | {"architectures": [type(encoder).__name__], "torch_dtype": dtype}


def _for_transformers_4(encoder: PreTrainedModel, image_processor: object) -> _Form:
    kind = encoder.config.model_type
    releases = [release for release in checked_releases(kind) if release.startswith("4.")]
    problems = [] if releases else [f"no release of transformers 4 was found to read a {kind} exactly"]
    _refuse_unless("transformers 4", encoder, problems, "Read it with transformers 5: AutoModel.from_pretrained.")
    return _Form(
        # names are settled once the folder is there
        dict(encoder.state_dict()),
        _transformers_4_config(encoder),
        {"model": f"{type(encoder).__name__}.from_pretrained('<folder>')"},
        (f"Features were compared in transformers {', '.join(releases)}.",),
    )


_FORMS: dict[str, Callable[[PreTrainedModel, object], _Form]] = {
    "timm": _for_timm,
    "llava-next": _for_llava_next,
    "internvl": _for_internvl,
    "transformers-4": _for_transformers_4,
}
