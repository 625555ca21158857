"""Runs of `align`, `instruct` and `optimize` as stages: gone on with after a cut, and kept as a whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.data.conversations import ConversationDataset
from pivot_plugin.encoders.compatibility import rewrite_for_every_release
from pivot_plugin.files import RUN_FILE, read_record, whole_folder
from pivot_plugin.runs.leftovers import MODEL_FOLDER
from pivot_plugin.runs.optimize import optimize
from pivot_plugin.runs.result import PivotResult
from pivot_plugin.training.checkpoints import final_checkpoint

from .stages import Stage, stage

Start = Callable[[], tuple[PreTrainedModel, ProcessorMixin]]


def save_model(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write a model and its processor as a whole, once for all processes.

    Args:
        model: to write.
        processor: its own, or an image processor.
        folder: to be written, or replaced.
    """
    state = PartialState()
    if state.is_main_process:
        with whole_folder(folder) as aside:
            model.save_pretrained(aside)
            rewrite_for_every_release(aside)
            processor.save_pretrained(aside)
    state.wait_for_everyone()


class Keeper:
    """Keeps of a run of `optimize` its metrics and the whole model, in `model` beside its encoder.

    Args:
        folder: of the run.
        told: beside metrics, in the outcome of the stage.
    """

    def __init__(self, folder: Path, told: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.told = dict(told or {})
        self.model: PreTrainedModel | None = None

    def keep(self, result: PivotResult) -> Mapping[str, Any]:
        """Keep what a run left; returns the outcome of its stage."""
        save_model(result.model, result.processor, self.folder / MODEL_FOLDER)
        self.model = result.model
        return {"metrics": result.metrics, **self.told}

    def kept(self, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The outcome of a run that has finished, None if not all of it is kept.

        Args:
            record: of the run.
        """
        return {"metrics": record["metrics"], **self.told} if (self.folder / MODEL_FOLDER).is_dir() else None


@dataclass(frozen=True)
class Optimizing:
    """A run of `optimize` as a stage of a recipe.

    Attributes:
        folder: of the run.
        start: gives model and processor, to be trained in place; called only if there is something to train.
        rows: pairs or questions.
        held_out: the same; None holds out what the options say.
        options: of `optimize`.
        keeper: keeps what it leaves.
    """

    folder: Path
    start: Start
    rows: object
    held_out: object | None
    options: Mapping[str, Any]
    keeper: Keeper

    def stage(self, name: str, settings: Mapping[str, Any]) -> Stage:
        """Run it, go on with it, or find it done; arguments and errors as for `stages.stage`."""
        return stage(name, self.folder, settings, self._work)

    def _work(self) -> Mapping[str, Any]:
        record = read_record(self.folder)
        if record is not None and record["finished"]:
            # it was cut off after the run itself
            kept = self.keeper.kept(record)
            if kept is not None:
                return kept
            if final_checkpoint(self.folder, record["history"]) is None:
                # nothing is left that its model could be taken from
                (self.folder / RUN_FILE).unlink(missing_ok=True)
                record = None
        model, processor = self.start()
        held_out = {} if self.held_out is None else {"eval_prefs": self.held_out, "eval_fraction": 0}
        options: dict[str, Any] = {**self.options, **held_out}
        result = optimize(
            model, self.rows, processor=processor, output_dir=self.folder, resume=record is not None, **options
        )
        return self.keeper.keep(result)


def tune(
    verb: Callable[..., Any], folder: Path, start: Start, rows: ConversationDataset, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Run `align` or `instruct`, go on with it, or find it done; the outcome of its stage.

    Args:
        verb: which of them.
        folder: of the run.
        start: gives model and processor, to be trained in place; called only if there is something to train.
        rows: to train on.
        options: of the verb.
    """
    record = read_record(folder)
    if record is not None and record["finished"]:
        history = record["history"]
    else:
        model, processor = start()
        history = verb(
            model, rows, processor=processor, output_dir=folder, resume=record is not None, **options
        ).history
    return {"loss": _last(history, "loss"), "steps": _last(history, "step")}


def _last(history: Sequence[Mapping[str, float]], name: str) -> float | None:
    """The last value of a name in a trainer's log."""
    return next((entry[name] for entry in reversed(history) if name in entry), None)
