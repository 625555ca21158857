"""What a recipe will cost: optimiser steps from its numbers, tokens and time from a few steps of every kind."""

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pivot_plugin.config import TowerConfig
from pivot_plugin.data.conversations import ConversationDataset
from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.models.loading import load_model
from pivot_plugin.runs.instruct import ALIGN, GLOBAL_BATCH, INSTRUCT, align, instruct
from pivot_plugin.runs.optimize import optimize
from pivot_plugin.runs.settings import configuration, instruct_configuration

from .file import PivotRecipe
from .inputs import accumulated, declared_rows

logger = logging.getLogger(__name__)

MEASURED_STEPS = 3
OWN = ("data", "eval_data", "arms", "select", "image_folder", "learning_rate")


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
class Plan:
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
        names = ("stage", "runs", "rows", "batch", "steps", "tokens", "time of a run")
        rows = [names, *[_cells(stage) for stage in self.stages]]
        widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
        lines = [
            "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        total = "" if self.seconds is None else f"\nTraining in all: about {_time(self.seconds)}."
        return "\n".join(lines) + total

    def measured(
        self,
        recipe: PivotRecipe,
        start: Path,
        data: Mapping[str, ConversationDataset | PairDataset],
        folder: Path,
        known: Mapping[str, tuple[int, float]],
    ) -> "Plan":
        """The same plan with tokens and time, from a few steps of every kind on the assembled MLLM.

        Args:
            recipe: planned.
            start: folder of the assembled MLLM.
            data: by section of the recipe.
            folder: for the trial runs, deleted afterwards.
            known: by name of a stage, tokens and seconds of a run that has ended.
        """
        found = []
        for planned in self.stages:
            if planned.name in known:
                tokens, seconds = known[planned.name]
                found.append(replace(planned, tokens=tokens, seconds=seconds))
                continue
            section = "optimize" if planned.name.startswith("optimize") else planned.name.replace(" ", ".")
            found.append(_trial(planned, recipe, start, data[section], folder))
        if PartialState().is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        return Plan(tuple(found))


def plan_recipe(recipe: PivotRecipe, rows: Mapping[str, int] | None = None) -> Plan:
    """The optimiser steps of every stage; every setting is checked on the way.

    Args:
        recipe: to plan.
        rows: by section ("align", "instruct", "optimize", "transplant.align", "transplant.instruct") how many there
            are; what the recipe says of its data where not given.

    Raises:
        SettingsError: for a setting that does not exist or cannot be used.
    """
    known = dict(rows or {})
    moved = recipe.transplant or {}
    specs = {
        "align": recipe.align.get("data"),
        "instruct": recipe.instruct.get("data"),
        "optimize": recipe.optimize.get("data"),
        "transplant.align": (moved.get("align") or {}).get("data", recipe.align.get("data")),
        "transplant.instruct": (moved.get("instruct") or {}).get("data", recipe.instruct.get("data")),
    }
    sizes = {name: known.get(name, declared_rows(spec)) for name, spec in specs.items()}
    whole, optimized, seeds = _repeats(recipe)
    stages = [
        _tuning("align", recipe.align, ALIGN, "projector", sizes["align"], whole),
        _tuning("instruct", recipe.instruct, INSTRUCT, "all", sizes["instruct"], whole),
    ]
    for arm, own in recipe.optimize["arms"].items():
        rates = (own or {}).get("learning_rate", recipe.optimize.get("learning_rate"))
        tried = len(rates) if isinstance(rates, list | tuple) else 1
        # the first seed tries every rate, the others run at the best
        stages.append(_arm(arm, recipe, sizes["optimize"], optimized + tried - 1))
    if recipe.transplant is not None:
        variants = len(recipe.transplant.get("projectors") or ["0"])
        runs = seeds * (1 + variants * (1 + len(recipe.optimize["arms"])))
        for name, defaults in (("align", ALIGN), ("instruct", INSTRUCT)):
            section = recipe.transplant.get(name) or {}
            train = "projector" if name == "align" else "projector+language_model"
            stages.append(_tuning(f"transplant {name}", section, defaults, train, sizes[f"transplant.{name}"], runs))
    return Plan(tuple(stages))


def _repeats(recipe: PivotRecipe) -> tuple[int, int, int]:
    """How often the first stage, the arms and the transplants run."""
    seeds = len(recipe.seeds)
    return (
        seeds if recipe.seeds_from == "assemble" else 1,
        1 if recipe.seeds_from == "transplant" else seeds,
        seeds,
    )


def _tuning(
    name: str, section: Mapping[str, Any], defaults: Mapping[str, Any], train: Any, rows: int | None, runs: int
) -> PlannedStage:
    own = ("data", "image_folder", "eval_fraction", "on_bad_row", "train", "lora")
    settings = {key: value for key, value in accumulated(section).items() if key not in own}
    held_out = float(section.get("eval_fraction", 0.0))
    config = instruct_configuration(defaults, settings, Path(), section.get("train", train), held_out > 0, GLOBAL_BATCH)
    return _planned(name, config, rows, runs, 1 - held_out)


def _arm(arm: str, recipe: PivotRecipe, rows: int | None, runs: int) -> PlannedStage:
    own = dict(recipe.optimize["arms"][arm] or {})
    taken = (*OWN, "eval_fraction", "on_bad_row", "saliency", "train", "lora")
    settings = {
        key: value for key, value in accumulated({**recipe.optimize, **own}).items() if key not in (*taken, "objective")
    }
    rates = own.get("learning_rate", recipe.optimize.get("learning_rate"))
    for rate in rates if isinstance(rates, list | tuple) else [rates]:
        chosen = settings | ({} if rate is None else {"learning_rate": rate})
        config = configuration(
            *(chosen, Path(), own.get("objective", arm), recipe.optimize.get("train", "all")),
            *(recipe.optimize.get("lora") is not None, False),
        )
    share = 1.0 if "eval_data" in recipe.optimize else 1 - float(recipe.optimize.get("eval_fraction", 0.02))
    return _planned(f"optimize {arm}", config, rows, runs, share)


def _planned(name: str, config: TowerConfig, rows: int | None, runs: int, share: float) -> PlannedStage:
    batch = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps: int | None = None
    if config.max_steps > 0:
        steps = config.max_steps
    elif rows is not None:
        steps = math.ceil(math.ceil(rows * share / batch) * config.num_train_epochs)
    return PlannedStage(name, runs, rows, batch, steps)


def _trial(
    planned: PlannedStage,
    recipe: PivotRecipe,
    start: Path,
    data: ConversationDataset | PairDataset,
    folder: Path,
) -> PlannedStage:
    """A few steps, thrown away."""
    state = PartialState()
    place = folder / planned.name.replace(" ", "-")
    few = data.select(range(min(len(data), MEASURED_STEPS * planned.batch)))
    settings, verb, given = _settings_of(planned.name, recipe)
    settings = {
        k: v
        for k, v in accumulated(settings).items()
        if k not in (*OWN, "eval_fraction", "on_bad_row", "num_train_epochs")
    }
    settings |= {"max_steps": MEASURED_STEPS, "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
    try:
        model, processor = load_model(start, None)
        level = logging.getLogger("pivot_plugin").level
        logging.getLogger("pivot_plugin").setLevel(logging.WARNING)
        try:
            result = verb(model, few, processor=processor, output_dir=place, eval_fraction=0.0, **given, **settings)
        finally:
            logging.getLogger("pivot_plugin").setLevel(level)
    finally:
        if state.is_main_process:
            shutil.rmtree(place, ignore_errors=True)
        state.wait_for_everyone()
    runtime = next(entry["train_runtime"] for entry in reversed(result.history) if "train_runtime" in entry)
    steps = planned.steps or 0
    tokens = result.cost.language_tokens * state.num_processes
    return replace(planned, tokens=round(tokens / MEASURED_STEPS * steps), seconds=runtime / MEASURED_STEPS * steps)


def _settings_of(name: str, recipe: PivotRecipe) -> tuple[dict[str, Any], Callable[..., Any], dict[str, Any]]:
    """Settings of a stage, the verb that runs it, and what the recipe gives it beside them."""
    if name.startswith("optimize "):
        own = dict(recipe.optimize["arms"][name.removeprefix("optimize ")] or {})
        settings = {"objective": name.removeprefix("optimize "), "train": "all", "lora": None, **recipe.optimize, **own}
        return settings, optimize, {} if "saliency" in settings else {"saliency": 0}
    section: Mapping[str, Any] = {"align": recipe.align, "instruct": recipe.instruct}.get(name) or (
        (recipe.transplant or {}).get(name.removeprefix("transplant ")) or {}
    )
    if name.endswith("align"):
        return dict(section), align, {}
    train = "projector+language_model" if name.startswith("transplant") else "all"
    return {"train": train, **section}, instruct, {}


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
