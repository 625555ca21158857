"""Scores of encoders and MLLMs of the paper's recipe: probes, and lmms-eval's benchmarks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pivot_plugin.encoders import load_encoder
from pivot_plugin.probes.benchmarks import run_benchmarks
from pivot_plugin.probes.comparison import Comparison, compare

from .inputs import Parts
from .sections import BENCHMARKS, Evaluation, Examined
from .stages import Stage, stage
from .transplant import load_transplant


@dataclass(frozen=True)
class Evaluated:
    """One encoder, or the MLLM it is in.

    Attributes:
        encoder: "original", "stage-1" or an arm.
        projector: variant of its transplant, "" for the others.
        folder: of what is examined.
    """

    encoder: str
    projector: str
    folder: Path

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return f"{self.encoder} {self.projector}".strip()


@dataclass(frozen=True)
class Evaluating:
    """The evaluation of everything of one kind.

    Attributes:
        folder: of the stage.
        of: what is examined.
        evaluations: by label.
        parts: of the recipe, for data that plugins make.
    """

    folder: Path
    of: Examined
    evaluations: Mapping[str, Evaluation]
    parts: Parts

    def stage(self, examined: list[Evaluated], seed: int) -> Stage:
        """Evaluate, or find it done; the outcome has a list of `scores` for each of the examined.

        Args:
            examined: what to evaluate.
            seed: of the recipe.
        """
        settings = {"evaluate": self.evaluations, "of": self.of, "seed": seed}
        return stage(f"evaluate {self.of}", self.folder, settings, lambda: self._work(examined))

    def _work(self, examined: list[Evaluated]) -> dict[str, Any]:
        comparison, told = Comparison(), []
        probes = self.parts.probings(self.evaluations)
        for one in examined:
            scores: dict[str, float] = {}
            if probes:
                scores |= self._probed(one, probes, comparison)
            for label, evaluation in self.evaluations.items():
                if evaluation.probe == BENCHMARKS:
                    scores |= self._benchmarks(label, evaluation, one)
            told.append({"encoder": one.encoder, "projector": one.projector, "scores": scores})
        if PartialState().is_main_process:
            comparison.save(self.folder / "comparison.json")
        return {"scores": told}

    def _probed(self, one: Evaluated, probes: Mapping[str, object], comparison: Comparison) -> dict[str, float]:
        if self.of == "encoder":
            model, processor = load_encoder(one.folder), None
        else:
            model, processor = load_transplant(one.folder)
        results = compare({one.name: model}, probes, processor=processor).results
        comparison.results |= results
        return {
            f"{label} {name}": score.value
            for label, result in results[one.name].items()
            for name, score in result.scores.items()
            # how far seeds of a probe lie apart is no score
            if not name.endswith("/spread")
        }

    def _benchmarks(self, label: str, evaluation: Evaluation, one: Evaluated) -> dict[str, float]:
        folder = self.folder / one.name.replace(" ", "-")
        results = run_benchmarks(str(one.folder), output_dir=folder, **evaluation.options)
        return {f"{label} {task}": next(iter(metrics.values())) for task, metrics in results.items() if metrics}
