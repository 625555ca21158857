"""What a recipe will cost: optimiser steps from its numbers, tokens and time from a few steps of every kind."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState

from pivot_plugin.config import TowerConfig
from pivot_plugin.data.conversations import ConversationDataset
from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.errors import SettingsError
from pivot_plugin.models.loading import load_model
from pivot_plugin.runs.instruct import ALIGN, GLOBAL_BATCH, INSTRUCT, align, instruct
from pivot_plugin.runs.optimize import optimize
from pivot_plugin.runs.settings import configuration, instruct_configuration

from .door import Key, RecipeError
from .sections import Optimization, PivotRecipe, Tuning, declared_rows

logger = logging.getLogger(__name__)

MEASURED_STEPS = 3
# of a trial: no checkpoints, no evaluation, no log
TRIAL = {"max_steps": MEASURED_STEPS, "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
HEADER = ("stage", "runs", "rows", "batch", "steps", "tokens", "time of a run")


@dataclass(frozen=True)
class PlannedStage:
    """What one stage will cost.

    Attributes:
        name: "align", "instruct", "optimize <arm>", "transplant align" or "transplant instruct".
        runs: how often it runs, over seeds, learning rates, encoders and projectors.
        rows: of its data, None where nobody knows.
        batch: rows of an optimiser step, over all processes.
        steps: optimiser steps of one run, None where the rows are not known.
        tokens: that the language model reads in one run; None before a step is measured.
        seconds: of one run; None before a step is measured.
    """

    name: str
    runs: int
    rows: int | None
    batch: int
    steps: int | None
    tokens: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class RecipePlan:
    """What a recipe will cost.

    Attributes:
        stages: that train, in order.
    """

    stages: tuple[PlannedStage, ...]

    @property
    def seconds(self) -> float | None:
        """Of everything that trains; None before steps are measured."""
        known = [stage.seconds * stage.runs for stage in self.stages if stage.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"stages": [vars(stage) for stage in self.stages], "seconds": self.seconds}

    def __str__(self) -> str:
        rows = [HEADER, *[_cells(stage) for stage in self.stages]]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        lines = []
        for first, *others in rows:
            numbers = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *numbers]))
        total = "" if self.seconds is None else f"\nTraining in all: about {_time(self.seconds)}."
        return "\n".join(lines) + total

    def measured(
        self,
        recipe: PivotRecipe,
        start: Path,
        data: Mapping[str, ConversationDataset | PairDataset],
        folder: Path,
        ended: Mapping[str, tuple[int, float]],
    ) -> "RecipePlan":
        """The same plan with tokens and time, from a few steps of every kind on the assembled MLLM.

        Args:
            recipe: planned.
            start: folder of the assembled MLLM.
            data: by section of the recipe.
            folder: for the trial runs, deleted afterwards.
            ended: by name of a stage, tokens and seconds of a run that has ended.
        """
        jobs = {job.name: job for job in _jobs(recipe)}
        stages = []
        for planned in self.stages:
            if planned.name in ended:
                tokens, seconds = ended[planned.name]
                stages.append(replace(planned, tokens=tokens, seconds=seconds))
                continue
            job = jobs[planned.name]
            rows = data[job.section]
            few = rows.select(range(min(len(rows), MEASURED_STEPS * planned.batch)))
            stages.append(_tried(planned, job, start, few, folder / planned.name.replace(" ", "-")))
        if PartialState().is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        return RecipePlan(tuple(stages))


class PlansItself(Protocol):
    """A recipe of another kind."""

    def plan(self, rows: int | None = None) -> RecipePlan: ...


def plan_recipe(recipe: PivotRecipe | PlansItself, rows: Mapping[str, int] | None = None) -> RecipePlan:
    """The optimiser steps of every stage; every setting is checked on the way.

    Args:
        recipe: to plan.
        rows: by section ("align", "instruct", "optimize", "transplant.align", "transplant.instruct"; "data" of a recipe
            that begins with an MLLM) how many there are; what the recipe says of its data where not given.

    Raises:
        SettingsError: for a setting that does not exist or cannot be used.
    """
    if not isinstance(recipe, PivotRecipe):
        return recipe.plan((rows or {}).get("data"))
    sizes = {name: declared_rows(data) for name, data in _data(recipe).items()} | dict(rows or {})
    return RecipePlan(tuple(job.planned(sizes[job.section]) for job in _jobs(recipe)))


def check_settings(recipe: PivotRecipe) -> None:
    """Make sure that every trainer can be given the settings of its section; nothing is opened.

    Whether a batch can be made up depends on how many processes there will be, and is left to the plan.

    Args:
        recipe: to look at.

    Raises:
        RecipeError: naming section and setting.
    """
    moved = recipe.transplant
    if moved is not None:
        moved = replace(moved, align=replace(moved.align, batch=None), instruct=replace(moved.instruct, batch=None))
    _jobs(
        replace(
            recipe,
            align=replace(recipe.align, batch=None),
            instruct=replace(recipe.instruct, batch=None),
            optimize=replace(recipe.optimize, batch=None),
            transplant=moved,
        )
    )


@contextmanager
def _named(key: Key) -> Iterator[None]:
    """Errors of a trainer's settings, with the section that they stand in."""
    try:
        yield
    except RecipeError:
        raise
    except SettingsError as error:
        raise RecipeError(f"{'.'.join(key)}: {error.finding}", error.remedy, key) from error


@dataclass(frozen=True)
class _Job:
    """A kind of run that the recipe asks for.

    Attributes:
        name: of the planned stage.
        section: of the recipe, in dots.
        runs: how often it runs.
        verb: that runs it.
        options: of the verb.
        configs: of the trainer, one per learning rate.
        share: of the rows that trains.
    """

    name: str
    section: str
    runs: int
    verb: Callable[..., Any]
    options: Mapping[str, Any]
    configs: tuple[TowerConfig, ...]
    share: float

    def planned(self, rows: int | None) -> PlannedStage:
        """Its steps on so many rows."""
        config = self.configs[0]
        batch = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        steps: int | None = None
        if config.max_steps > 0:
            steps = config.max_steps
        elif rows is not None:
            steps = math.ceil(math.ceil(rows * self.share / batch) * config.num_train_epochs)
        return PlannedStage(self.name, self.runs, rows, batch, steps)


def _jobs(recipe: PivotRecipe) -> list[_Job]:
    """Every kind of run, in order, its settings checked."""
    seeds, arms = len(recipe.seeds), recipe.optimize.arms
    of_first = seeds if recipe.seeds_from == "assemble" else 1
    of_arms = 1 if recipe.seeds_from == "transplant" else seeds
    jobs = [_tuning("align", recipe.align, of_first), _tuning("instruct", recipe.instruct, of_first)]
    # the first seed tries every rate, the others run at the best
    jobs += [_arm(arm, recipe.optimize, of_arms + len(recipe.optimize.rates(arm)) - 1) for arm in arms]
    if recipe.transplant is not None:
        # the original, for which no projector was tuned, is moved once
        of_moved = seeds * (1 + len(recipe.transplant.projectors) * (1 + len(arms)))
        jobs.append(_tuning("transplant.align", recipe.transplant.align, of_moved))
        jobs.append(_tuning("transplant.instruct", recipe.transplant.instruct, of_moved))
    return jobs


def _data(recipe: PivotRecipe) -> dict[str, object]:
    """Data by section; a transplant without its own has those of the first MLLM."""
    data = {"align": recipe.align.data, "instruct": recipe.instruct.data, "optimize": recipe.optimize.data}
    for name, section in _moved(recipe).items():
        data[f"transplant.{name}"] = data[name] if section.data is None else section.data
    return data


def _moved(recipe: PivotRecipe) -> dict[str, Tuning]:
    moved = recipe.transplant
    return {} if moved is None else {"align": moved.align, "instruct": moved.instruct}


def _tuning(section: str, tuning: Tuning, runs: int) -> _Job:
    aligns = section.endswith("align")
    with _named(tuple(section.split("."))):
        options = tuning.options()
        config = instruct_configuration(
            defaults=ALIGN if aligns else INSTRUCT,
            settings=tuning.trainer(),
            folder=Path(),
            train="projector" if aligns else options["train"],
            held_out=tuning.eval_fraction > 0,
            batch=GLOBAL_BATCH,
        )
    return _Job(
        name=section.replace(".", " "),
        section=section,
        runs=runs,
        verb=align if aligns else instruct,
        options=options,
        configs=(config,),
        share=1 - tuning.eval_fraction,
    )


def _arm(arm: str, section: Optimization, runs: int) -> _Job:
    rates = section.rates(arm)
    with _named(("optimize", "arms", arm)):
        options = section.options(arm, rates[0])
        configs = [
            configuration(
                settings=section.trainer(arm, rate),
                folder=Path(),
                objective=options["objective"],
                train=options["train"],
                lora=section.lora is not None,
                held_out=False,
            )
            for rate in rates
        ]
    return _Job(
        name=f"optimize {arm}",
        section="optimize",
        runs=runs,
        verb=optimize,
        options=options,
        configs=tuple(configs),
        share=1.0 if section.eval_data is not None else 1 - section.eval_fraction,
    )


def _tried(
    planned: PlannedStage, job: _Job, start: Path, few: ConversationDataset | PairDataset, folder: Path
) -> PlannedStage:
    """A plan with the cost of a few steps, which are thrown away."""
    state = PartialState()
    # epochs would end a trial on few rows before its steps are taken
    options = {name: value for name, value in job.options.items() if name != "num_train_epochs"}
    options |= {**TRIAL, "eval_fraction": 0.0}
    model, processor = load_model(start, None)
    try:
        with _quiet():
            result = job.verb(model, few, processor=processor, output_dir=folder, **options)
    finally:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        state.wait_for_everyone()
    runtime = next(entry["train_runtime"] for entry in reversed(result.history) if "train_runtime" in entry)
    scale = (planned.steps or 0) / MEASURED_STEPS
    tokens = result.cost.language_tokens * state.num_processes
    return replace(planned, tokens=round(tokens * scale), seconds=runtime * scale)


@contextmanager
def _quiet() -> Iterator[None]:
    """Trials are not told of as runs are."""
    ours = logging.getLogger("pivot_plugin")
    level = ours.level
    ours.setLevel(logging.WARNING)
    try:
        yield
    finally:
        ours.setLevel(level)


def _cells(stage: PlannedStage) -> tuple[str, ...]:
    def number(value: int | None) -> str:
        return "?" if value is None else f"{value:,}"

    time = "?" if stage.seconds is None else _time(stage.seconds)
    tokens = "?" if stage.tokens is None else f"{stage.tokens / 1e6:,.1f} M"
    return (stage.name, str(stage.runs), number(stage.rows), str(stage.batch), number(stage.steps), tokens, time)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
