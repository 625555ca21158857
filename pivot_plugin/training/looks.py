"""Looks at the held-out rows: what each row scored, what was kept, and when a run is stopped.

The looks themselves and the best checkpoint are transformers' own (`eval_strategy`, `load_best_model_at_end`). Here
stands what it does not do: the start is a candidate, no look is taken before the learning rate has grown, and a look
counts against patience only where the held-out rows agree that it is worse.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

# one-sided 95 %
BEYOND = 1.645
ENOUGH_ROWS = 4


@dataclass(frozen=True)
class Look:
    """What held-out rows say of the model at one moment.

    Attributes:
        measure: name of the score that decides: "preference accuracy" or "reward".
        metrics: what is told of it, by name.
        rows: the score of each row, in their order: (n,) whose mean is the score, or (n, K, 2) of ratios of sums, as in
            `probes.scores`.
        chance: the score of guessing, None where it is not known.
    """

    measure: str
    metrics: dict[str, float]
    rows: np.ndarray
    chance: float | None = None


def beyond_noise(first: np.ndarray, second: np.ndarray) -> bool | None:
    """Whether a second look at the same rows is lower than a first by more than the rows' noise.

    Args:
        first, second: (n,) higher is better.

    Returns:
        None where the rows are too few, or not the same.
    """
    if len(first) != len(second) or len(first) < ENOUGH_ROWS:
        return None
    fall = first - second
    error = float(fall.std(ddof=1)) / len(fall) ** 0.5
    # rows that all fall by the same have no spread
    return bool(fall.mean() > BEYOND * error and fall.mean() > 0)


class Patience(EarlyStoppingCallback):
    """Stops a run after so many looks in a row that are worse than the best one beyond the noise of the rows.

    A look counts where the metric is no better than the best, as in transformers, and the paired change over the rows
    says so too; a plateau stops nothing. Where rows are not told apart (conversations), the metric alone decides.

    Args:
        early_stopping_patience, early_stopping_threshold: as transformers takes them.
    """

    early_stopping_patience_counter: int

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.best_rows: list[float] = []
        # of the look that is being judged; the trainer sets it before callbacks are told of the look
        self.rows: np.ndarray = np.zeros(0)

    def check_metric_value(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metric_value: float
    ) -> None:
        before = self.early_stopping_patience_counter
        better = state.best_metric is None or (
            metric_value > state.best_metric if args.greater_is_better else metric_value < state.best_metric
        )
        super().check_metric_value(args, state, control, metric_value)
        if self.early_stopping_patience_counter > before and self._within_noise():
            self.early_stopping_patience_counter = 0
        if better:
            self.best_rows = [round(float(value), 6) for value in self.rows]

    def _within_noise(self) -> bool:
        return beyond_noise(np.asarray(self.best_rows), self.rows) is False

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        known: dict[str, Any] = super().state()
        known["attributes"]["best_rows"] = self.best_rows
        return known


class AfterWarmUp(TrainerCallback):
    """Takes no look before the learning rate has grown: a first step at a rate of 0 shows the start again."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        warm = args.get_warmup_steps(state.max_steps)
        if not args.eval_delay and 0 < warm < state.max_steps and args.eval_strategy == "steps":
            args.eval_delay = warm + 1
