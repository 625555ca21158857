"""A few of the questions that were made, and what the model answers before and after training: for the report."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from pivot_plugin.data.edited_rows import write_rows
from pivot_plugin.data.questions import QuestionDataset
from pivot_plugin.files import write_whole
from pivot_plugin.generation.engines import Sampling, TransformersEngine
from pivot_plugin.generation.makers.storage import SHEET_FILE
from pivot_plugin.models.evaluating import evaluating

from .run import Run

SHOWN = 12
LONGEST_ANSWER = 64
AT_ONCE = 4


@dataclass(frozen=True)
class MadeSheet:
    """Some questions and the model's answers before training.

    Attributes:
        questions: shown.
        before: the most probable answer to each.
    """

    questions: QuestionDataset
    before: Sequence[str]

    @classmethod
    def begin(cls, run: Run) -> "MadeSheet | None":
        """Ask some of the held-out questions, or of those trained on where none are held out.

        Args:
            run: on questions that were made, before it trains.

        Returns:
            None in several processes, among which the model may be divided, and where the run has ended before.
        """
        rows = run.held_out if isinstance(run.held_out, QuestionDataset) else run.rows
        if run.config.world_size > 1 or run.ended is not None or not isinstance(rows, QuestionDataset):
            return None
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int))
        questions = rows.select(chosen.tolist())
        return cls(questions, _answers(run, run.model, questions))

    def finish(self, run: Run, model: PreTrainedModel) -> None:
        """Ask again, and write all of it into the run's folder.

        Args:
            run: that has trained.
            model: as it ended.
        """
        after = _answers(run, model, self.questions)
        rows = [
            {**self.questions.plain(position), "before": before, "after": then}
            for position, (before, then) in enumerate(zip(self.before, after, strict=True))
        ]
        write_whole(
            run.output_dir / SHEET_FILE,
            lambda file: write_rows(rows, file, run.output_dir, self.questions.access, len(rows)),
        )


def _answers(run: Run, model: PreTrainedModel, questions: QuestionDataset) -> list[str]:
    with evaluating(model, None if hasattr(model, "hf_device_map") else run.config.device):
        engine = TransformersEngine(model, run.processor)
        said: list[str] = []
        for start in range(0, len(questions), AT_ONCE):
            rows = [questions[position] for position in range(start, min(start + AT_ONCE, len(questions)))]
            said += [texts[0] for texts in engine(rows, Sampling(1, 0.0, 1.0, LONGEST_ANSWER), 0)]
        return said
