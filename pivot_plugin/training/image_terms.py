"""Terms of a loss that hold pictures, and not answers, against each other.

Notation: r(y|m) = log pi(y|m,x) - log pi_ref(y|m,x) of an answer y to the question x about the picture m, summed over
tokens; w is the chosen answer and the picture it is right of, l the rejected answer and the rejected picture, 0 the
question without a picture; s is the logistic function. A term is a sum of comparisons -log s(beta (r(better) -
r(worse))), of which `worse` is left out in an anchor, and its value the mean over the pairs of a batch.

    conditional     r(w|w) over r(w|l)                          mDPO, arXiv 2406.11839, section 3
    anchor          r(w|w) over 0                               mDPO, its delta 0
    attend          r(w|w) over r(w|0), and r(l|l) over r(l|0)  S-VCO, arXiv 2502.13928, section 3
    reject          r(w|0) over r(w|l), and r(l|0) over r(l|w)  S-VCO

An answer about a picture is one sequence of the forest, whichever terms ask for it: answers about one picture share its
tree, and every picture is encoded once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from pivot_plugin.data.blind import without_rejected
from pivot_plugin.data.judging import LACKING, REMEDY, WHY
from pivot_plugin.data.layout import text_of
from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.errors import DataError

Shown = Literal["images", "rejected_images", "nothing"]
# of the first refused rows, how many are named
NAMED = 5


@dataclass(frozen=True)
class View:
    """An answer about some pictures.

    Attributes:
        answer: "chosen" or "rejected".
        shown: the column of the pictures it is about.
    """

    answer: Literal["chosen", "rejected"]
    shown: Shown

    @property
    def name(self) -> str:
        """For records."""
        return f"{self.answer} about {self.shown}"


CHOSEN, REJECTED = View("chosen", "images"), View("rejected", "images")
CHOSEN_ELSEWHERE, REJECTED_AT_HOME = View("chosen", "rejected_images"), View("rejected", "rejected_images")
CHOSEN_BLIND, REJECTED_BLIND = View("chosen", "nothing"), View("rejected", "nothing")
Comparison = tuple[View, View | None]
IMAGE_TERMS: Mapping[str, tuple[Comparison, ...]] = {
    "conditional": ((CHOSEN, CHOSEN_ELSEWHERE),),
    "anchor": ((CHOSEN, None),),
    "attend": ((CHOSEN, CHOSEN_BLIND), (REJECTED_AT_HOME, REJECTED_BLIND)),
    "reject": ((CHOSEN_BLIND, CHOSEN_ELSEWHERE), (REJECTED_BLIND, REJECTED)),
}


@dataclass(frozen=True)
class ImageTerms:
    """The terms about pictures of a run, with their weights.

    Attributes:
        weights: by name of a term, of `IMAGE_TERMS`.
    """

    weights: Mapping[str, float]

    @classmethod
    def of(cls, names: Sequence[str] | None, weights: Sequence[float] | None) -> "ImageTerms":
        """The terms that a configuration names.

        Args:
            names: of the terms, None for none.
            weights: of each, 1 where None.
        """
        return cls(dict(zip(names or (), weights or [1.0] * len(names or ()), strict=True)))

    def __bool__(self) -> bool:
        return bool(self.weights)

    @property
    def beside(self) -> tuple[View, ...]:
        """What is scored beside the two answers about a pair's own pictures, in the order of a batch."""
        asked = [view for name in self.weights for compared in IMAGE_TERMS[name] for view in compared if view]
        # what is measured of every run with such a term
        return tuple(dict.fromkeys([CHOSEN_ELSEWHERE, *(view for view in asked if view not in (CHOSEN, REJECTED))]))

    @property
    def symmetric(self) -> bool:
        """Whether rejected answers are taken for right of the rejected images."""
        return bool({"attend", "reject"} & set(self.weights))

    def check(self, pairs: PairDataset, looked: bool = True) -> None:
        """Refuse pairs that the terms can tell nothing of.

        Args:
            pairs: to train or to measure on.
            looked: as for `need_rejected_images`.

        Raises:
            DataError: with how many there are.
        """
        if self:
            need_rejected_images(pairs, looked)
        if self.symmetric:
            need_two_answers(pairs)

    def with_rows(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows for the check of the forest, with a question that shows nothing where the terms ask one.

        Args:
            rows: in the normal form.
        """
        blind = any(view.shown == "nothing" for view in self.beside) if self else False
        return [*rows, *([without_images(rows[0])] if blind and rows and rows[0]["images"] else [])]

    def losses(self, rewards: Mapping[View, torch.Tensor], beta: float) -> dict[str, torch.Tensor]:
        """The value of each term, unweighted.

        Args:
            rewards: r of every view, (pairs,) each.
            beta: of the loss.
        """
        values = {}
        for name in self.weights:
            margins = [
                rewards[better] - (rewards[worse] if worse is not None else 0.0) for better, worse in IMAGE_TERMS[name]
            ]
            values[name] = torch.stack([-torch.nn.functional.logsigmoid(beta * m).mean() for m in margins]).sum()
        return values


def without_images(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose question is asked without a picture: no image, no marker of one.

    Args:
        row: in the normal form.
    """
    prompt = [
        {**message, "content": [part for part in message["content"] if part["type"] != "image"]}
        for message in row["prompt"]
    ]
    return {**without_rejected(row), "prompt": prompt, "images": [], "image_key": ""}


def about_rejected(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose question is asked about its rejected images.

    Args:
        row: in the normal form, with rejected images.
    """
    return {**without_rejected(row), "images": row["rejected_images"], "image_key": row["rejected_image_key"]}


def need_rejected_images(pairs: PairDataset, looked: bool = True) -> None:
    """Refuse pairs that terms about pictures can tell nothing of.

    Args:
        pairs: to train or to measure on.
        looked: whether pictures are compared too; else rows without rejected images alone are refused, and no picture
            is opened.

    Raises:
        DataError: with how many of them lack rejected images, or have the same as their images.
    """
    if looked:
        keys, rejected_keys = pairs.image_keys, pairs.rejected_image_keys
        lacking = np.flatnonzero((keys == b"") | (rejected_keys == b"") | (rejected_keys == keys)).tolist()
    else:
        lacking = [position for position in range(len(pairs)) if _lacks(pairs, position)]
    if not lacking:
        return
    named = ", ".join(pairs.where(position).partition(" of ")[0] for position in lacking[:NAMED])
    same = ", or the same as their images" if looked else ""
    raise DataError(
        f"{len(lacking):,} of {len(pairs):,} rows of {pairs.name} have no rejected images{same} "
        f"({named}{', ...' if len(lacking) > NAMED else ''}), and {WHY}.",
        REMEDY,
        LACKING,
    )


def _lacks(pairs: PairDataset, position: int) -> bool:
    try:
        row = pairs.plain(position)
    except DataError:
        # said of what is wrong with it, when it is looked at
        return False
    return not (row["images"] and row.get("rejected_images"))


def need_two_answers(pairs: PairDataset) -> None:
    """Refuse pairs of one answer, which cannot be right of one picture alone and wrong of it.

    Args:
        pairs: to train or to measure on.

    Raises:
        DataError: with how many there are.
    """
    same = []
    for position in range(len(pairs)):
        try:
            row = pairs.plain(position)
        except DataError:
            continue
        if text_of(row["chosen"]) == text_of(row["rejected"]):
            same.append(pairs.where(position).partition(" of ")[0])
    if same:
        raise DataError(
            f"{len(same):,} of {len(pairs):,} rows of {pairs.name} have one answer ({', '.join(same[:NAMED])}"
            f"{', ...' if len(same) > NAMED else ''}), and the objective takes the rejected answer for right of the "
            "rejected images.",
            "Give as rejected what is right of the rejected images, or choose objective='mdpo'.",
            "one answer",
        )
