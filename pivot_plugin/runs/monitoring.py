"""What is looked at while a run goes on, beside the held-out rows: probes, gradient maps, rows of other distributions.

Nothing here changes what is trained: measuring leaves random numbers and the model as they were.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from pivot_plugin.data.launch import this_launch
from pivot_plugin.data.pairs import PairDataset, load_pairs
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.data.rows import RowDataset
from pivot_plugin.errors import PivotError, SettingsError
from pivot_plugin.models.evaluating import undisturbed
from pivot_plugin.probes.generalization import FACTOR, ID, OOD, generalization_factor
from pivot_plugin.probes.lookup import Runner, runners
from pivot_plugin.probes.scores import ProbeResult
from pivot_plugin.probes.storage import save_result, saved_results
from pivot_plugin.probes.subjects import Subject
from pivot_plugin.report import saliency_sheet
from pivot_plugin.training.pair_trainer import PivotTrainer
from pivot_plugin.training.rollout_trainer import Rollouts

from .run import Run
from .trackers import SALIENCY_SHEET, show_picture, takes_pictures

logger = logging.getLogger(__name__)

SALIENCY = "saliency"


@dataclass(frozen=True)
class Monitoring:
    """What is looked at while a run goes on.

    Attributes:
        probes: as for `pivot.compare`, None for none.
        steps: optimiser steps at which to run them, beside before and after.
        saliency: how many held-out pairs with images have their gradient maps kept, before and after.
        outside: rows of other distributions, by name.

    Raises:
        SettingsError: for a probe that does not exist, or numbers that cannot be.
    """

    probes: Mapping[str, object] | None
    steps: Sequence[int]
    saliency: int
    outside: Mapping[str, RowDataset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.saliency < 0 or any(step < 1 for step in self.steps):
            raise SettingsError(
                f"saliency is {self.saliency}, probe_steps {list(self.steps)}.",
                "Give 0 or more pairs, steps of 1 or more.",
            )
        if self.probes is not None:
            runners(self.probes)

    def with_outside(self, ood_prefs: object | None, run: Run) -> "Monitoring":
        """The same with rows of other distributions, read and looked at.

        Args:
            ood_prefs: rows, or a dict of such by name; None for none.
            run: whose held-out rows they are compared with.

        Raises:
            SettingsError: if no row is held out to compare with.
            DataError: for rows that cannot be used, and streams.
        """
        if ood_prefs is None:
            return self
        if run.held_out is None:
            raise SettingsError(
                "ood_prefs are given, and no row is held out to compare with.", "Give eval_prefs= or an eval_fraction."
            )
        sources = ood_prefs if isinstance(ood_prefs, dict) else {"ood_prefs": ood_prefs}
        questions = isinstance(run.rows, QuestionDataset)
        outside: dict[str, RowDataset] = {}
        for name, source in sources.items():
            rows = load_questions(source, name) if questions else load_pairs(source, name)
            outside[name] = rows.verify(launch=this_launch())
        return replace(self, outside=outside)

    def add_to(self, trainer: PivotTrainer | Rollouts, run: Run) -> None:
        """Have a trainer look at all this.

        Args:
            trainer: of the run, before it trains.
            run: in whose folder the findings are kept.

        Raises:
            SettingsError: for probes while the model's weights are divided among processes.
        """
        if self.outside and run.held_out is not None:
            trainer.add_callback(GeneralizationRecorder(trainer, run.held_out, self.outside))
        pairs = first_with_images(run.held_out, self.saliency) if isinstance(run.held_out, PairDataset) else None
        if self.probes or pairs is not None:
            image_processor = run.adapter.image_processor(run.processor)
            subject = Subject("model", run.adapter, image_processor, run.processor)
            recorder = ProbeRecorder(trainer, subject, self.probes or {}, self.steps, pairs, run.output_dir)
            # before trackers, which close when training ends, are told so: the last scores are theirs, too
            trainer.callback_handler.callbacks.insert(0, recorder)


class ProbeRecorder(TrainerCallback):
    """Runs probes and keeps what they find: in the run's folder, and in the log under "probe/<label>/<score>".

    A probe that fails before training stops the run; one that fails later is named in a warning and left out.

    Args:
        trainer: of the run.
        subject: the model in training.
        probes: as for `pivot.compare`.
        steps: at which to run them, beside before and after.
        saliency: pairs whose gradient maps are kept before and after, for the report; None for none.
        folder: of the run.

    Raises:
        SettingsError: for probes while the model's weights are divided among processes.
    """

    def __init__(
        self,
        trainer: Trainer,
        subject: Subject,
        probes: Mapping[str, object],
        steps: Sequence[int],
        saliency: PairDataset | None,
        folder: Path,
    ) -> None:
        self._trainer = trainer
        self._subject = subject
        self._folder = folder
        self._steps = set(steps)
        self._runners = runners(probes) if probes else {}
        self._pairs = saliency if SALIENCY not in probes else None
        sharded = trainer.is_fsdp_enabled or (
            trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
        )
        if sharded and self._runners:
            raise SettingsError(
                "Probes cannot run while the model's weights are divided among processes (FSDP, ZeRO-3).",
                "Leave out probes=, and run pivot.compare on the finished encoders.",
            )
        if sharded:
            self._pairs = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._record(state, 0, self._runners, fatal=True)
        self._keep_maps(state, 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step in self._steps and state.global_step < state.max_steps:
            self._record(state, state.global_step, self._runners, fatal=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # the best checkpoint is loaded by now
        self._record(state, state.global_step, self._runners, fatal=False)
        self._keep_maps(state, state.global_step)
        if state.is_world_process_zero:
            self._show_maps(state.global_step)

    def _show_maps(self, step: int) -> None:
        """Show trackers the maps of before and after, where some were kept."""
        trackers = self._trainer.callback_handler.callbacks
        if not takes_pictures(trackers):
            return
        sheet = saliency_sheet(saved_results(self._folder))
        if sheet is not None:
            logger.info("Trackers are shown held-out pictures, under the gradients of the loss; saliency=0 keeps them.")
            show_picture(trackers, SALIENCY_SHEET, sheet, step)

    def _keep_maps(self, state: TrainerState, step: int) -> None:
        """Keep gradient maps, which never stop a run: nobody has named them."""
        if self._pairs is None:
            return
        # a reference would scale the maps of the DPO loss and not change them otherwise
        self._record(state, step, runners({SALIENCY: self._pairs}), fatal=False)

    def _record(self, state: TrainerState, step: int, to_run: Mapping[str, Runner], fatal: bool) -> None:
        if state.is_world_process_zero:
            # a resumed run has its beginning behind it
            earlier = saved_results(self._folder) if to_run and step == 0 else {}
            for label, runner in to_run.items():
                if step == 0 and 0 in earlier.get(label, {}):
                    continue
                result = self._run(label, runner, fatal)
                if result is not None:
                    save_result(self._folder, label, step, result)
                    self._log(label, result)
        self._trainer.accelerator.wait_for_everyone()

    def _run(self, label: str, runner: Runner, fatal: bool) -> ProbeResult | None:
        try:
            with undisturbed():
                return runner(self._subject)
        except Exception as error:
            if fatal and isinstance(error, PivotError):
                raise
            if fatal:
                raise SettingsError(
                    f"Probe {label!r} failed before training: {type(error).__name__}: {error}.",
                    "Mend it or leave it out.",
                ) from error
            # the run is paid for, a probe can be repeated on its encoder
            logger.warning("Probe %r failed and is left out: %s: %s", label, type(error).__name__, error)
            return None

    def _log(self, label: str, result: ProbeResult) -> None:
        entry = {f"probe/{label}/{name}": score.value for name, score in result.scores.items()}
        # trackers are told too; not by TRL's own `log`, which would add what it has gathered of the steps so far
        Trainer.log(self._trainer, entry)


class Scoring(Protocol):
    """A trainer that can put one number on rows and log it."""

    def mean_score(self, rows: Any, /) -> float: ...

    def log(self, logs: dict[str, float]) -> None: ...


class GeneralizationRecorder(TrainerCallback):
    """Scores held-out rows and rows of other distributions before training and at every evaluation, into the log.

    Args:
        trainer: scores rows by `mean_score`: preference accuracy of pairs, mean reward of greedy answers to questions.
        inside: held-out rows of the training distribution.
        outside: rows of other distributions, by name; their mean is the score out of distribution.
    """

    def __init__(self, trainer: Scoring, inside: RowDataset, outside: Mapping[str, RowDataset]) -> None:
        self._trainer = trainer
        self._inside = inside
        self._outside = outside

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # a resumed run has this behind it
        if not any(FACTOR in entry for entry in state.log_history):
            self._record(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step:
            self._record(state)

    def _record(self, state: TrainerState) -> None:
        scores = {name: self._trainer.mean_score(rows) for name, rows in self._outside.items()}
        entry = {
            ID: self._trainer.mean_score(self._inside),
            OOD: sum(scores.values()) / len(scores),
            **{f"{OOD}/{name}": score for name, score in scores.items() if len(scores) > 1},
        }
        earlier = [logged for logged in state.log_history if FACTOR in logged]
        series = [[*(logged[name] for logged in earlier), entry[name]] for name in (ID, OOD)]
        entry[FACTOR] = float(generalization_factor(series[0], series[1])[-1])
        self._trainer.log(entry)


def first_with_images(pairs: PairDataset, count: int) -> PairDataset | None:
    """The first pairs that show an image of their own, None where there are none.

    Args:
        pairs: looked at already.
        count: how many at most.
    """
    seen: set[bytes] = set()
    chosen: list[int] = []
    for position, key in enumerate(pairs.image_keys.tolist()):
        if len(chosen) < count and key and key not in seen:
            seen.add(key)
            chosen.append(position)
    return pairs.select(chosen) if chosen else None
