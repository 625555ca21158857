"""An encoder as other software reads it: file names, tensor names and settings of timm, LLaVA-NeXT and InternVL.

Each target is one function, in a file of its own, from an encoder to tensors and settings, or a refusal with every
reason for which the target cannot hold this tower. What the other side has to be told beside the folder stands in
`export.json` and is returned.

    timm             a folder for timm.create_model("local-dir:<folder>", pretrained=True)
    llava-next       what LLaVA, LLaVA-NeXT and the PIVOT authors' code take as --vision_tower
    internvl         the repository's own InternVisionModel, for --vision_path
    transformers-4   a folder that AutoModel of transformers 4 reads

With `like`, a checkpoint of LLaVA-NeXT's or InternVL's, the whole of it is written, in its own form.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import save_file
from transformers import PreTrainedModel

from pivot_plugin.choices import ExportTarget
from pivot_plugin.errors import SettingsError, unknown
from pivot_plugin.files import whole_folder
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import is_mllm, load_model
from pivot_plugin.models.writing import write_like

from ..compatibility import rewrite_for_every_release
from ..loading import load_encoder
from ..record import origin_of
from ..towers import graft, image_processor_of
from .form import Form
from .internvl import for_internvl
from .llava_next import for_llava_next
from .timm import for_timm
from .transformers_4 import for_transformers_4

EXPORT_FILE = "export.json"
_FORMS: dict[str, Callable[[PreTrainedModel, object], Form]] = {
    "timm": for_timm,
    "llava-next": for_llava_next,
    "internvl": for_internvl,
    "transformers-4": for_transformers_4,
}
# those in which a whole MLLM can be written
_OF_REPOSITORIES: tuple[ExportTarget, ...] = ("llava-next", "internvl")


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


def export(
    encoder: PreTrainedModel | str | Path,
    target: ExportTarget,
    folder: str | Path,
    *,
    image_processor: object | None = None,
    like: str | Path | None = None,
) -> Exported:
    """Write an encoder as timm, LLaVA-NeXT, InternVL or transformers 4 reads it.

    Args:
        encoder: loaded, or its folder or Hub id; with `like` also a whole MLLM.
        target: "timm", "llava-next", "internvl" or "transformers-4".
        folder: to write; must be empty or absent.
        image_processor: of a loaded encoder; found by where it comes from where None.
        like: folder or Hub id of a checkpoint of LLaVA-NeXT's or InternVL's form. What is written is this whole
            checkpoint, with the encoder in place of its tower, or with all weights of the MLLM that was read from it.

    Returns:
        the folder and what the other side has to be told.

    Raises:
        EncoderError: if the target cannot hold this tower, with every reason; nothing is written then.
        ModelError: if the checkpoint is not of the target's form, or the MLLM is not of the checkpoint's.
        SettingsError: for an unknown target, or a folder that holds something.
    """
    if target not in _FORMS:
        raise unknown("export target", target, get_args(ExportTarget))
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"Folder {str(folder)!r} is not empty.", "Choose another folder, or empty it.")
    if like is not None:
        return _whole_checkpoint(encoder, target, folder, like)
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
            rewrite_for_every_release(aside)
        origin = origin_of(encoder)
        told = {"target": target, "settings": form.settings, "notes": form.notes}
        _write(aside / EXPORT_FILE, told | {"encoder": origin.name if origin else None})
    return Exported(folder, target, form.settings, form.notes)


def _whole_checkpoint(
    source: PreTrainedModel | str | Path, target: ExportTarget, folder: Path, like: str | Path
) -> Exported:
    """A checkpoint of another repository with other weights: an encoder's in its tower, or those of a whole MLLM."""
    if target not in _OF_REPOSITORIES:
        raise SettingsError(
            f"A checkpoint is given for {target} to be written like, and {target} has no MLLMs of its own form.",
            f"Leave it out, or choose {' or '.join(map(repr, _OF_REPOSITORIES))}.",
        )
    if isinstance(source, str | Path) and is_mllm(source):
        source, _ = load_model(source)
    if not isinstance(source, str | Path) and find_adapter(source, encoder=True).tower_path:
        model, what = source, "all weights"
    else:
        model, _ = load_model(like)
        graft(model, load_encoder(source) if isinstance(source, str | Path) else source)
        what = "the vision tower"
    write_like(model, like, folder, target)
    note = f"The whole checkpoint, {what} replaced; its configuration, tokenizer and code are those of {like}."
    return Exported(folder, target, {"model_name_or_path": "<folder>"}, (note,))


def _write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
