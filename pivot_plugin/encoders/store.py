"""An encoder's folder: plain transformers files, and beside them the projector, the provenance and a card.

config.json  model.safetensors  preprocessor_config.json    what AutoModel and AutoImageProcessor read
projector.safetensors                                       the projector as trained
pivot.json                                                  where the encoder comes from, and a hash of every file
README.md                                                   the model card
saliency.png                                                where the loss looks, if it was looked at

With weights="lora" the folder is one of PEFT: adapter_config.json, adapter_model.safetensors, and the last three.
"""

import copy
import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.adapters.base import IN_BLOCKS, WHOLE_VIEW
from pivot_plugin.errors import EncoderError, ModelError, said
from pivot_plugin.files import sha256, whole_folder

from .card import CARD, PICTURE, card
from .compatibility import save_model
from .contents import PROVENANCE
from .contract import contract
from .loading import has_auto_class
from .record import FORMAT, PROJECTOR_FILE, versions, without_paths
from .signature import signature

logger = logging.getLogger(__name__)

SHARD = "5GB"


@dataclass(frozen=True)
class OnCard:
    """What the card has beside the provenance.

    Attributes:
        sections: markdown.
        picture: of saliency maps.
        usage: lines of Python that read the encoder.
    """

    sections: Sequence[str]
    picture: Image.Image | None
    usage: str = ""


def save_encoder(
    adapter: VisionAdapter,
    processor: object,
    folder: str | Path,
    provenance: Mapping[str, Any],
    *,
    sections: Sequence[str] = (),
    picture: Image.Image | None = None,
    max_shard_size: str = SHARD,
    encoder: PreTrainedModel | None = None,
) -> Path:
    """Write the vision tower of an MLLM as a stand-alone encoder.

    The folder is written aside and renamed, so that an old one stays whole until the new one is complete. Of processes
    that were launched together the main one writes; the others return at once.

    Args:
        adapter: of the MLLM.
        processor: the MLLM's, for its image processor.
        folder: to write; an encoder folder that is there already is replaced, any other folder must be empty.
        provenance: what to record beside class, path, layer, versions and hashes; paths of this machine are cut off.
        sections: markdown for the card.
        picture: of saliency maps, for the card.
        max_shard_size: of weight files, as transformers takes it.
        encoder: the tower, stand-alone; extracted where None.

    Raises:
        EncoderError: if the folder holds something else, or cannot be written.
    """
    if not _writes():
        return Path(folder)
    image_processor = adapter.image_processor(processor)
    encoder = encoder or adapter.extract()
    _note_views(adapter, encoder, image_processor)
    with _encoder_folder(Path(folder)) as aside:
        save_model(encoder, aside, max_shard_size=max_shard_size)
        image_processor.save_pretrained(aside)
        projector = {
            name: parameter.detach().cpu().contiguous().clone()
            for name, parameter in adapter.model.named_parameters()
            if adapter.part_of(name) == "projector"
        }
        save_file(projector, aside / PROJECTOR_FILE)
        facts = {"signature": _signature(encoder, image_processor), "contract": contract(encoder, image_processor)}
        added = {**facts, **provenance}
        _finish(aside, adapter, encoder, added, OnCard(sections, picture, _usage(adapter, image_processor)))
    return Path(folder)


def save_lora(
    adapter: VisionAdapter,
    config: LoraConfig,
    weights: Mapping[str, torch.Tensor],
    folder: str | Path,
    provenance: Mapping[str, Any],
    *,
    sections: Sequence[str] = (),
    picture: Image.Image | None = None,
) -> Path:
    """Write the LoRA of a vision tower as a PEFT folder for the base encoder.

    `PeftModel.from_pretrained(encoder, folder)` loads it onto the encoder that the tower was before training.

    Args:
        adapter: of the MLLM.
        config: of the LoRA.
        weights: of the LoRA, by their names in the MLLM.
        folder, provenance, sections, picture: as for `save_encoder`.

    Raises:
        EncoderError: if the tower has no LoRA, or as `save_encoder`.
    """
    if not _writes():
        return Path(folder)
    prefix = f"base_model.model.{adapter.tower_path}."
    own = {
        f"base_model.model.{name.removeprefix(prefix)}": tensor.detach().cpu().contiguous()
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }
    if not own:
        raise EncoderError(
            "The vision tower was trained without LoRA, so that there is none to save.",
            'Save the encoder itself: weights="encoder".',
        )
    targets = sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in own})
    own_config = copy.deepcopy(config)
    # as a pattern for whole names: a release that calls them otherwise finds none and says so, where by their ends it
    # would find them, and load nothing into them
    own_config.target_modules = "|".join(map(re.escape, targets))
    own_config.modules_to_save = None
    own_config.task_type = None
    own_config.base_model_name_or_path = (provenance.get("base") or {}).get("encoder")
    with _encoder_folder(Path(folder)) as aside:
        own_config.save_pretrained(aside)
        save_file(own, aside / "adapter_model.safetensors", {"format": "pt"})
        _finish(aside, adapter, adapter.tower, {"weights": "lora", **provenance}, OnCard(sections, picture))
    return Path(folder)


def _writes() -> bool:
    """Whether this process writes: transformers writes weights in the main one alone, of those launched together."""
    return not PartialState._shared_state or PartialState().is_main_process


def _signature(encoder: PreTrainedModel, image_processor: object) -> dict[str, Any] | None:
    """The encoder's signature; None, with a warning, for one that cannot be read by itself."""
    try:
        return signature(encoder, image_processor)
    # an encoder of a foreign family may want what a plain call does not give; its weights are paid for
    except Exception as error:
        logger.warning(
            "%s cannot be read by itself, so that `pivot verify` will have no features to compare: %s: %s",
            *(type(encoder).__name__, type(error).__name__, error),
        )
        return None


def _described(adapter: VisionAdapter, encoder: PreTrainedModel) -> dict[str, Any]:
    unread, blocks = adapter.unread_paths(), adapter.blocks()
    heads = [path for path in unread if path.rpartition(".")[2] in adapter.unread_names]
    return {
        "format": FORMAT,
        "weights": "encoder",
        "family": adapter.family,
        "encoder_class": type(encoder).__name__,
        "encoder_package": _package(encoder),
        "mllm_class": type(adapter.model).__name__,
        "tower_path": adapter.tower_path,
        "feature_layer": adapter.feature_layer,
        "blocks": len(blocks),
        "unread": list(unread),
        "heads": heads,
        "projector_first_layer": adapter.projector_first_layer,
        "versions": versions(),
    }


def _package(encoder: PreTrainedModel) -> str | None:
    """The package of transformers.models that an encoder's class is of; None for a class of others."""
    parts = type(encoder).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] else None


def _finish(
    aside: Path,
    adapter: VisionAdapter,
    encoder: PreTrainedModel,
    provenance: Mapping[str, Any],
    on_card: OnCard,
) -> None:
    """Write what stands beside the weights."""
    record = without_paths(_described(adapter, encoder) | dict(provenance))
    if on_card.picture is not None:
        on_card.picture.save(aside / PICTURE)
    # of everything but the record itself and the card, whose words people change
    record["sha256"] = {path.name: sha256(path) for path in sorted(aside.iterdir())}
    (aside / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    written = card(
        record,
        on_card.usage,
        None if has_auto_class(encoder) else type(encoder).__module__,
        sections=on_card.sections,
        picture=on_card.picture is not None,
    )
    (aside / CARD).write_text(str(written), encoding="utf-8")


def _note_views(adapter: VisionAdapter, encoder: PreTrainedModel, image_processor: object) -> None:
    """Have an encoder's configuration say what its image processor's outputs do not: the whole view, the order."""
    alone = copy.copy(adapter)
    try:
        alone.read_processor(image_processor)
    except ModelError as error:
        # its weights are paid for
        logger.warning("Which view of an image shows the whole is not recorded. %s", error)
    for name, value in ((WHOLE_VIEW, alone.whole_view), (IN_BLOCKS, alone.in_blocks)):
        if value is not None:
            setattr(encoder.config, name, value)


def _usage(adapter: VisionAdapter, image_processor: object | None) -> str:
    """The adapter's lines for the card; those of older adapters know nothing of the image processor."""
    if image_processor is not None and inspect.signature(adapter.usage).parameters:
        return adapter.usage(image_processor)
    return adapter.usage()


@contextmanager
def _encoder_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of an encoder's folder when all went well."""
    if folder.exists() and any(folder.iterdir()) and not (folder / PROVENANCE).exists():
        raise EncoderError(
            f"Folder {str(folder)!r} is not empty and holds no encoder of ours.", "Choose another folder, or empty it."
        )
    try:
        with whole_folder(folder) as aside:
            yield aside
    except OSError as error:
        raise EncoderError(
            f"{str(folder)!r} cannot be written: {said(error)}.",
            "What was there before is unchanged; choose another folder, or make room and repeat.",
        ) from error
