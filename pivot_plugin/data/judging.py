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

from .images import ImageAccess, image_set_key
from .records import Judge

Sizes = tuple[tuple[int, int], ...]
UNFIT = "row the model cannot take"
LACKING = "no rejected images"
WHY = "the objective holds pictures against each other"
REMEDY = (
    "Give rows a column rejected_images that shows something else, have them made (rejected_images='other_picture', or "
    "another maker), leave these rows out, or choose another objective."
)


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
    """Questions that a model is asked.

    Args:
        image_tokens: of the model's processor.
        given_text: whether who answers is given text, in which the names of control tokens would become these.
    """

    image_tokens: ImageTokens
    given_text: bool = False

    def check(self, row: dict[str, Any], images: ProcessedImages) -> None:
        if self.given_text:
            self.image_tokens.control_text.refuse(row, NO_PLAIN_TEXT)
        self.image_tokens.plain_text(row)


@dataclass
class RowJudge:
    """Says which rows a model cannot take.

    Args:
        collator: of the run.
        every_size: whether every size of images is tried, and every row tokenised; else only rows whose text holds the
            name of a control token are, and the collator names others when it meets them.
        needs: columns of pictures that a row must have, of "images" and "rejected_images".
    """

    collator: Collator
    every_size: bool
    needs: tuple[str, ...] = ()
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
        shown = [row["images"], *([row["rejected_images"]] if row.get("rejected_images") else [])]
        if self.needs:
            keys = [image_set_key([access.key(source, where) for source in sources]) for sources in shown]
            rejected = keys[1] if len(keys) > 1 else "" if "rejected_images" in self.needs else "made"
            refuse_lacking(keys[0], rejected, where)
        if not self.every_size and not self.collator.image_tokens.control_text.in_row(row):
            return
        for sources in shown:
            sizes = tuple(access.size(source, where) for source in sources)
            blank = {**row, "images": [Image.new("RGB", size) for size in sizes]}
            with foreign_code(f"{where} cannot be processed", "Mend the row, or leave it out.", kind=UNFIT):
                self.collator.check(blank, self._images(sizes, blank["images"], where))

    def of_questions(self, given_text: bool = False) -> "RowJudge":
        """The same judge of questions that are asked before there are answers to them.

        Args:
            given_text: as for `Questions`; a judge of questions that are given as text stays one.
        """
        given_text = given_text or (isinstance(self.collator, Questions) and self.collator.given_text)
        return RowJudge(Questions(self.collator.image_tokens, given_text), self.every_size)

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


def refuse_lacking(image_key: str, rejected_key: str, where: str) -> None:
    """Refuse a row whose pictures cannot be held against others.

    Args:
        image_key, rejected_key: of its images and of its rejected ones, "" for none.
        where: names it in errors.

    Raises:
        DataError: if it has no rejected images, or the same as its images.
    """
    if image_key and rejected_key and image_key != rejected_key:
        return
    finding = "no rejected images" if image_key else "no images"
    if image_key and image_key == rejected_key:
        finding = "the same rejected images as images"
    raise DataError(f"{where} has {finding}, and {WHY}.", REMEDY, LACKING)


def judge_of_questions(processor: ProcessorMixin, given_text: bool = False) -> Judge:
    """Who says which questions a model cannot be asked.

    Args:
        processor: the model's.
        given_text: as for `Questions`.
    """
    return RowJudge(Questions(ImageTokens(processor), given_text), every_size=False)
