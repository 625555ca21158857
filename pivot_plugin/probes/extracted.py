"""Whether a checkpoint's tower got better, asked of the tower alone: taken out of the MLLM, and then examined.

What an MLLM answers better may be its language model's doing. The encoder that is written here has nothing of that, so
that probes on features see what anyone sees who takes the tower elsewhere. Probes that need an MLLM ask the whole.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from PIL import Image
from transformers import PreTrainedModel

from pivot_plugin.data.conversations import ConversationDataset, load_conversations
from pivot_plugin.data.layout import text_of
from pivot_plugin.encoders.extraction import TowerChange, extract, tower_change
from pivot_plugin.errors import DataError, EncoderError

from . import subjects
from .lookup import ProbeTask
from .neighbours import Captioned
from .subjects import Subject

logger = logging.getLogger(__name__)

NO_NAME = re.compile(r"[^\w.-]+")


class Towers:
    """Encoders that are taken out of what is compared, one by one; the first is what the others are held against.

    Args:
        folder: gets a folder for each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._base: PreTrainedModel | None = None
        self._count = 0
        self.changes: dict[str, TowerChange] = {}

    def of(self, subject: Subject) -> Subject:
        """The tower of an MLLM as an encoder by itself; an encoder as it is.

        Args:
            subject: to be taken apart; it stays whole.

        Raises:
            EncoderError, ModelError: if its tower cannot stand alone.
        """
        encoder = subject
        if subject.is_mllm:
            model, processor = subject.mllm("Extraction")
            place = self._folder / f"{self._count}-{NO_NAME.sub('-', subject.name)[-60:].strip('-.')}"
            extract(model, place, processor=processor)
            encoder = subjects.subject(place, name=subject.name)
        self._count += 1
        if self._base is None:
            self._base = encoder.model
            return encoder
        try:
            self.changes[subject.name] = tower_change(encoder.model, self._base)
        except EncoderError as error:
            logger.warning(
                "The tower of %s is compared by its scores alone, and not by its weights: %s",
                subject.name,
                error.finding,
            )
        return encoder


def said_of_change(name: str, base: str, change: TowerChange) -> str:
    """A sentence about how far a tower is from the first one's.

    Args:
        name, base: of the two in tables.
        change: between them.
    """
    if not change.trained:
        return f"The tower of {name} was never trained: every weight of it is that of {base}."
    part, most = max(change.parts.items(), key=lambda item: item[1])
    return f"The weights of the tower of {name} are up to {100 * most:.3g} % of their length from {base}'s ({part})."


def tower_probes(probes: Mapping[str, object], first: Subject) -> dict[str, object]:
    """Probes as given, with what belongs to them where towers are compared.

    The data of the linear probe serve the knn probe too, which fits nothing; and rows with captions serve RAVEL with
    the first one's language model, which is the one that the tower was trained for.

    Args:
        probes: as for `compare`.
        first: what the others are held against.

    Raises:
        DataError: for captions, if the first is no MLLM.
    """
    found: dict[str, object] = {}
    for label, probe in probes.items():
        task = probe if isinstance(probe, ProbeTask) else ProbeTask(label, probe)
        if task.probe in ("ravel", "alignment") and not callable(probe) and not isinstance(task.data, Captioned):
            found[label] = replace(task, data=_captioned(task.data, first))
            continue
        found[label] = probe
    named = {probe.probe if isinstance(probe, ProbeTask) else label for label, probe in found.items()}
    if "linear" in named and "knn" not in named:
        label = next(label for label, probe in found.items() if "linear" in (label, getattr(probe, "probe", None)))
        linear = found[label]
        found["knn"] = ProbeTask("knn", linear.data if isinstance(linear, ProbeTask) else linear)
    return found


def _captioned(rows: object, first: Subject) -> Captioned:
    if not first.is_mllm:
        raise DataError(
            f"Captions are given as a {type(rows).__name__}, and {first.name}, the first that is compared, is an "
            "encoder by itself.",
            "Give probes.Captioned, with a language model, or an MLLM first.",
        )
    model, processor = first.mllm("RAVEL")
    captions = load_conversations(rows, name="captions").verify()
    texts = [text_of(captions.plain(position)["messages"][-1:]) for position in range(len(captions))]
    return Captioned(_Pictures(captions), texts, model.get_decoder(), processor.tokenizer)


class _Pictures(Sequence[Any]):
    """The first image of each row, opened when it is asked for."""

    def __init__(self, rows: ConversationDataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, position: int) -> Image.Image: ...
    @overload
    def __getitem__(self, position: slice) -> list[Image.Image]: ...
    def __getitem__(self, position: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        images: list[Image.Image] = self._rows[position]["images"]
        if not images:
            raise DataError(f"{self._rows.where(position)} has a caption and no image.", "Leave the row out.")
        return images[0]
