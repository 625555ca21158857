"""Does a maker give its answers away: learned from the text alone, and from simple numbers about the pictures.

For whoever writes a maker: `leaks(make(pictures, "mine", count=600)).check()` in a test. Give pictures that say nothing
of how they were turned or lit, such as random fields; of photographs the sky is up, and a classifier may well know.
"""

import io
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pivot_plugin.data.edits import unedited
from pivot_plugin.data.layout import text_of
from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.data.rows import RowDataset
from pivot_plugin.extras import require

FOLDS = 5
# Standard deviations above chance at which an accuracy is no accident. They are those of independent rows, and rows are
# not quite: answers are balanced in blocks, and the folds share what was learned.
SIGMAS = 6.0
HASHED = 2**14
# answers that are told apart as such; of more, how they begin
MOST_CLASSES = 12
JPEG_BLOCK = 8


@dataclass(frozen=True)
class LeakReport:
    """How often an answer is told without looking.

    Attributes:
        blind: accuracy of a classifier that reads the texts alone.
        blind_chance: of guessing between the same answers.
        statistic: accuracy of a classifier that knows simple numbers about the pictures; None for pairs, whose right
            answer no picture tells from the wrong one.
        statistic_chance: of always giving the most frequent answer.
        rows: that were asked.
    """

    blind: float
    blind_chance: float
    statistic: float | None
    statistic_chance: float
    rows: int

    @property
    def leaks(self) -> tuple[str, ...]:
        """What gives answers away."""
        found = [("text", self.blind, self.blind_chance)]
        if self.statistic is not None:
            found.append(("statistic", self.statistic, self.statistic_chance))
        return tuple(name for name, accuracy, chance in found if accuracy > self._bound(chance))

    def _bound(self, chance: float) -> float:
        return float(chance + SIGMAS * np.sqrt(chance * (1 - chance) / self.rows))

    def check(self) -> None:
        """Make sure that nothing gives answers away.

        Raises:
            AssertionError: naming what does, with the numbers.
        """
        assert not self.leaks, f"answers are told by {' and '.join(self.leaks)}: {self}"


def leaks(rows: RowDataset, seed: int = 0) -> LeakReport:
    """Learn to answer without looking, on four fifths of the rows at a time, and count right answers on the rest.

    Args:
        rows: made questions (with `answer` and `wrong_answers`) or pairs; some hundreds.
        seed: of the classifiers.

    Raises:
        MissingExtra: without scikit-learn.
    """
    require("sklearn", "probes", "Looking for leaks")
    plain = [rows.plain(position) for position in range(len(rows))]
    options = [_options(row) for row in plain]
    prompts = [text_of(row["prompt"]) for row in plain]
    chance = float(np.mean([1 / len(own) for own in options]))
    blind = _blind_accuracy(prompts, options, seed)
    if isinstance(rows, PairDataset):
        return LeakReport(blind, chance, None, 1.0, len(rows))
    # rendered once each; a row that is read as such is rendered for its key too
    shown = ([rows.access.open(source, rows.where(at)) for source in row["images"]] for at, row in enumerate(plain))
    numbers = np.array([_numbers_of_row(images) for images in shown])
    targets = _targets([own[0] for own in options])
    # of a picture that was learned from, where each of its parts lies is remembered, not told
    keys = [rows.access.stored_key(unedited(row["images"][0]), rows.where(at)) for at, row in enumerate(plain)]
    pictures = np.unique(keys, return_inverse=True)[1]
    statistic = _statistic_accuracy(numbers, targets, _folds(pictures, seed), seed)
    return LeakReport(blind, chance, statistic, max(Counter(targets).values()) / len(rows), len(rows))


def _options(row: dict[str, Any]) -> list[str]:
    """The right answer, and then the wrong ones."""
    if "chosen" in row:
        return [text_of(row["chosen"]), text_of(row["rejected"])]
    return [str(row["answer"]), *map(str, row["wrong_answers"])]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _features(prompt: str, option: str, others: Sequence[str]) -> list[str]:
    """What the text says of one option: its words, where it stands in the question, and every word beside it there."""
    words = _words(option)
    asked = sorted(set(_words(prompt)))
    # the model sees no other options than those in the question
    in_prompt = sorted((other for other in others if other in prompt), key=prompt.find)
    place = in_prompt.index(option) if option in in_prompt else -1
    return [
        *(f"option {word}" for word in words),
        f"option {' '.join(words)}",
        f"place {place}",
        f"length {len(words)} of {max(len(_words(other)) for other in others)}",
        *(f"{' '.join(words)[:60]} asked {word}" for word in asked),
        *(f"place {place} asked {word}" for word in asked),
    ]


def _blind_accuracy(prompts: Sequence[str], options: Sequence[Sequence[str]], seed: int) -> float:
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import LogisticRegression

    owners = np.array([row for row, own in enumerate(options) for _ in own])
    right = np.array([number == 0 for own in options for number in range(len(own))])
    texts = [_features(prompt, option, own) for prompt, own in zip(prompts, options, strict=True) for option in own]
    hashed = FeatureHasher(HASHED, input_type="string").transform(texts)
    hits = 0.0
    for test in _folds(np.arange(len(prompts)), seed):
        held = np.isin(owners, test)
        model = LogisticRegression(C=0.3, max_iter=300, class_weight="balanced").fit(hashed[~held], right[~held])
        scores = model.decision_function(hashed[held])
        for row in test:
            own = scores[owners[held] == row]
            best = np.isclose(own, own.max(), rtol=0, atol=1e-9)
            hits += float(best[0]) / best.sum()
    return hits / len(prompts)


def _statistic_accuracy(numbers: np.ndarray, targets: Sequence[str], folds: Sequence[np.ndarray], seed: int) -> float:
    from sklearn.ensemble import ExtraTreesClassifier

    labels = np.array(targets)
    hits = 0
    for test in folds:
        held = np.isin(np.arange(len(labels)), test)
        model = ExtraTreesClassifier(100, min_samples_leaf=3, random_state=seed, n_jobs=1)
        hits += int((model.fit(numbers[~held], labels[~held]).predict(numbers[held]) == labels[held]).sum())
    return hits / len(labels)


def _folds(groups: np.ndarray, seed: int) -> list[np.ndarray]:
    """Rows in parts, those of a group in the same part."""
    parts = np.array_split(np.random.default_rng(seed).permutation(groups.max() + 1), FOLDS)
    return [np.flatnonzero(np.isin(groups, part)) for part in parts if len(part)]


def _targets(answers: Sequence[str]) -> list[str]:
    """What the statistic is to tell: the answer, or how it begins where there are too many."""
    if len(set(answers)) <= MOST_CLASSES:
        return list(answers)
    return [_words(answer)[0] if _words(answer) else answer for answer in answers]


def _numbers_of_row(images: Sequence[Image.Image]) -> list[float]:
    """Simple numbers of each picture, and how much those of any two differ."""
    each = [_numbers(image) for image in images]
    between = [np.abs(one - other) for one, other in itertools.combinations(each, 2)]
    apart = [one - np.mean(each, axis=0) for one in each] if len(each) > 2 else []
    return [float(value) for part in (*each, *between, *apart) for value in part]


def _numbers(image: Image.Image) -> np.ndarray:
    """Shape, means, spreads, edges along and across, blocks of compression, and sizes of files."""
    pixels = np.asarray(image, dtype=np.float64)
    grey = pixels.mean(axis=2)
    colour = pixels[..., 0] - pixels[..., 2]
    edges = [np.abs(np.diff(values, axis=axis)).mean() for values in (grey, colour) for axis in (0, 1)]
    return np.array(
        [
            *image.size,
            *pixels.mean(axis=(0, 1)),
            *pixels.std(axis=(0, 1)),
            *edges,
            *(_blockiness(grey, axis) for axis in (0, 1)),
            _bytes(image, "PNG"),
            _bytes(image, "JPEG"),
        ]
    )


def _blockiness(grey: np.ndarray, axis: int) -> float:
    """How much stronger edges are on the strongest of the eight grids of JPEG's blocks than on the others."""
    steps = np.abs(np.diff(grey, axis=axis)).mean(axis=1 - axis)
    phases = np.array([steps[phase::JPEG_BLOCK].mean() for phase in range(min(JPEG_BLOCK, len(steps)))])
    return float(phases.max() / max(phases.mean(), 1e-6))


def _bytes(image: Image.Image, form: str) -> float:
    buffer = io.BytesIO()
    image.save(buffer, format=form)
    return float(buffer.tell())
