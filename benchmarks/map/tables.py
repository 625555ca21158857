"""The map's tables: means and spreads over seeds, and what one condition has over another, seed by seed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from pivot_plugin.probes.scores import holm
from pivot_plugin.recipes.tables import cell, markdown, mean_and_spread

from .cells import CONTROLS, Cell

# what is shown, and in which words; of "nats" less is better
MEASURES = {
    "mllm captions": "captions",
    "mllm answers": "answers",
    "mllm blind answers": "answers, another's picture",
    "probe shapes": "probe: shapes",
    "transplant answers": "transplanted: answers",
    "transplant shape": "of shape",
    "transplant nats": "nats",
    "transplant captions": "captions",
    "transplant blind": "another's picture",
}
SWAPPED = {
    "mllm captions": "captions",
    "mllm answers": "answers",
    "new tower alone captions": "new tower, old rest: captions",
    "new tower alone answers": "answers",
    "new rest alone captions": "old tower, new rest: captions",
    "new rest alone answers": "answers",
    "probe shapes": "probe: shapes",
    "transplant nats": "transplanted: nats",
}


@dataclass(frozen=True)
class Contrast:
    """One condition less another in one measure.

    Attributes:
        mean, spread: of the differences, seed by seed.
        p: of a paired t-test, two-sided; 1 with a single seed or no difference.
        seeds: how many have both.
        above: in how many of them the first is above.
    """

    mean: float
    spread: float
    p: float
    seeds: int
    above: int

    def shown(self, corrected: float) -> str:
        """In a table, with a star where the corrected p is below 0.05."""
        star = " *" if corrected < 0.05 else ""
        spread = f" ± {self.spread:.3f}" if self.seeds > 1 else ""
        return f"{self.mean:+.3f}{spread} ({self.above}/{self.seeds}){star}"


def contrast(first: Mapping[int, float], second: Mapping[int, float]) -> Contrast | None:
    """What the first has over the second on the seeds that both have; None where there are none.

    Args:
        first, second: a score by seed.
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    differences = [first[seed] - second[seed] for seed in seeds]
    mean, spread = mean_and_spread(differences)
    # a spread of zero has no t
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if spread > 0 else 1.0
    return Contrast(mean, spread, p, len(seeds), sum(one > 0 for one in differences))


class Map:
    """The records of cells, by condition and seed.

    Args:
        records: as `CellRunner.run` gives them.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.scores: dict[tuple[Any, ...], dict[int, Mapping[str, float]]] = {}
        self.told: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for record in records:
            one = Cell(**record["cell"])
            self.scores.setdefault(one.condition, {})[one.seed] = record["scores"]
            if "told" in record:
                self.told.setdefault(one.condition, []).append(record["told"])

    def values(self, condition: tuple[Any, ...], measure: str) -> dict[int, float]:
        """A measure of a condition, by seed."""
        found = self.scores.get(condition, {})
        return {seed: scores[measure] for seed, scores in found.items() if measure in scores}

    def table(self, conditions: Sequence[tuple[Any, ...]], measures: Mapping[str, str] = MEASURES) -> str:
        """Conditions by row, measures by column: mean and standard deviation over seeds."""
        rows = []
        for condition in conditions:
            if condition not in self.scores:
                continue
            cells = [cell(list(self.values(condition, measure).values())) for measure in measures]
            rows.append([named(condition), str(len(self.scores[condition])), *cells])
        return markdown(["pairs, arm", "seeds", *measures.values()], rows)

    def differences(
        self,
        conditions: Sequence[tuple[Any, ...]],
        against: Callable[[tuple[Any, ...]], tuple[Any, ...]],
        measures: Mapping[str, str] = MEASURES,
    ) -> str:
        """What conditions have over others, seed by seed; a star where Holm's correction over a column leaves p < 0.05.

        Args:
            conditions: the first of each pair.
            against: gives the second.
            measures: columns.
        """
        kept = [one for one in conditions if one in self.scores and against(one) in self.scores]
        columns = []
        for measure in measures:
            found = [contrast(self.values(one, measure), self.values(against(one), measure)) for one in kept]
            corrected = iter(holm([one.p for one in found if one is not None]))
            columns.append(["" if one is None else one.shown(next(corrected)) for one in found])
        rows = [
            [f"{named(one)} - {named(against(one))}", *cells]
            for one, cells in zip(kept, zip(*columns, strict=True), strict=True)
        ]
        return markdown(["difference", *measures.values()], rows)

    def rightness(self, condition: tuple[Any, ...]) -> str:
        """Pairs, and the shares of facts right that chosen and rejected answers really have, over seeds."""
        told = [one for one in self.told.get(condition, []) if "chosen" in one]
        if not told:
            return ""
        chosen, rejected = (mean_and_spread([one[side] for one in told])[0] for side in ("chosen", "rejected"))
        return f"{chosen:.2f}, {rejected:.2f}"


def named(condition: tuple[Any, ...]) -> str:
    """A condition in words."""
    author, rightness, arm, train, blind = condition
    if arm in CONTROLS:
        return str(arm)
    words = f"{author} {rightness}, {arm}"
    if train != "encoder":
        words += f", {train} trained"
    return words + (", pictures of others" if blind else "")
