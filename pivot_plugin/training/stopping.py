"""Several processes stop together when one is interrupted: after the same step, with a checkpoint of it."""

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import TrainingArguments

from .processes import Processes


class StopTogether(TrainerCallback):
    """Ends training in all processes after a step that they agree on, by a KeyboardInterrupt.

    A checkpoint is written first, unless the run writes none (`save_strategy="no"`).

    Args:
        trainer: of the run.
        processes: that run it.
        every: only after a multiple of so many steps can a run go on.
    """

    def __init__(self, trainer: Trainer, processes: Processes, every: int = 1) -> None:
        self._trainer = trainer
        self._processes = processes
        self._every = every
        self._stops = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        self._stops = self._processes.stops_after(state.global_step, self._every)
        if not self._stops:
            return None
        if args.save_strategy == SaveStrategy.NO:
            self._stop()
        control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stops:
            self._stop()

    def _stop(self) -> None:
        # none may leave, and have its launcher end the others, while one is still writing
        self._trainer.accelerator.wait_for_everyone()
        self._processes.in_step = True
        raise KeyboardInterrupt
