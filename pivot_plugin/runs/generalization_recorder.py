"""Scores in and out of distribution while a run goes on, and their Generalisation Factor."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.data.questions import QuestionDataset
from pivot_plugin.probes.generalization import FACTOR, ID, OOD, generalization_factor

if TYPE_CHECKING:
    from pivot_plugin.training.pair_trainer import PivotTrainer
    from pivot_plugin.training.rollout_trainer import Rollouts


class GeneralizationRecorder(TrainerCallback):
    """Scores held-out rows and rows of other distributions before training and at every evaluation, into the log.

    Args:
        trainer: scores rows by `mean_score`: preference accuracy of pairs, mean reward of greedy answers to questions.
        inside: held-out rows of the training distribution.
        outside: rows of other distributions, by name; their mean is the score out of distribution.
    """

    def __init__(
        self,
        trainer: "PivotTrainer | Rollouts",
        inside: PairDataset | QuestionDataset,
        outside: Mapping[str, PairDataset | QuestionDataset],
    ) -> None:
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
        scores = {name: self._trainer.mean_score(rows) for name, rows in self._outside.items()}  # type: ignore[arg-type]
        entry = {
            ID: self._trainer.mean_score(self._inside),  # type: ignore[arg-type]
            OOD: sum(scores.values()) / len(scores),
            **{f"{OOD}/{name}": score for name, score in scores.items() if len(scores) > 1},
        }
        earlier = [known for known in state.log_history if FACTOR in known]
        series = [[*(known[name] for known in earlier), entry[name]] for name in (ID, OOD)]
        entry[FACTOR] = float(generalization_factor(series[0], series[1])[-1])
        self._trainer.log(entry)
