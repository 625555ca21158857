"""The vision tower of any MLLM as an encoder's folder, and how far it is from the tower it began as."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from pivot_plugin.errors import EncoderError, ModelError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import load_model
from pivot_plugin.models.merging import base_model, base_of, is_lora, merge

from .card import licence_of
from .loading import load_encoder
from .record import plain_name, read_provenance
from .store import save_encoder
from .towers import extract_encoder

NOT_IN_BLOCKS = "embeddings and norms"


@dataclass(frozen=True)
class TowerChange:
    """How far a tower is from another of the same class.

    Attributes:
        parts: by block, in order, the length of the difference of its weights relative to their length; what stands in
            no block under "embeddings and norms".
    """

    parts: Mapping[str, float]

    @property
    def trained(self) -> bool:
        """Whether a single weight is another one."""
        return any(change > 0 for change in self.parts.values())

    def __str__(self) -> str:
        if not self.trained:
            return "This checkpoint's tower was never trained: every weight of it is its base's."
        lines = [f"  {name:<22} {change:.3g}" for name, change in self.parts.items()]
        return "\n".join(["Change of the weights, relative to their length:", *lines])


@dataclass(frozen=True)
class Extraction:
    """What was taken out of an MLLM.

    Attributes:
        folder: of the encoder.
        encoder: the tower, stand-alone.
        change: from the base it was compared with; None where there was none.
    """

    folder: Path
    encoder: PreTrainedModel = field(repr=False)
    change: TowerChange | None = None


def extract(
    model: PreTrainedModel | PeftModel | str | Path,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    processor: Any = None,
) -> Extraction:
    """Write the vision tower of an MLLM as an encoder's folder.

    Args:
        model: loaded, or a folder or Hub id, whoever trained it; an adapter (LoRA) is merged first, in a copy.
        folder: to write; an encoder's folder that is there already is replaced, any other must be empty.
        base: folder or Hub id of the MLLM or the encoder from which training began, to compare with.
        processor: of a loaded model; found by where it comes from where None.

    Raises:
        ModelError: if the model or its base cannot be loaded, an adapter does not fit, or the tower is quantised.
        EncoderError: if the base's tower is another one, or the folder holds something else.
    """
    name, loaded = _name(model), model
    if isinstance(model, str | Path):
        encoder_lora = is_lora(model) and _is_of_encoder(model)
        if encoder_lora:
            return _extracted_lora(model, Path(folder), base)
        loaded, processor = load_model(model, processor)
    elif processor is None:
        _, processor = load_model(base_model(model), None)
    adapter = find_adapter(base_model(loaded))  # type: ignore[arg-type]
    encoder = extract_encoder(loaded)  # type: ignore[arg-type]
    change = tower_change(encoder, tower_of(base)) if base is not None else None
    record = _record(name, base, change)
    save_encoder(adapter, processor, folder, record, encoder=encoder)
    return Extraction(Path(folder), encoder, change)


def tower_of(source: str | Path) -> PreTrainedModel:
    """The tower of an MLLM, or an encoder as it is.

    Args:
        source: folder or Hub id of either.

    Raises:
        ModelError, EncoderError: if there is none.
    """
    if not is_lora(source):
        try:
            config = AutoConfig.from_pretrained(source)
        # of another repository, or nothing, or broken: whoever loads it says so
        except Exception:
            config = None
        if config is not None and type(config) not in AutoModelForImageTextToText._model_mapping:
            return load_encoder(source)
    return extract_encoder(source)


@torch.no_grad()
def tower_change(encoder: PreTrainedModel, base: PreTrainedModel) -> TowerChange:
    """How far an encoder's weights are from those of the one it began as.

    The base is rounded to the encoder's precision first, so that saving in fewer digits is no change.

    Args:
        encoder, base: stand-alone, of one class and size.

    Raises:
        EncoderError: if they are not, with what differs.
    """
    ours, theirs = encoder.state_dict(), base.state_dict()
    shapes, expected = ({name: tuple(t.shape) for name, t in state.items()} for state in (ours, theirs))
    if type(encoder) is not type(base) or shapes != expected:
        differing = sorted(name for name in {**shapes, **expected} if shapes.get(name) != expected.get(name))
        first = f", the first {differing[0]!r}" if differing else ""
        raise EncoderError(
            f"The base's tower is another one: a {type(base).__name__} where this is a {type(encoder).__name__}, with "
            f"{len(differing)} tensors of another name or size{first}.",
            "Give the MLLM or encoder that training began with.",
        )
    blocks = [path.lstrip(".") for path in find_adapter(encoder, encoder=True).blocks()]
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in (*blocks, NOT_IN_BLOCKS)}
    for name, tensor in ours.items():
        part = next((block for block in blocks if name.startswith(f"{block}.")), NOT_IN_BLOCKS)
        before = theirs[name].to(device=tensor.device, dtype=tensor.dtype).double()
        sums[part][0] += (tensor.double() - before).square().sum().item()
        sums[part][1] += before.square().sum().item()
    return TowerChange({name: (apart / max(length, 1e-300)) ** 0.5 for name, (apart, length) in sums.items()})


def _name(model: object) -> str:
    return plain_name(model if isinstance(model, str | Path) else getattr(base_model(model), "name_or_path", ""))  # type: ignore[arg-type]


def _record(name: str, base: str | Path | None, change: TowerChange | None) -> dict[str, Any]:
    record: dict[str, Any] = {"base": {"mllm": name}, "license": licence_of(name)}
    if base is not None and change is not None:
        record |= {"compared_with": plain_name(base), "change": dict(change.parts)}
    return record


def _is_of_encoder(source: str | Path) -> bool:
    """Whether an adapter was saved by this package, for an encoder by itself."""
    return Path(source).is_dir() and read_provenance(Path(source)).get("weights") == "lora"


def _extracted_lora(source: str | Path, folder: Path, base: str | Path | None) -> Extraction:
    """An encoder's own LoRA, merged into the encoder it is of."""
    name = base_of(source)[1]
    try:
        encoder, image_processor = load_encoder(name, with_processor=True)
    except EncoderError as error:
        raise ModelError(
            f"The base of the adapter in {str(source)!r} cannot be had: {error.finding}",
            "Download it, or write where it is as base_model_name_or_path into adapter_config.json.",
        ) from error
    layer = read_provenance(Path(source)).get("feature_layer")
    encoder.config.vision_feature_layer = layer
    encoder = merge(encoder, source).eval()
    change = tower_change(encoder, tower_of(base)) if base is not None else None
    processor = SimpleNamespace(image_processor=image_processor)
    record = _record(plain_name(name), base, change)
    save_encoder(find_adapter(encoder, encoder=True), processor, folder, record, encoder=encoder)
    return Extraction(folder, encoder, change)
