"""The arms of the paper's recipe, each at the learning rate that validation chose."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pivot_plugin.errors import SettingsError
from pivot_plugin.models.loading import load_model
from pivot_plugin.probes.comparison import compare
from pivot_plugin.runs.leftovers import MODEL_FOLDER

from .inputs import Parts, RecipeData
from .results import RecipeResult
from .runs import Keeper, Optimizing
from .sections import PivotRecipe
from .stages import Stage

logger = logging.getLogger(__name__)
SELECT = "select"


@dataclass(frozen=True)
class Arms:
    """Arms that run on the same pairs from the same MLLM.

    Attributes:
        recipe: of which they are.
        data: its rows.
        parts: its probes, for the choice of a rate.
        result: gets the rates chosen and the stages.
    """

    recipe: PivotRecipe
    data: RecipeData
    parts: Parts
    result: RecipeResult

    def run(self, folder: Path, arm: str, seed: int, start: Path) -> Path:
        """The folder of an arm's run at its learning rate, which the first seed chooses.

        Args:
            folder: of the arm.
            arm: its name.
            seed: of the run.
            start: folder of the MLLM it begins at.
        """
        if arm not in self.result.rates:
            self.result.rates[arm] = self._chosen(folder, arm, seed, start)
        return self._optimized(folder, arm, self.result.rates[arm], seed, start).folder

    def _chosen(self, folder: Path, arm: str, seed: int, start: Path) -> float | None:
        rates = self.recipe.optimize.rates(arm)
        if len(rates) == 1:
            return rates[0]
        scores = {}
        for rate in rates:
            assert rate is not None
            scores[rate] = self._score(self._optimized(folder, arm, rate, seed, start))
        best = max(scores, key=lambda rate: scores[rate])
        shown = ", ".join(f"{rate:g}: {score:.4f}" for rate, score in scores.items())
        logger.info("%s: learning rate %g (%s)", arm, best, shown)
        if best in (min(scores), max(scores)):
            logger.warning("%s: the best learning rate %g is at the edge of those tried; try more.", arm, best)
        return best

    def _optimized(self, folder: Path, arm: str, rate: float | None, seed: int, start: Path) -> Stage:
        section = self.recipe.optimize
        run = folder / ("default" if rate is None else f"lr-{rate:g}")
        optimizing = Optimizing(
            run,
            start=lambda: load_model(start, None),
            rows=self.data.pairs,
            held_out=self.data.held_out,
            options={**section.options(arm, rate), "seed": seed},
            keeper=Keeper(run),
        )
        settings = {
            **section.described(arm, rate),
            "seed": seed,
            "data": section.data,
            "eval_data": section.eval_data,
        }
        done = optimizing.stage(f"optimize {arm}" + ("" if rate is None else f" at {rate:g}"), settings)
        self.result.note(done)
        return done

    def _score(self, run: Stage) -> float:
        """What `optimize.select` says of an arm's MLLM."""
        select = self.recipe.optimize.select
        if isinstance(select, str):
            measured: Mapping[str, float] = run.metrics.get("after", {})
            if select not in measured:
                metrics = ", ".join(measured) or "those of optimize.eval_data, which is not given"
                raise SettingsError(
                    f"optimize.select is {select!r}, which is no metric of held-out pairs.",
                    f"Choose of {metrics}, or a probe.",
                )
            return float(measured[select])
        model, processor = load_model(run.folder / MODEL_FOLDER, None)
        comparison = compare({"run": model}, self.parts.probings({SELECT: select}), processor=processor)
        return comparison.results["run"][SELECT].main.value
