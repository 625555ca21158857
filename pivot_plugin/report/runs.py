"""What the folder of a run tells, read for the page; a run that is not finished tells what it can."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pivot_plugin.data.layout import text_of
from pivot_plugin.data.questions import load_questions
from pivot_plugin.errors import PivotError, SettingsError
from pivot_plugin.files import RUN_FILE, logged, read_record
from pivot_plugin.generation.makers.storage import SHEET_FILE
from pivot_plugin.generation.own_answers import AnswerSummary
from pivot_plugin.probes.scores import ProbeResult
from pivot_plugin.probes.storage import saved_results
from pivot_plugin.training.checkpoints import last_checkpoint
from pivot_plugin.verdict import Verdict

logger = logging.getLogger(__name__)

# Images seen in pre-training, by the type of the tower. SigLIP: Zhai et al. 2023 (arXiv 2303.15343), section 4, and
# Tschannen et al. 2025 (arXiv 2502.14786), section 2 for SigLIP 2: 40 billion. CLIP: Radford et al. 2021
# (arXiv 2103.00020), section 2.5: 32 epochs of 400 million.
PRETRAINING_IMAGES = {"siglip_vision_model": 40e9, "siglip2_vision_model": 40e9, "clip_vision_model": 12.8e9}


@dataclass(frozen=True)
class MadeQuestion:
    """A question that was made of pictures.

    Attributes:
        images: shown.
        prompt, answer: texts.
        before, after: what the model answered.
        maker: of it.
    """

    images: list[Image.Image]
    prompt: str
    answer: str
    before: str
    after: str
    maker: str


@dataclass(frozen=True)
class RunFacts:
    """One run.

    Attributes:
        name: of its folder.
        finished: whether it is.
        settings, metrics, weight_change, origin, cost, trained: as `run.json` has them.
        history: log entries, each with its step.
        verdict: on the run, None where it has none.
        answers: what came of asking the model, a round each; empty where it learnt from given pairs or roll-outs.
        probes: results by label and step.
        made: some of the questions that were made of pictures, where it was given these.
    """

    name: str
    finished: bool
    settings: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    weight_change: dict[str, float]
    origin: dict[str, Any]
    cost: dict[str, Any]
    trained: dict[str, Any]
    history: list[dict[str, Any]]
    verdict: Verdict | None
    answers: list[AnswerSummary]
    probes: dict[str, dict[int, ProbeResult]] = field(repr=False)
    made: list[MadeQuestion] = field(default_factory=list, repr=False)

    def series(self, name: str, held_out: bool) -> list[tuple[float, float]]:
        """(step, value) of a quantity in the log.

        Args:
            name: in the log.
            held_out: whether to take what was logged of held-out rows, or of those trained on.
        """
        return [
            (entry["step"], entry[name])
            for entry in self.history
            if name in entry and "step" in entry and held_out == any(key.startswith("eval_") for key in entry)
        ]

    @property
    def kept(self) -> int | None:
        """The step whose weights were kept, None where that is not known."""
        found = next((e["watch/best_step"] for e in reversed(self.history) if "watch/best_step" in e), None)
        return None if found is None or self.settings.get("load_best_model_at_end") is False else int(found)

    @property
    def steps(self) -> int:
        """Optimiser steps made."""
        return int(max((entry.get("step", 0) for entry in self.history), default=0))

    @property
    def rows_per_second(self) -> float | None:
        """Pairs (roll-outs, with an online objective) per second of training."""
        runtime = next((e["train_runtime"] for e in reversed(self.history) if "train_runtime" in e), None)
        batch = self.origin.get("batch")
        return self.steps * batch / runtime if runtime and batch else None

    def pretraining_share(self) -> tuple[float, float] | None:
        """The run's floating-point operations as a share of the tower's pre-training, and the images that it saw.

        None where that is not known. Pre-training: 6 operations per parameter, patch and image.
        """
        tower, spent = self.origin.get("tower", {}), self.cost.get("flops")
        seen = PRETRAINING_IMAGES.get(str(tower.get("model_type")))
        if not seen or not spent or not tower.get("patches"):
            return None
        return spent / (6.0 * tower["parameters"] * tower["patches"] * seen), seen


def read_run(folder: str | Path) -> RunFacts:
    """Read the folder of a run.

    Args:
        folder: as `optimize` left it.

    Raises:
        SettingsError: if it holds no run.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record is None:
        raise SettingsError(
            f"{str(folder)!r} holds no run: there is no readable {RUN_FILE}.",
            "Give the output_dir of pivot.optimize (pivot optimize -o).",
        )
    history = record.get("history")
    if history is None:
        checkpoint = last_checkpoint(folder)
        state = json.loads((checkpoint / "trainer_state.json").read_text()) if checkpoint else {}
        # the log of a run that goes on is ahead of its checkpoints
        history = logged(folder) or state.get("log_history", [])
    return RunFacts(
        folder.resolve().name,
        bool(record.get("finished")),
        record.get("settings", {}),
        record.get("metrics") or {},
        record.get("weight_change") or {},
        record.get("origin") or {},
        record.get("cost") or {},
        record.get("trained") or {},
        history,
        Verdict.from_dict(record.get("verdict")),
        [AnswerSummary.from_dict(summary) for summary in record.get("answers") or []],
        saved_results(folder),
        _made(folder),
    )


def _made(folder: Path) -> list[MadeQuestion]:
    """The made questions that a run has kept, their pictures made again; none where they cannot be read any more."""
    if not (folder / SHEET_FILE).is_file():
        return []
    try:
        rows = load_questions(folder / SHEET_FILE)
        return [_made_question(rows[position]) for position in range(len(rows))]
    except PivotError as error:
        logger.warning("The made questions of %s are left out: %s", folder, error)
        return []


def _made_question(row: dict[str, Any]) -> MadeQuestion:
    return MadeQuestion(
        row["images"], text_of(row["prompt"]), str(row["answer"]), str(row["before"]), str(row["after"]), row["maker"]
    )
