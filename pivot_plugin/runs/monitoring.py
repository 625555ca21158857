"""Probes while a run goes on: before the first step, at chosen steps, and of what the run ends with."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.errors import PivotError, SettingsError
from pivot_plugin.probes.lookup import Runner, runners
from pivot_plugin.probes.scores import ProbeResult
from pivot_plugin.probes.storage import save_result, saved_results
from pivot_plugin.probes.subjects import Subject

logger = logging.getLogger(__name__)

SALIENCY = "saliency"


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
    """

    def __init__(
        self,
        trainer: Trainer,
        subject: Subject,
        probes: Mapping[str, object],
        steps: Sequence[int],
        saliency: object | None,
        folder: Path,
    ) -> None:
        self._trainer = trainer
        self._subject = subject
        self._folder = folder
        self._steps = set(steps)
        self._wanted = runners(probes) if probes else {}
        self._pairs = saliency if SALIENCY not in probes else None
        sharded = trainer.is_fsdp_enabled or (
            trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
        )
        if sharded and self._wanted:
            raise SettingsError(
                "Probes cannot run while the model's weights are divided among processes (FSDP, ZeRO-3).",
                "Leave out probes=, and run pivot.compare on the finished encoders.",
            )
        if sharded:
            self._pairs = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._record(state, 0, self._wanted, fatal=True)
        self._look(state, 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step in self._steps and state.global_step < state.max_steps:
            self._record(state, state.global_step, self._wanted, fatal=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # the best checkpoint is loaded by now
        self._record(state, state.global_step, self._wanted, fatal=False)
        self._look(state, state.global_step)

    def _look(self, state: TrainerState, step: int) -> None:
        """Keep gradient maps; nobody asked for them by name, so that they never stop a run."""
        if self._pairs is None:
            return
        # a reference would scale the maps of the DPO loss and not change them otherwise
        self._record(state, step, runners({SALIENCY: self._pairs}), fatal=False)

    def _record(self, state: TrainerState, step: int, wanted: Mapping[str, Runner], fatal: bool) -> None:
        if state.is_world_process_zero:
            # a resumed run has its beginning behind it
            known = saved_results(self._folder) if wanted and step == 0 else {}
            for label, run in wanted.items():
                if step == 0 and 0 in known.get(label, {}):
                    continue
                result = self._run(label, run, fatal)
                if result is not None:
                    save_result(self._folder, label, step, result)
                    self._log(state, label, step, result)
        self._trainer.accelerator.wait_for_everyone()

    def _run(self, label: str, run: Runner, fatal: bool) -> ProbeResult | None:
        try:
            with _undisturbed():
                return run(self._subject)
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

    def _log(self, state: TrainerState, label: str, step: int, result: ProbeResult) -> None:
        entry = {f"probe/{label}/{name}": score.value for name, score in result.scores.items()}
        state.log_history.append({"step": step, **entry})


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


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Measuring must not change what training draws."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
