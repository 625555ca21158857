"""Scores with intervals, and what two of them on the same samples tell.

A score is a statistic of sums over samples, so that resampling is a matrix product. Two statistics serve all probes:

    mean    samples (n,): their mean, such as right or wrong per image
    ratio   samples (n, K, 2): for each of K classes a sum over a sum, averaged over the classes whose second sum is not
            zero, such as hits over patches (macro recall) or intersection over union (mIoU)

`BLIND` are the names of scores without the picture, behind the name of the score itself; `SEEN` is what needs it.

scipy's `bootstrap` and `permutation_test` call a statistic of drawn samples, (R, n, K, 2) numbers for R draws of the
ratio; here R draws cost one product of (R, n) counts with (n, 2 K) sums, in numpy alone. scipy has no `holm`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from pivot_plugin.errors import PluginError

RESAMPLES = 1000
PERMUTATIONS = 5000
LEVEL = 0.95
BLIND = {"other": "other-picture", "mean": "mean-colour"}
SEEN = "needs-picture"


@dataclass(frozen=True)
class Score:
    """A number with its 95 % interval.

    Attributes:
        value: the statistic of all samples.
        low, high: percentile bootstrap over samples; equal to `value` where there are none.
        samples: what it was computed from, in the order of the data, for paired tests; None where unknown.
    """

    value: float
    low: float
    high: float
    samples: np.ndarray | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})" if self.low < self.high else f"{self.value:.3f}"


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        probe: its name.
        scores: by name, the main one first.
        settings: what it was measured with, what a validation split chose included.
        artefacts: anything to be shown beside scores, such as saliency maps.
    """

    probe: str
    scores: dict[str, Score]
    settings: dict[str, Any] = field(default_factory=dict)
    artefacts: Any = field(default=None, repr=False, compare=False)

    @property
    def main(self) -> Score:
        """The score that stands for the probe."""
        return next(iter(self.scores.values()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; without samples and artefacts."""
        scores = {name: score.as_dict() for name, score in self.scores.items()}
        return {"probe": self.probe, "scores": scores, "settings": self.settings}


@dataclass(frozen=True)
class Difference:
    """One score against another on the same samples.

    Attributes:
        value: second minus first.
        low, high: 95 % paired bootstrap interval; None where samples are not paired.
        p: two-sided p-value of the paired test, None where samples are not paired.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None


def score_of(samples: np.ndarray, seed: int = 0) -> Score:
    """A score of samples, with its interval.

    Args:
        samples: (n,) for the mean, or (n, K, 2) for the ratio.
        seed: of the bootstrap.
    """
    value = float(_statistic(samples.sum(axis=0, dtype=np.float64)[None], len(samples), samples.ndim)[0])
    low, high = _interval(_resampled([samples], seed)[0])
    return Score(value, low, high, samples)


def plain_score(value: float) -> Score:
    """A number of which no samples are known."""
    return Score(float(value), float(value), float(value))


def as_result(name: str, returned: object) -> ProbeResult:
    """What a probe returned, as a record; a plugin's may return a mapping of numbers."""
    if isinstance(returned, ProbeResult):
        return returned
    if isinstance(returned, Mapping):
        scores = {str(key): v if isinstance(v, Score) else plain_score(v) for key, v in returned.items()}
        if scores:
            return ProbeResult(name, scores)
    raise PluginError(
        f"Probe {name!r} returned a {type(returned).__name__}.",
        "It should return a ProbeResult or a mapping of scores.",
    )


def difference(first: Score, second: Score, seed: int = 0) -> Difference:
    """How much a second score lies above a first.

    Where both have samples of the same data, each sample is compared with itself: a paired bootstrap for the interval,
    and for the p-value McNemar's exact test where samples are right or wrong, else a permutation test that swaps the
    two within samples.

    Args:
        first, second: of the same probe on the same data.
        seed: of both.

    Source: Efron and Tibshirani 1993, chapters 13 and 15.
    """
    value = second.value - first.value
    a, b = first.samples, second.samples
    if a is None or b is None or a.shape != b.shape or not len(a):
        return Difference(value, None, None, None)
    resampled_a, resampled_b = _resampled([a, b], seed)
    low, high = _interval(resampled_b - resampled_a)
    if is_right_or_wrong(a) and is_right_or_wrong(b):
        return Difference(value, low, high, mcnemar(a, b))
    return Difference(value, low, high, _permutation_p(a, b, value, seed))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value that two judges of the same samples are right equally often.

    The exact test: of the samples that one alone got right, each side has half.

    Args:
        first, second: (n,) of right or wrong.

    Source: McNemar 1947; exact by the binomial distribution, in whole numbers.
    """
    only_first = int(((first == 1) & (second == 0)).sum())
    discordant = only_first + int(((first == 0) & (second == 1)).sum())
    fewer = min(only_first, discordant - only_first)
    ways, term = 0, 1
    for chosen in range(fewer + 1):
        ways += term
        term = term * (discordant - chosen) // (chosen + 1)
    return min(1.0, float(Fraction(2 * ways, 2**discordant)))


def is_right_or_wrong(samples: np.ndarray | None) -> bool:
    """Whether samples are of right and wrong alone."""
    return samples is not None and samples.ndim == 1 and bool(np.isin(samples, (0, 1)).all())


def apart(first: Score, second: Score) -> bool:
    """Whether two intervals do not touch; of two numbers without intervals nothing is known, and so not."""
    with_intervals = first.low < first.high or second.low < second.high
    return with_intervals and (first.high < second.low or second.high < first.low)


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for the number of tests, so that the chance of any false finding is kept.

    Source: Holm 1979.
    """
    order = np.argsort(p_values)
    adjusted = np.zeros(len(p_values))
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return [float(p) for p in adjusted]


def _statistic(sums: np.ndarray, count: int, dimensions: int) -> np.ndarray:
    """(R,) statistics of (R, ...) sums over `count` samples of so many dimensions."""
    if dimensions == 1:
        return sums / max(count, 1)
    above, below = sums[..., 0], sums[..., 1]
    occurs = below > 0
    shares = np.divide(above, below, out=np.zeros_like(above), where=occurs)
    return shares.sum(axis=1) / np.maximum(occurs.sum(axis=1), 1)


def _resampled(arms: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """(R,) statistics of each arm over bootstrap resamples, the same ones for all arms."""
    rng, count = np.random.default_rng(seed), len(arms[0])
    flat = [arm.reshape(count, -1).astype(np.float64) for arm in arms]
    of_arms: list[list[np.ndarray]] = [[] for _ in arms]
    for _ in range(0, RESAMPLES, 100):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=100).astype(np.float64)
        for arm, values, statistics in zip(arms, flat, of_arms, strict=True):
            sums = (weights @ values).reshape(100, *arm.shape[1:])
            statistics.append(_statistic(sums, count, arm.ndim))
    return [np.concatenate(statistics) for statistics in of_arms]


def _permutation_p(a: np.ndarray, b: np.ndarray, observed: float, seed: int) -> float:
    rng, count = np.random.default_rng(seed), len(a)
    first, moved = a.reshape(count, -1).astype(np.float64), (b - a).reshape(count, -1).astype(np.float64)
    total_a, total_b = first.sum(axis=0), first.sum(axis=0) + moved.sum(axis=0)
    as_extreme = 0
    for _ in range(0, PERMUTATIONS, 100):
        swapped = (rng.integers(0, 2, (100, count)).astype(np.float64) @ moved).reshape(100, -1)
        shape = (100, *a.shape[1:])
        one = _statistic((total_a + swapped).reshape(shape), count, a.ndim)
        other = _statistic((total_b - swapped).reshape(shape), count, a.ndim)
        as_extreme += int((np.abs(other - one) >= abs(observed) - 1e-12).sum())
    # the observed arrangement is one of those that could have been drawn
    return (as_extreme + 1) / (PERMUTATIONS + 1)


def _interval(statistics: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(statistics, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
