"""Questions and pairs made of pictures: a row is made when it is read, and its pictures are rendered when they are."""

import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, overload

import numpy as np

from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.data.questions import QuestionDataset
from pivot_plugin.data.sources import Source
from pivot_plugin.errors import DataError, SettingsError, foreign_code
from pivot_plugin.progress import Progress

from .lookup import maker_of
from .pictures import Picture, Pictures
from .protocol import Draw, Maker, Question, Unsuitable
from .sources import WORTH_A_BAR, pictures_of

logger = logging.getLogger(__name__)

Form = Literal["questions", "pairs"]
DIFFICULTY = 0.5
# where nobody says how many: so many a picture, and not fewer than this
PER_PICTURE, LEAST = 1, 1000
# pictures that are tried for one question
ATTEMPTS = 200
LARGEST_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Making:
    """What is to be made of pictures.

    Attributes:
        makers: names, each with its share; one alone may be given by its name, several of equal shares in a list.
        difficulty: from 0 (easy) to 1 (hard), of every maker; or one each, by name.
        count: of questions; one a picture, and at least 1000, where None.
        seed: the same seed makes the same of the same pictures.

    Raises:
        SettingsError: for a maker that nobody offers, or values that cannot be.
    """

    makers: str | Sequence[str] | Mapping[str, float]
    difficulty: float | Mapping[str, float] = DIFFICULTY
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.makers, str | Sequence | Mapping) or not all(isinstance(n, str) for n in self.shares):
            raise SettingsError(
                f"The makers are {self.makers!r}.", 'Give a name, such as "jigsaw", or shares: {"jigsaw": 1}.'
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise SettingsError(f"seed is {self.seed!r}.", "Give a whole number.")
        for name, share in self.shares.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
                raise SettingsError(f"The maker {name!r} has the share {share!r}.", "Give 0 or more.")
        if not any(self.shares.values()):
            raise SettingsError(
                "No maker is given." if not self.shares else "Every maker has the share 0.",
                'Give a name, such as "jigsaw", or shares: {"jigsaw": 1, "rotation": 2}.',
            )
        if self.count is not None and (
            isinstance(self.count, bool) or not isinstance(self.count, int) or not 1 <= self.count <= LARGEST_COUNT
        ):
            raise SettingsError(f"count is {self.count!r}.", "Give 1 or more, a whole number.")
        if isinstance(self.difficulty, Mapping) and (absent := [n for n in self.difficulty if n not in self.shares]):
            raise SettingsError(
                f"A difficulty is given for {absent[0]!r}, which is not to be made.", f"Leave out {absent[0]!r}."
            )
        for name in self.shares:
            maker_of(name, self.difficulty_of(name))

    @property
    def shares(self) -> dict[str, float]:
        """Each maker's share of the questions, not normalised."""
        if isinstance(self.makers, str):
            return {self.makers: 1.0}
        return dict(self.makers) if isinstance(self.makers, Mapping) else dict.fromkeys(self.makers, 1.0)

    def difficulty_of(self, name: str) -> float:
        """The difficulty at which a maker makes."""
        return self.difficulty.get(name, DIFFICULTY) if isinstance(self.difficulty, Mapping) else self.difficulty

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        difficulty = {name: self.difficulty_of(name) for name in self.shares}
        return {"makers": self.shares, "difficulty": difficulty, "count": self.count, "seed": self.seed}


def make(
    source: object,
    maker: str | Sequence[str] | Mapping[str, float] | Making,
    *,
    difficulty: float | Mapping[str, float] = DIFFICULTY,
    count: int | None = None,
    seed: int = 0,
    form: Form = "questions",
    name: str = "pictures",
    **options: Any,
) -> QuestionDataset | PairDataset:
    """Make questions with known answers, or pairs, of pictures alone. Nothing is rendered before it is read.

    Args:
        source: a folder with pictures, the path of one or a list of them, PIL images, a data set, stream, file or Hub
            id with a column `image`, with captions where the maker needs them (see `makers.sources.pictures_of`).
        maker: the name of one ("rotation", "flip", "jigsaw", "locate", "order", "same_or_different", "odd_one_out",
            "planted_error", or a plugin's), or several with shares.
        difficulty, count, seed: as for `Making`.
        form: "questions", with the columns `answer` and `rule`, the reward that judges it; or "pairs", the right answer
            against the nearest wrong one.
        name: of the data, for errors.
        **options: `split`, `streaming`, `allow_urls`, `max_pixels`, `image_folder` as for `load`.

    Raises:
        SettingsError: for an unknown maker, or a difficulty, count or share that cannot be.
        DataError: if nothing can be made of the pictures: there are none, they are too few or too small, or what is
            said of them holds no phrase to replace.

    Source:
        each maker's own: `pivot_plugin.generation.makers.makers()[name].source`.
    """
    if form not in get_args(Form):
        raise SettingsError(f"form is {form!r}.", f"Choose {' or '.join(map(repr, get_args(Form)))}.")
    making = maker if isinstance(maker, Making) else Making(maker, difficulty, count, seed)
    parts = [_part(n, making) for n, share in making.shares.items() if share]
    pictures = pictures_of(source, name, captions=any(part.maker.needs_caption for part in parts), **options)
    rows = MadeRows(pictures, parts, making, form)
    made = Source(rows, f"{'+'.join(making.shares)} of {pictures.name}", pictures[0].access)
    # what cannot be made at all shows at the first row of each maker
    rows.try_each()
    return QuestionDataset(made) if form == "questions" else PairDataset(made)


@dataclass(frozen=True)
class _Part:
    """One maker at its difficulty, and the pictures that it can use."""

    maker: Maker
    difficulty: float
    pictures: Pictures = field(default_factory=lambda: Pictures([]))


def _part(name: str, making: Making) -> _Part:
    return _Part(maker_of(name, making.difficulty_of(name)), making.difficulty_of(name))


class MadeRows(Sequence[Mapping[str, Any]]):
    """Rows that are made when they are read, the same every time.

    Args:
        pictures: to make them of; their headers are read now.
        parts: makers at their difficulties.
        making: how many, and which shares.
        form: of the rows.

    Raises:
        DataError: if a maker finds no pictures that it can use.
    """

    def __init__(self, pictures: Pictures, parts: Sequence[_Part], making: Making, form: Form) -> None:
        sized, unreadable = _sized(pictures)
        self._parts = [
            _Part(part.maker, part.difficulty, _usable(part, sized, pictures.name, unreadable)) for part in parts
        ]
        self._seed = making.seed
        self._form = form
        self._count = max(LEAST, PER_PICTURE * len(sized)) if making.count is None else making.count
        shares = [making.shares[part.maker.name] for part in parts]
        self._which, self._numbers = _dealt(shares, self._count, making.seed)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        if isinstance(index, slice):
            return [self._row(at) for at in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._row(index % self._count)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self._row(at) for at in range(self._count))

    def try_each(self) -> None:
        """Make the first row of every maker.

        Raises:
            DataError: if one cannot be made.
        """
        for which in np.unique(self._which):
            self._row(int(np.flatnonzero(self._which == which)[0]))

    def _row(self, at: int) -> Mapping[str, Any]:
        part, number = self._parts[self._which[at]], int(self._numbers[at])
        question = _question(part, number, self._seed)
        name = part.maker.name
        row = {"id": f"{name}-{self._seed}-{number}", "images": list(question.images), "source": f"maker {name}"}
        if self._form == "pairs":
            prompt, chosen, rejected = question.pair or (question.prompt, question.answer, question.wrong[0])
            return row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        beside = {"wrong_answers": list(question.wrong), "rule": question.rule, "maker": name}
        return row | {"prompt": question.prompt, "answer": question.answer} | beside


def _question(part: _Part, number: int, seed: int) -> Question:
    """The question of a number, of the first picture that is suitable."""
    maker, pictures = part.maker, part.pictures
    assert maker.questions is not None
    reasons: Counter[str] = Counter()
    for attempt in range(ATTEMPTS):
        draw = Draw(_picture(pictures, number, seed, attempt), pictures, part.difficulty, number, seed, attempt)
        with foreign_code(f"The maker {maker.name!r} failed on {draw.picture.where}", "Mend or replace the maker."):
            try:
                question = maker.questions(draw)
            except Unsuitable as reason:
                reasons[str(reason)] += 1
                continue
        if not question.wrong or question.answer in question.wrong:
            raise DataError(
                f"The maker {maker.name!r} gave the answer {question.answer!r}, and the wrong ones {question.wrong!r}.",
                "It must give at least one wrong answer, none of them right.",
            )
        return question
    found = ", ".join(f"{reason} ({count} times)" for reason, count in reasons.most_common(3))
    raise DataError(
        f"The maker {maker.name!r} can make nothing of {pictures.name} at difficulty {part.difficulty:g}: of "
        f"{ATTEMPTS} pictures looked at none is suitable: {found}.",
        "Give other pictures, another maker, or another difficulty=.",
        "unsuitable pictures",
    )


def _picture(pictures: Pictures, number: int, seed: int, attempt: int) -> Picture:
    """Every picture once before any comes again; where one was unsuitable, any other."""
    if attempt:
        return pictures[random.Random(f"{seed} {number} picture {attempt}").randrange(len(pictures))]
    round_number, place = divmod(number, len(pictures))
    order: np.ndarray = pictures.once(
        f"order {seed} {round_number}",
        lambda: np.random.default_rng([seed % 2**32, round_number]).permutation(len(pictures)),
    )
    return pictures[int(order[place])]


def _dealt(shares: Sequence[float], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row which maker makes it, and the number of that maker's question; shares are kept to the row."""
    exact = np.array(shares, dtype=np.float64) / sum(shares) * count
    counts = np.floor(exact).astype(int)
    for part in np.argsort(counts - exact, kind="stable")[: count - counts.sum()]:
        counts[part] += 1
    which = np.repeat(np.arange(len(shares)), counts)
    np.random.default_rng([seed % 2**32, 20]).shuffle(which)
    numbers = np.zeros(count, dtype=np.int64)
    for part in range(len(shares)):
        mine = which == part
        numbers[mine] = np.arange(mine.sum())
    return which, numbers


def _sized(pictures: Pictures) -> tuple[list[Picture], int]:
    """Pictures with their sizes, by their headers, and how many of them are no pictures."""
    sized: list[Picture] = []
    first: DataError | None = None
    with Progress(len(pictures), f"looking at {pictures.name}", "picture", quiet_below=WORTH_A_BAR) as bar:
        for picture in pictures:
            try:
                sized.append(picture.looked_at())
            except DataError as error:
                first = first or error
            bar.update()
    if not sized:
        assert first is not None
        raise DataError(
            f"None of the {len(pictures)} pictures of {pictures.name} can be read; the first: {first.finding}",
            first.remedy,
            first.kind,
        )
    if first is not None:
        logger.warning(
            "%d of %d pictures of %s cannot be read and are left out; the first: %s",
            *(len(pictures) - len(sized), len(pictures), pictures.name, first.finding),
        )
    return sized, len(pictures) - len(sized)


def _usable(part: _Part, sized: Sequence[Picture], name: str, unreadable: int) -> Pictures:
    """The pictures of which a maker can make something, as far as that shows without opening them; the rest is said."""
    maker, smallest = part.maker, part.maker.smallest(part.difficulty)
    left_out: Counter[str] = Counter()
    usable = []
    for picture in sized:
        reason = f"smaller than {smallest} pixels a side" if min(picture.size) < smallest else ""
        if not reason and maker.cannot_use is not None:
            reason = maker.cannot_use(picture, part.difficulty)
        if reason:
            left_out[reason] += 1
        else:
            usable.append(picture)
    listed = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    if len(usable) < maker.pictures:
        needed = "one picture" if maker.pictures == 1 else f"{maker.pictures} different pictures"
        left = f" {listed}." if listed else ""
        raise DataError(
            f"The maker {maker.name!r} needs {needed} at difficulty {part.difficulty:g}, and {name} has {len(usable)} "
            f"that it can use, of {len(sized) + unreadable}.{left}",
            "Give more or other pictures, another maker, or another difficulty=.",
            "too few pictures",
        )
    if listed:
        logger.warning(
            "%s: %d of %d pictures of %s are used; left out: %s.",
            *(maker.name, len(usable), len(sized), name, listed),
        )
    return Pictures(usable, name)
