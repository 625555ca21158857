"""What a maker is: the record that plugins offer by the hook `pivot_makers`, and what it is given and gives back.

A maker turns pictures into tasks whose right answer is known because the picture was changed by us. It never touches
pixels: it says which edits are to be done (`data.edits`), and the picture is rendered when a row is read.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from .pictures import Picture, Pictures

T = TypeVar("T")
# longest block in which choices are balanced exactly; beyond it they are drawn
LONGEST_BLOCK = 1000
SMALLEST_SIDE = 16


class Unsuitable(Exception):
    """Raised by a maker for a picture of which it cannot make anything; another one is taken then."""


@dataclass(frozen=True)
class Draw:
    """What a maker makes one task of: the same draw always gives the same task.

    Attributes:
        picture: that the task is about.
        pictures: all there are, to take others from.
        difficulty: within the maker's range.
        number: of the task among those of this maker, from 0.
        seed: of all of them.
        attempt: how many pictures of this number were unsuitable.
    """

    picture: Picture
    pictures: Pictures
    difficulty: float
    number: int
    seed: int
    attempt: int = 0

    @cached_property
    def random(self) -> random.Random:
        """Random numbers of this task."""
        return random.Random(f"{self.seed} {self.number} {self.attempt}")

    def balanced(self, options: Sequence[T], salt: str = "") -> T:
        """One of some options, each as often as any other over every len(options) tasks.

        Args:
            options: to choose from, the same for every task.
            salt: keeps several choices of one task apart.
        """
        if len(options) > LONGEST_BLOCK:
            return self.random.choice(options)
        order = list(range(len(options)))
        random.Random(f"{self.seed} {salt} block {self.number // len(options)}").shuffle(order)
        return options[order[self.number % len(options)]]

    def answer(self, options: Sequence[T], salt: str = "") -> tuple[T, list[T]]:
        """A right answer, balanced, and the other options in random order: none is more often right than wrong.

        Args:
            options: to choose from, the same for every task.
            salt: as for `balanced`.
        """
        right = self.balanced(options, salt)
        wrong = [option for option in options if option != right]
        self.random.shuffle(wrong)
        return right, wrong

    def between(self, easiest: float, hardest: float) -> float:
        """A number that the difficulty moves in a straight line from one end to the other."""
        return easiest + (hardest - easiest) * self.difficulty

    def other(self) -> Picture:
        """Another picture, drawn at random.

        Raises:
            Unsuitable: if there is none.
        """
        if len(self.pictures) < 2:
            raise Unsuitable("there is no other picture")
        index = self.random.randrange(len(self.pictures) - 1)
        return self.pictures[index + (index >= self.picture.index)]


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    Attributes:
        images: shown, in order; whatever a row's `images` may hold, edited ones among them.
        prompt: the question; images are put in front of it unless it says <image> where they belong.
        answer: the right one.
        wrong: answers that are wrong, the nearest to the right one first; at least one.
        rule: name of the reward that judges an answer.
        pair: (prompt, chosen, rejected) where a pair is to be more than the right answer against the nearest wrong one.
    """

    images: Sequence[Any]
    prompt: str
    answer: str
    wrong: Sequence[str]
    rule: str = "accuracy"
    pair: tuple[str, str, str] | None = None


def any_size(difficulty: float) -> int:
    """Pixels of the shorter side that a picture must have where nothing is cut from it."""
    return SMALLEST_SIDE


@dataclass(frozen=True)
class Maker:
    """Makes tasks of pictures.

    Attributes:
        name: by which it is asked for.
        source: the paper that it follows.
        questions: makes one question, for makers of questions and pairs.
        rejected: makes of one picture of a pair the picture that the chosen answer fits less, for makers of
            `rejected_images`; returns what a row's `images` may hold.
        difficulty: lowest and highest that it can make.
        pictures: how many different ones it needs at least.
        smallest: by difficulty, pixels that the shorter side of a picture must have.
        needs_caption: whether it works on a picture's captions.
        cannot_use: of a picture, which is not opened, and a difficulty, why nothing can be made of it: a reason that
            follows "pictures", "whose captions hold no phrase to replace"; "" where something can.
    """

    name: str
    source: str
    questions: Callable[[Draw], Question] | None = None
    rejected: Callable[[Draw], Any] | None = None
    difficulty: tuple[float, float] = (0.0, 1.0)
    pictures: int = 1
    smallest: Callable[[float], int] = any_size
    needs_caption: bool = False
    cannot_use: Callable[[Picture, float], str] | None = None
