"""Ctrl-C while a run trains: the step is finished and a checkpoint is written, so that nothing paid for is lost."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

logger = logging.getLogger(__name__)


class _StopBehindCheckpoint(TrainerCallback):
    """Ends a run behind the next checkpoint, once it is asked to.

    Args:
        every: checkpoints after a multiple of so many steps can be gone on from.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self.asked = False
        self.in_steps = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.in_steps = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked and state.global_step % self._every == 0:
            control.should_save, control.should_evaluate = True, False
        # behind the last step nothing is left to finish
        self.in_steps = self.in_steps and not control.should_training_stop

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.in_steps = self.in_steps and not control.should_training_stop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def interruptible(trainer: Trainer, every: int) -> Iterator[None]:
    """Train meanwhile so that a first Ctrl-C ends it behind a checkpoint; a second one ends it at once.

    Of several processes each would stop at a step of its own, and outside of the main thread none is told: there a
    Ctrl-C ends training at once, as ever.

    Args:
        trainer: that trains.
        every: as for `_StopBehindCheckpoint`.
    """
    if trainer.args.world_size > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = _StopBehindCheckpoint(every)
    trainer.add_callback(stop)
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked or not stop.in_steps:
            raise KeyboardInterrupt
        stop.asked = True
        logger.warning("Interrupted: this step is finished and a checkpoint written. Ctrl-C again stops at once.")

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        # None stands for a handler that was not set from Python
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
        trainer.remove_callback(stop)
