"""The paper's comparison: the same pairs, order and steps, and the objective alone differs."""

import copy
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.data.pairs import PairDataset, load
from pivot_plugin.data.split import hold_out
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.files import read_record, write_whole
from pivot_plugin.models.loading import load_model
from pivot_plugin.objectives import ONLINE, resolve
from pivot_plugin.runs.optimize import optimize
from pivot_plugin.runs.result import PivotResult

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
        by_arm: dict[str, list[ArmRun]] = {}
        for run in self.runs:
            by_arm.setdefault(run.arm, []).append(run)
        return {
            arm: {
                name: _mean_and_spread([run.scores[name] for run in runs if name in run.scores])
                for name in runs[0].scores
            }
            for arm, runs in by_arm.items()
        }

    def table(self) -> str:
        """Arms by row, measures by column, mean and standard deviation over seeds, as markdown."""
        summary = self.summary()
        names = list(dict.fromkeys(name for scores in summary.values() for name in scores))
        lines = [f"| arm | runs | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
        for arm, scores in summary.items():
            count = sum(run.arm == arm for run in self.runs)
            cells = [_cell(*scores[name], count) if name in scores else "" for name in names]
            lines.append(f"| {arm} | {count} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _cell(mean: float, spread: float, count: int) -> str:
    return f"{mean:.3f} ± {spread:.3f}" if count > 1 else f"{mean:.3f}"


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
        SettingsError: for an unknown arm, or a folder with runs of other settings.

    Source:
        arXiv 2510.16333, section 3.1: same start, same pairs, the loss and its learning rate differ.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    rates = dict(learning_rates or {})
    _check(arms, numbers, rates, settings)
    pairs = load(prefs)
    if not isinstance(pairs, PairDataset):
        raise DataError("prefs is a stream.", "Arms need the same pairs: give a list, a data set or a file.")
    held_out = load(eval_prefs, name="eval_prefs") if eval_prefs is not None else None
    if held_out is None:
        # one split for all seeds, which differ in order and initialisation alone
        pairs, held_out = hold_out(pairs.verify(), eval_fraction, seed=0)
    loaded, processor = load_model(model, processor)
    folder = Path(output_dir)
    comparison = ArmsComparison()
    for seed in numbers:
        for arm in arms:
            place = folder / arm / f"seed-{seed}"
            chosen = settings | {"seed": seed} | ({"learning_rate": rates[arm]} if arm in rates else {})
            scores = _finished(place, arm, chosen)
            if scores is None:
                result = optimize(
                    copy.deepcopy(loaded),
                    pairs,
                    processor=processor,
                    eval_prefs=held_out,
                    eval_fraction=0,
                    output_dir=place,
                    objective=arm,
                    resume=read_record(place) is not None,
                    **chosen,
                )
                scores = _measured(result, measure)
            if not comparison.runs:
                comparison.runs.append(_base(folder, place, loaded, processor, measure))
            comparison.runs.append(ArmRun(arm, seed, scores, str(place)))
            _write(folder / ARMS_FILE, [asdict(run) for run in comparison.runs])
    return comparison


def _check(arms: Sequence[str], seeds: list[int], rates: dict[str, float], settings: dict[str, Any]) -> None:
    if not arms or not seeds or len(set(arms)) < len(arms) or len(set(seeds)) < len(seeds):
        raise SettingsError(f"arms are {list(arms)}, seeds {seeds}.", "Give at least one of each, none of them twice.")
    for arm in arms:
        resolve(arm)
        if arm in ONLINE:
            raise SettingsError(
                f"The arm {arm!r} learns from questions, not from pairs.", "Run it by optimize, on the same model."
            )
    if unknown := sorted(set(rates) - set(arms)):
        raise SettingsError(f"learning_rates names {unknown}.", f"The arms are {', '.join(arms)}.")
    if taken := sorted({"seed", "output_dir", "objective", "resume"} & set(settings)):
        raise SettingsError(f"{taken[0]} is given for all arms.", "Arms and seeds decide it.")


def _finished(place: Path, arm: str, chosen: dict[str, Any]) -> dict[str, float] | None:
    """The scores of a run that is finished and measured, if it had these settings."""
    record = read_record(place)
    measured = place / MEASURED_FILE
    if record is None or not record.get("finished") or not measured.exists():
        return None
    had = record["settings"]
    now = json.loads(json.dumps({"objective": arm, **chosen}, default=str))
    if differing := sorted(name for name, value in now.items() if had.get(name) != value):
        name = differing[0]
        raise SettingsError(
            f"The run in {str(place)!r} had {name}={had.get(name)!r}, now it is {now[name]!r}.",
            "Choose another output_dir, delete this one, or use the same settings.",
        )
    scores: dict[str, float] = json.loads(measured.read_text())
    return scores


def _measured(result: PivotResult, measure: Measure | None) -> dict[str, float]:
    scores = dict(result.metrics.get("after", {}))
    if measure is not None:
        scores |= {name: float(value) for name, value in measure(result.model, result.processor).items()}
    _write(result.output_dir / MEASURED_FILE, scores)
    return scores


def _base(
    folder: Path, run: Path, model: PreTrainedModel, processor: ProcessorMixin, measure: Measure | None
) -> ArmRun:
    """The model before training, on the same held-out pairs, which every run has measured."""
    record = read_record(run) or {}
    scores = dict(record.get("metrics", {}).get("before", {}))
    kept = folder / f"{BASE}.json"
    if measure is not None:
        if not kept.exists():
            _write(kept, {name: float(value) for name, value in measure(model, processor).items()})
        scores |= json.loads(kept.read_text())
    return ArmRun(BASE, 0, scores)


def _write(path: Path, content: object) -> None:
    write_whole(path, json.dumps(content, indent=1))
