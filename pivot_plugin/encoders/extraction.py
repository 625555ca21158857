"""The vision tower of any MLLM as an encoder's folder, and how far it is from the tower it began as."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from pivot_plugin.errors import EncoderError, ModelError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import is_mllm, load_model
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
        left_out: how many tensors of the base have no counterpart in the tower, as behind the blocks that an MLLM
            does not keep.
    """

    parts: Mapping[str, float]
    left_out: int = 0

    @property
    def trained(self) -> bool:
        """Whether a single weight is another one."""
        return any(change > 0 for change in self.parts.values())

    def __str__(self) -> str:
        beside = f"{self.left_out} tensors of the base are not in this tower, which keeps fewer blocks or no head."
        notes = [beside] if self.left_out else []
        if not self.trained:
            return "\n".join(["This checkpoint's tower was never trained: every weight of it is its base's.", *notes])
        lines = [f"  {name:<22} {change:.3g}" for name, change in self.parts.items()]
        return "\n".join(["Change of the weights, relative to their length:", *lines, *notes])


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
        model: loaded, or a folder or Hub id, whoever trained it; an adapter (LoRA) is merged first, in a copy. An
            object of another repository that a plugin knows too.
        folder: to write; an encoder's folder that is there already is replaced, any other must be empty.
        base: folder or Hub id of the MLLM or the encoder from which training began, to compare with.
        processor: of a loaded model, or the tokenizer of another repository's object; found by where the model comes
            from where None.

    Raises:
        ModelError: if the model or its base cannot be loaded, an adapter does not fit, or the tower is quantised.
        EncoderError: if the base's tower is another one, or the folder holds something else.
    """
    source, loaded = _source(model), model
    if isinstance(model, str | Path):
        encoder_lora = is_lora(model) and _is_of_encoder(model)
        if encoder_lora:
            return _extracted_lora(model, Path(folder), base)
        loaded, processor = load_model(model, processor)
    elif not isinstance(model, PeftModel):
        loaded, processor = load_model(model, processor)
    elif processor is None:
        _, processor = load_model(base_model(model), None)
    adapter = find_adapter(base_model(loaded))  # type: ignore[arg-type]
    encoder = extract_encoder(loaded)  # type: ignore[arg-type]
    change = tower_change(encoder, tower_of(base)) if base is not None else None
    record = _record(source, base, change)
    save_encoder(adapter, processor, folder, record, encoder=encoder)
    return Extraction(Path(folder), encoder, change)


def tower_of(source: str | Path) -> PreTrainedModel:
    """The tower of an MLLM, or an encoder as it is.

    Args:
        source: folder or Hub id of either.

    Raises:
        ModelError, EncoderError: if there is none.
    """
    return extract_encoder(source) if is_mllm(source) else load_encoder(source)


@torch.no_grad()
def tower_change(encoder: PreTrainedModel, base: PreTrainedModel) -> TowerChange:
    """How far an encoder's weights are from those of the one it began as.

    The base is rounded to the encoder's precision first, so that saving in fewer digits is no change.

    Args:
        encoder, base: stand-alone, of one class and width; the base may have more, as the blocks that LLaVA-NeXT
            deletes.

    Raises:
        EncoderError: if they are not, with what differs.
    """
    ours, theirs = encoder.state_dict(), base.state_dict()
    shapes, expected = ({name: tuple(t.shape) for name, t in state.items()} for state in (ours, theirs))
    differing = sorted(name for name in shapes if shapes[name] != expected.get(name))
    if type(encoder) is not type(base) or differing:
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
    parts = {name: (apart / max(length, 1e-300)) ** 0.5 for name, (apart, length) in sums.items()}
    return TowerChange(parts, len(theirs.keys() - ours.keys()))


def _source(model: object) -> str:
    return str(model if isinstance(model, str | Path) else getattr(base_model(model), "name_or_path", ""))  # type: ignore[arg-type]


def _record(source: str, base: str | Path | None, change: TowerChange | None) -> dict[str, Any]:
    # of a folder its plain name is recorded, and its licence read there: the Hub is not asked for a folder's name
    record: dict[str, Any] = {
        "extracted": True,
        "base": {"mllm": plain_name(source)},
        "license": licence_of(source),
    }
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
    record = read_provenance(Path(source))
    encoder.config.vision_feature_layer = record.get("feature_layer")
    encoder = merge(encoder, source, (record.get("base") or {}).get("adapted_weights")).eval()
    change = tower_change(encoder, tower_of(base)) if base is not None else None
    processor = SimpleNamespace(image_processor=image_processor)
    written = _record(name, base, change)
    save_encoder(find_adapter(encoder, encoder=True), processor, folder, written, encoder=encoder)
    return Extraction(folder, encoder, change)
