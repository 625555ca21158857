"""What a probe examines: an encoder by itself, or with the MLLM around it."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.encoders import load_encoder
from pivot_plugin.encoders.contents import PROVENANCE
from pivot_plugin.encoders.loading import image_processor_in
from pivot_plugin.errors import EncoderError, ModelError
from pivot_plugin.files import RUN_FILE
from pivot_plugin.models.find import check_processor, find_adapter
from pivot_plugin.models.loading import from_plugins, load_model


@dataclass(frozen=True)
class Subject:
    """An encoder to be examined.

    Attributes:
        name: shown in tables.
        adapter: of the MLLM's family, or of the encoder's where it stands alone.
        image_processor: gives one view of the whole image, in the size the encoder takes.
        processor: the MLLM's; None for an encoder by itself.
    """

    name: str
    adapter: VisionAdapter
    image_processor: Any
    processor: ProcessorMixin | None = None

    @property
    def is_mllm(self) -> bool:
        """Whether there is a language model behind the encoder."""
        return self.processor is not None

    @property
    def model(self) -> PreTrainedModel:
        """The MLLM, or the encoder by itself."""
        return self.adapter.model

    def mllm(self, purpose: str) -> tuple[PreTrainedModel, ProcessorMixin]:
        """The MLLM and its processor.

        Args:
            purpose: what needs them, as the beginning of a sentence.

        Raises:
            ModelError: for an encoder by itself.
        """
        if self.processor is None:
            raise ModelError(
                f"{purpose} needs an MLLM, and {self.name} is an encoder by itself.",
                "Give the MLLM, or one to graft the encoder into (mllm=).",
            )
        return self.model, self.processor


def subject(
    examined: object, processor: object | None = None, name: str | None = None, mllm: object | None = None
) -> Subject:
    """Whatever has an encoder, ready to be examined.

    Args:
        examined: an MLLM or an encoder, loaded or by folder or Hub id; the folder of a run; or a `PivotResult`.
        processor: of a loaded MLLM, or the image processor of a loaded encoder; found by name where None.
        name: shown in tables; made of the folder or class where None.
        mllm: a `Subject` with the MLLM into a copy of which an encoder is grafted.

    Raises:
        ModelError, EncoderError: if it cannot be loaded, or its parts do not belong together.
    """
    if isinstance(examined, Subject):
        return examined
    name = name or name_of(examined)
    if hasattr(examined, "adapter") and hasattr(examined, "processor"):
        # a PivotResult
        examined, processor = examined.adapter.model, processor or getattr(examined, "processor", None)
    if isinstance(examined, str | Path):
        examined, processor = _loaded(examined, processor)
    elif (foreign := from_plugins(examined, processor)) is not None:
        examined, processor = foreign
    if not isinstance(examined, PreTrainedModel):
        raise ModelError(
            f"{name} is a {type(examined).__name__}, which holds no encoder.",
            "Give a model, the folder or Hub id of one, the folder of a run, or the result of one.",
        )
    loaded: PreTrainedModel = examined
    adapter = find_adapter(loaded, encoder=True)
    if adapter.tower_path and not loaded.can_generate():
        # a dual encoder such as CLIP or SigLIP: the half that sees
        processor = processor or _image_processor(loaded.name_or_path, loaded)
        loaded = adapter.tower
        adapter = find_adapter(loaded, encoder=True)
    if adapter.tower_path:
        model, full = load_model(loaded, processor if isinstance(processor, ProcessorMixin) else None)
        check_processor(model, full, adapter)
        return Subject(name, adapter, adapter.image_processor(full), full)
    if isinstance(mllm, Subject):
        return _grafted(name, loaded, mllm)
    if isinstance(processor, ProcessorMixin):
        processor = processor.image_processor
    return Subject(name, adapter, processor or _image_processor(loaded.name_or_path, loaded))


def _grafted(name: str, encoder: PreTrainedModel, mllm: Subject) -> Subject:
    """An encoder in a copy of an MLLM."""
    model, processor = mllm.mllm("Grafting")
    adapter = find_adapter(copy.deepcopy(model))
    adapter.graft(encoder)
    return Subject(name, adapter, adapter.image_processor(processor), processor)


def _loaded(path: str | Path, processor: object | None) -> tuple[PreTrainedModel, object]:
    folder = Path(path)
    if (folder / RUN_FILE).is_file():
        folder = folder / "encoder"
        if not folder.is_dir():
            raise EncoderError(f"The run in {str(path)!r} has no encoder yet.", "Let it finish: resume=True goes on.")
    if _is_encoder(folder):
        encoder = load_encoder(folder)
        return encoder, processor or _image_processor(str(folder), encoder)
    folder_or_id = folder if folder.is_dir() else str(path)
    try:
        return load_model(folder_or_id, processor if isinstance(processor, ProcessorMixin) else None)
    except ModelError as as_mllm:
        try:
            encoder = load_encoder(folder_or_id)
        except EncoderError as as_encoder:
            raise ModelError(
                f"{str(path)!r} is neither an MLLM nor an encoder: {as_mllm.finding} {as_encoder.finding}",
                "Check the path or the id.",
            ) from as_encoder
        return encoder, processor or _image_processor(str(folder_or_id), encoder)


def _is_encoder(folder: Path) -> bool:
    if (folder / PROVENANCE).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    # an MLLM's configuration has one for each part, or that of its language model with a vocabulary
    return not {"text_config", "vision_config", "vocab_size"} & set(config)


def _image_processor(name: str, encoder: PreTrainedModel) -> object:
    try:
        return image_processor_in(name)
    except EncoderError as error:
        raise ModelError(
            f"No image processor was given for {type(encoder).__name__}, and none could be loaded from {name!r}.",
            "Pass processor=AutoImageProcessor.from_pretrained(...).",
        ) from error


def name_of(examined: object) -> str:
    """What something to be examined is called in tables."""
    if isinstance(examined, str | Path):
        path = Path(examined)
        # the encoder of a run is known by the run
        return path.parent.name if path.name == "encoder" and path.parent.name else str(examined).rstrip("/")
    folder = getattr(examined, "output_dir", None)
    if folder is not None:
        return Path(folder).name
    path_or_id = getattr(examined, "name_or_path", "")
    return Path(path_or_id).name if path_or_id else type(examined).__name__
