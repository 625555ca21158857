"""The paper's comparison: the same pairs, order and steps, and the objective alone differs."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.data.pairs import PairDataset, load
from pivot_plugin.data.split import hold_out
from pivot_plugin.encoders.record import plain_name
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.files import read_record, write_whole
from pivot_plugin.models.loading import load_model
from pivot_plugin.objectives import ONLINE, resolve
from pivot_plugin.runs.result import PivotResult

from .runs import Keeper, Optimizing
from .stages import stage
from .tables import cell, markdown, mean_and_spread

Measure = Callable[[PreTrainedModel, ProcessorMixin], Mapping[str, float]]
ARMS_FILE = "arms.json"
MEASURED_FILE = "measured.json"
BASE = "base"


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed.

    Attributes:
        arm: objective, or "base" for the model before training.
        seed: of the order of pairs, the initialisation of LoRA and dropout.
        scores: measures by name.
        folder: of the run, with the encoder in it; None for the base.
    """

    arm: str
    seed: int
    scores: dict[str, float]
    folder: str | None = None


@dataclass
class ArmsComparison:
    """What arms came to.

    Attributes:
        runs: every arm with every seed, and the base.
    """

    runs: list[ArmRun] = field(default_factory=list)

    def summary(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Per arm and measure, mean and sample standard deviation over seeds (0 for a single run)."""
        return {
            arm: {name: mean_and_spread(values) for name, values in scores.items()}
            for arm, scores in self._values().items()
        }

    def table(self) -> str:
        """Arms by row, measures by column, mean and standard deviation over seeds, as markdown."""
        by_arm = self._values()
        names = list(dict.fromkeys(name for scores in by_arm.values() for name in scores))
        rows = []
        for arm, scores in by_arm.items():
            count = sum(run.arm == arm for run in self.runs)
            rows.append([arm, str(count), *(cell(scores[name]) if name in scores else "" for name in names)])
        return markdown(["arm", "runs", *names], rows)

    def __str__(self) -> str:
        return self.table()

    def _values(self) -> dict[str, dict[str, list[float]]]:
        """Per arm and measure, the values of its seeds."""
        by_arm: dict[str, dict[str, list[float]]] = {}
        for run in self.runs:
            scores = by_arm.setdefault(run.arm, {})
            for name, value in run.scores.items():
                scores.setdefault(name, []).append(value)
        return by_arm


def compare_arms(
    model: PreTrainedModel | str | Path,
    prefs: object,
    arms: Sequence[str] = ("sft", "dpo", "mpo"),
    seeds: int | Sequence[int] = 3,
    *,
    processor: ProcessorMixin | None = None,
    eval_prefs: object | None = None,
    eval_fraction: float = 0.02,
    output_dir: str | Path = "pivot-arms",
    learning_rates: Mapping[str, float] | None = None,
    measure: Measure | None = None,
    **settings: Any,
) -> ArmsComparison:
    """Run several objectives on the same pairs, in the same order, for the same steps, with several seeds.

    For a fair comparison each arm needs its own learning rate: give `learning_rates`, found on pairs that are not those
    reported (the paper: DPO wants a clearly smaller one than SFT).

    Args:
        model: a loaded MLLM, which is left as it is, or the path or Hub id of one.
        prefs: preference pairs, as for `optimize`; no stream.
        arms: objectives that learn from pairs.
        seeds: how many, or which.
        processor: as for `optimize`.
        eval_prefs, eval_fraction: held-out pairs, the same for all runs.
        output_dir: gets a folder per arm and seed with its encoder, and `arms.json`. Runs that are finished are not
            run again, one that was interrupted goes on.
        learning_rates: per arm; others take the default of their objective.
        measure: (model, processor) -> scores, taken of the base and of every trained model, beside the held-out pairs.
        **settings: as for `optimize`, the same for all arms.

    Returns:
        every run, and a table with mean and spread.

    Raises:
        SettingsError: for an unknown arm, or a folder with runs of other settings, pairs or another measure.
        DataError: for pairs that cannot be used.

    Source:
        arXiv 2510.16333, section 3.1: same start, same pairs, the loss and its learning rate differ.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    rates = dict(learning_rates or {})
    _check(arms, numbers, rates, settings)
    pairs = _random_access(prefs, "prefs").verify()
    # one split for all seeds, which differ in order and initialisation alone
    held_out = None if eval_prefs is None else _random_access(eval_prefs, "eval_prefs").verify()
    if held_out is None:
        pairs, held_out = hold_out(pairs, eval_fraction, seed=0)
    loaded, processor = load_model(model, processor)
    ground = _Ground(Path(output_dir), loaded, processor, pairs, held_out, measure)
    comparison = ArmsComparison()
    for seed in numbers:
        for arm in arms:
            rate = {"learning_rate": rates[arm]} if arm in rates else {}
            run = ground.run(arm, seed, settings | rate)
            if not comparison.runs:
                comparison.runs.append(ground.base(run))
            comparison.runs.append(run)
            _write(ground.folder / ARMS_FILE, [asdict(run) for run in comparison.runs])
    return comparison


class _Measuring(Keeper):
    """Keeps of a run what its held-out pairs and the user's measure say of it."""

    def __init__(self, folder: Path, measure: Measure | None) -> None:
        super().__init__(folder)
        self.measure = measure

    def keep(self, result: PivotResult) -> Mapping[str, Any]:
        scores = _after(result.metrics)
        if self.measure is not None:
            scores |= _measured(self.measure, result.model, result.processor)
        _write(self.folder / MEASURED_FILE, scores)
        return {"scores": scores}

    def kept(self, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if self.measure is not None:
            # of the trained model nothing but its encoder is left to be measured
            return None
        scores = _after(record["metrics"])
        _write(self.folder / MEASURED_FILE, scores)
        return {"scores": scores}


@dataclass(frozen=True)
class _Ground:
    """What all arms share."""

    folder: Path
    model: PreTrainedModel
    processor: ProcessorMixin
    pairs: PairDataset
    held_out: PairDataset | None
    measure: Measure | None

    def run(self, arm: str, seed: int, settings: Mapping[str, Any]) -> ArmRun:
        """One arm with one seed: run, gone on with, or found finished."""
        folder = self.folder / arm / f"seed-{seed}"
        options = {"objective": arm, "seed": seed, **settings}
        optimizing = Optimizing(
            folder,
            start=lambda: (copy.deepcopy(self.model), self.processor),
            rows=self.pairs,
            held_out=self.held_out,
            options=options if self.held_out is not None else options | {"eval_fraction": 0},
            keeper=_Measuring(folder, self.measure),
        )
        done = optimizing.stage(f"{arm}, seed {seed}", options | self._described())
        return ArmRun(arm, seed, done.outcome["scores"], str(folder))

    def base(self, run: ArmRun) -> ArmRun:
        """The model before training, on the same held-out pairs, which every run has measured.

        Args:
            run: one that has ended.
        """
        record = read_record(Path(run.folder or "."))
        scores = dict({"before": {}, **record["metrics"]}["before"]) if record is not None else {}
        if self.measure is not None:
            scores |= stage(BASE, self.folder / BASE, self._described(), self._measure_base).outcome["scores"]
        return ArmRun(BASE, 0, scores)

    def _measure_base(self) -> Mapping[str, Any]:
        assert self.measure is not None
        scores = _measured(self.measure, self.model, self.processor)
        _write(self.folder / f"{BASE}.json", scores)
        return {"scores": scores}

    def _described(self) -> dict[str, Any]:
        """What decides every run beside its options."""
        return {
            "model": plain_name(self.model.name_or_path),
            "pairs": self.pairs.fingerprint(),
            "held_out": None if self.held_out is None else self.held_out.fingerprint(),
            "measure": self.measure,
        }


def _check(arms: Sequence[str], seeds: list[int], rates: dict[str, float], settings: dict[str, Any]) -> None:
    if not arms or not seeds or len(set(arms)) < len(arms) or len(set(seeds)) < len(seeds):
        raise SettingsError(f"arms are {list(arms)}, seeds {seeds}.", "Give at least one of each, none of them twice.")
    for arm in arms:
        resolve(arm)
        if arm in ONLINE:
            raise SettingsError(
                f"The arm {arm!r} learns from questions, not from pairs.", "Run it by optimize, on the same model."
            )
    if strange := sorted(set(rates) - set(arms)):
        raise SettingsError(f"learning_rates names {strange}.", f"The arms are {', '.join(arms)}.")
    if taken := sorted({"seed", "output_dir", "objective", "resume"} & set(settings)):
        raise SettingsError(f"{taken[0]} is given for all arms.", "Arms and seeds decide it.")


def _random_access(prefs: object, name: str) -> PairDataset:
    pairs = load(prefs, name=name)
    if not isinstance(pairs, PairDataset):
        raise DataError(f"{name} is a stream.", "Arms need the same pairs: give a list, a data set or a file.")
    return pairs


def _after(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Held-out scores of a trained model; none where nothing was held out."""
    return dict(metrics["after"]) if "after" in metrics else {}


def _measured(measure: Measure, model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, float]:
    return {name: float(value) for name, value in measure(model, processor).items()}


def _write(path: Path, content: object) -> None:
    if PartialState().is_main_process:
        write_whole(path, json.dumps(content, indent=1))
