"""Which rows a model cannot take, said before training: by the collators themselves, on blank images of the same sizes.

What a processor does with an image depends on its size alone, so that each size is tried once.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from PIL import Image
from transformers import ProcessorMixin

from pivot_plugin.errors import DataError, foreign_code
from pivot_plugin.models.control_text import NO_PLAIN_TEXT
from pivot_plugin.models.fingerprints import processor_fingerprint
from pivot_plugin.models.image_tokens import ImageTokens, ProcessedImages

from .images import ImageAccess
from .records import Judge

Sizes = tuple[tuple[int, int], ...]
UNFIT = "row the model cannot take"


class Collator(Protocol):
    """Turns rows into tokens."""

    image_tokens: ImageTokens

    def check(self, row: dict[str, Any], images: ProcessedImages) -> None:
        """Make sure that a row can be turned into tokens.

        Args:
            row: in the normal form, with `images` (PIL).
            images: of the row, processed.

        Raises:
            DataError: if it cannot.
        """


@dataclass
class Questions:
    """Questions that a model is asked; their tokens are TRL's affair."""

    image_tokens: ImageTokens

    def check(self, row: dict[str, Any], images: ProcessedImages) -> None:
        self.image_tokens.control_text.refuse(row, NO_PLAIN_TEXT)


@dataclass
class RowJudge:
    """Says which rows a model cannot take.

    Args:
        collator: of the run.
        every_size: whether every size of images is tried, and every row tokenised; else only rows whose text holds the
            name of a control token are, and the collator names others when it meets them.
    """

    collator: Collator
    every_size: bool
    _processed: dict[Sizes, ProcessedImages | DataError] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """A key that is equal for judges that say the same of every row."""
        settings = {
            name: value
            for name, value in vars(self.collator).items()
            if isinstance(value, str | int | float | bool | None)
        }
        described = [type(self.collator).__name__, sorted(settings.items()), self.every_size]
        processor = processor_fingerprint(self.collator.image_tokens.processor)
        return hashlib.sha256(json.dumps([described, processor], default=str).encode()).hexdigest()

    def __call__(self, row: dict[str, Any], access: ImageAccess, where: str) -> None:
        """Judge a row.

        Args:
            row: in the normal form, its images as they stand in the source.
            access: to them.
            where: names the row in errors.

        Raises:
            DataError: if the model cannot take it.
        """
        if not self.every_size and not self.collator.image_tokens.control_text.in_row(row):
            return
        sizes = tuple(access.size(source, where) for source in row["images"])
        blank = {**row, "images": [Image.new("RGB", size) for size in sizes]}
        with foreign_code(f"{where} cannot be processed", "Mend the row, or leave it out.", kind=UNFIT):
            self.collator.check(blank, self._images(sizes, blank["images"], where))

    def of_questions(self) -> "RowJudge":
        """The same judge of questions that the model is asked before there are answers to them."""
        return RowJudge(Questions(self.collator.image_tokens), self.every_size)

    def _images(self, sizes: Sizes, blank: list[Image.Image], where: str) -> ProcessedImages:
        if sizes not in self._processed:
            try:
                with foreign_code(
                    f"{where}: images of {', '.join(f'{width} x {height}' for width, height in sizes)} pixels cannot "
                    "be processed",
                    "Scale them, or leave the row out.",
                    kind=UNFIT,
                ):
                    images = self.collator.image_tokens.process_images([blank] if blank else [])
                    # the numbers of blank images are of no use
                    self._processed[sizes] = ProcessedImages({}, images.counts, images.expansions)
            except DataError as error:
                self._processed[sizes] = error
        made = self._processed[sizes]
        if isinstance(made, DataError):
            # named by the row that came first
            raise DataError(f"{where}: {made.finding.partition(': ')[2]}", made.remedy, made.kind)
        return made


def judge_of_questions(processor: ProcessorMixin) -> Judge:
    """Who says which questions a model cannot be asked.

    Args:
        processor: the model's.
    """
    return RowJudge(Questions(ImageTokens(processor)), every_size=False)
