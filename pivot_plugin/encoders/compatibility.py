"""One folder for the releases of three years: under which names and settings a saved model is read everywhere.

Within transformers 5 the module `vision_model` inside CLIP's and SigLIP's vision classes went away, and with it the
first word of all their tensors' names. Releases from then on read both names; those before know the old ones alone, and
fill a model whose names they do not know with random weights and a warning. Rotary settings moved likewise, from
`rope_theta` and `rope_scaling` to `rope_parameters`; a release before that does not look there and takes its default
instead. So the old names are written for tensors, and both forms for settings.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pivot_plugin.errors import EncoderError
from pivot_plugin.files import write_whole

from .contents import read_header

CHECKED: dict[str, tuple[str, ...]] = {
    "clip_vision_model": ("4.37.2", "4.57.6", "5.0.0", "5.8.0", "5.24.0"),
    "siglip_vision_model": ("4.37.2", "4.57.6", "5.0.0", "5.8.0", "5.24.0"),
    "siglip2_vision_model": ("4.57.6", "5.0.0", "5.8.0", "5.24.0"),
    "internvl_vision": ("4.57.6", "5.0.0", "5.8.0", "5.24.0"),
    "qwen2_vl_vision": ("4.57.6", "5.0.0", "5.8.0", "5.24.0"),
    "qwen2_5_vl_vision": ("4.57.6", "5.0.0", "5.8.0", "5.24.0"),
    "qwen3_vl_vision": ("4.57.6", "5.0.0", "5.8.0", "5.24.0"),
}
"""By the encoder's model type, releases of transformers in which its features were compared with ours, and were equal
to 1e-5 in float32. `make test-releases` makes sure that this is so."""

_QWEN_NOTES = (
    "4.57.6 answers with the output of the merger alone, which is equal too",
    "where AutoModel does not know this tower, as before 5.23, its class is in transformers.models",
)
RELEASE_NOTES: dict[str, tuple[str, ...]] = {
    "siglip_vision_model": ("4.37.2 puts a pooling head of its own, of random weights, behind one that has none",),
    "internvl_vision": ("4.57.6 does not give hidden states, only its output",),
    "qwen2_vl_vision": _QWEN_NOTES,
    "qwen2_5_vl_vision": _QWEN_NOTES,
    "qwen3_vl_vision": _QWEN_NOTES,
}
"""By model type, what is other in a release that was checked."""

# vision classes that had a module `vision_model` around everything: what stands directly in it
_INNER: dict[str, tuple[str, ...]] = {
    "clip_vision_model": ("embeddings", "pre_layrnorm", "encoder", "post_layernorm"),
    "siglip_vision_model": ("embeddings", "encoder", "post_layernorm", "head"),
    "siglip2_vision_model": ("embeddings", "encoder", "post_layernorm", "head"),
}
_WRAPPER = "vision_model."
# where an MLLM has its tower, by the names in its file
_TOWER = r"(?:|.*\.)vision_tower\."
# configurations that are not of a language model: releases before 5 have no rotary settings in them
_NOT_TEXT = frozenset({"vision_config", "audio_config", "qformer_config", "generation_config"})


def checked_releases(model_type: object) -> tuple[str, ...]:
    """Releases of transformers in which encoders of a type were compared with ours; none for a type of a plugin.

    Args:
        model_type: of the encoder's configuration.
    """
    return CHECKED.get(str(model_type), ())


def save_model(model: PreTrainedModel, folder: str | Path, **options: Any) -> None:
    """Write a model, an encoder or an MLLM, so that every release that knows its class reads it.

    Args:
        model: to write.
        folder: to write into.
        options: of transformers' `save_pretrained`.
    """
    model.save_pretrained(folder, **options)
    rewrite_for_every_release(folder)


def rewrite_for_every_release(folder: str | Path) -> None:
    """Give a folder that `save_pretrained` wrote the names and settings that every release reads.

    Safe to repeat. Only headers of weight files change, so that tensors are copied byte by byte.

    Args:
        folder: of an encoder or an MLLM, with its weights as safetensors.

    Raises:
        EncoderError: for a folder without a configuration, or with a weight file that is cut off.
    """
    folder = Path(folder)
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{str(folder)!r} has no config.json that can be read: {error}", "Save it again.") from error
    rename = renaming(config)
    if rename is not None:
        for weights in sorted(folder.glob("model*.safetensors")):
            rename_tensors(weights, rename)
        for index in sorted(folder.glob("model*.safetensors.index.json")):
            listed = json.loads(index.read_text(encoding="utf-8"))
            listed["weight_map"] = {rename(name): part for name, part in listed["weight_map"].items()}
            _write(index, listed)
    rewritten = with_both_rotary_forms(config)
    if rewritten != config:
        _write(file, rewritten)


def renaming(config: dict[str, Any]) -> Callable[[str], str] | None:
    """How tensors of a saved model are to be called; None where names are the same in every release.

    Args:
        config: of the encoder or MLLM, as `config.json` has it.

    Returns:
        from a name to the one that every release reads; a name that is so already stays.
    """
    vision = config.get("vision_config")
    if (inner := _INNER.get(str(config.get("model_type")))) is not None:
        before = ""
    elif isinstance(vision, dict) and (inner := _INNER.get(str(vision.get("model_type")))) is not None:
        before = _TOWER
    else:
        return None
    pattern = re.compile(f"({before})(?=(?:{'|'.join(inner)})[.])")

    def rename(name: str) -> str:
        found = pattern.match(name)
        return f"{found[1]}{_WRAPPER}{name[found.end() :]}" if found else name

    return rename


def rename_tensors(file: Path, rename: Callable[[str], str]) -> None:
    """Rename the tensors of a safetensors file; their bytes stay.

    Args:
        file: to change; replaced as a whole.
        rename: from old names to new ones.

    Raises:
        EncoderError: if the file is cut off, or two tensors would have one name.
    """
    header, start = read_header(file)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    renamed = {rename(name): entry for name, entry in tensors.items()}
    if len(renamed) != len(tensors):
        raise EncoderError(
            f"{file.name} has tensors under their old and their new names at once.", "Save the model again."
        )
    if renamed.keys() == tensors.keys():
        return
    metadata = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    encoded = json.dumps({**metadata, **renamed}, separators=(",", ":")).encode()
    # data begins at a multiple of eight
    encoded += b" " * (-len(encoded) % 8)

    def copy(aside: Path) -> None:
        with file.open("rb") as source, aside.open("wb") as target:
            target.write(len(encoded).to_bytes(8, "little") + encoded)
            source.seek(start)
            shutil.copyfileobj(source, target, 1 << 24)

    write_whole(file, copy)


def with_both_rotary_forms(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose language models have their rotary settings also where releases before 5 look for them.

    Args:
        config: as `config.json` has it; not changed.
    """
    rewritten = {
        name: with_both_rotary_forms(value) if isinstance(value, dict) and name not in _NOT_TEXT else value
        for name, value in config.items()
    }
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return rewritten
    if isinstance(rope.get("full_attention"), dict):
        # Gemma 3's: one set of settings for each kind of layer
        local = rope.get("sliding_attention") or {}
        rewritten |= {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        rope = rope["full_attention"]
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.get("rope_type", "default")
    rewritten |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    # `type` is what `rope_type` was called at first; without any other setting there is nothing to scale
    more = kind != "default" or len(scaling.keys() - {"rope_type", "type"}) > 0
    return rewritten | {"rope_scaling": {**scaling, "rope_type": kind, "type": kind} if more else None}


def _write(file: Path, value: object) -> None:
    write_whole(file, json.dumps(value, indent=2) + "\n")
