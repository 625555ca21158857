"""How far a run is: a line of JSON for everything it logs, which a panel draws, here or from another terminal.

The file lies in the run's folder and only grows. Lines of a run that was cut off and goes on stand behind one another;
of two about the same step the later one counts. Nothing here needs torch.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pivot_plugin.errors import SettingsError
from pivot_plugin.files import LOG_FILE, RUN_FILE, read_lines, read_record

# in the log, and what it is called; the first of each that a run has is shown
HELD_OUT = (
    ("eval_rewards/accuracies", "held-out reward accuracy"),
    ("eval_reward", "held-out reward"),
    ("eval_mean_token_accuracy", "held-out token accuracy"),
)
# longer than this without a line, a run that is not finished is called silent
SILENT_S = 600.0


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        name: of its folder.
        step, planned: optimiser steps taken and to be taken.
        begun, seen: when this session of it began, and the last line was written, seconds since the epoch.
        first_step: with which step this session began.
        batch: rows of an optimiser step.
        rows_are: "pairs", "roll-outs" or "conversations".
        trained: per part, parameters that train and that there are.
        history: what was logged, an entry a step.
        memory: bytes at the peak, 0 where that is not known.
        device: "GPU" or "process".
        words: what the watch has said.
        finished: whether the run is.
    """

    name: str
    step: int = 0
    planned: int = 0
    begun: float = 0.0
    seen: float = 0.0
    first_step: int = 0
    batch: int = 0
    rows_are: str = "pairs"
    trained: Mapping[str, Sequence[int]] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    memory: int = 0
    device: str = "process"
    words: Sequence[str] = ()
    finished: bool = False

    def series(self, name: str) -> list[float]:
        """Values of a quantity in the log, in order of steps."""
        return [float(entry[name]) for entry in self.history if isinstance(entry.get(name), int | float)]

    def last(self, name: str) -> float | None:
        """The newest value of a quantity, None where there is none."""
        return next(iter(self.series(name)[-1:]), None)

    @property
    def held_out(self) -> tuple[str, list[float]]:
        """What is told of the held-out rows, and its values."""
        return next(((words, values) for name, words in HELD_OUT if (values := self.series(name))), ("", []))

    @property
    def rate(self) -> float | None:
        """Rows a second in this session, looks at held-out rows and all; None before the first step."""
        taken, seconds = self.step - self.first_step, self.seen - self.begun
        return taken * self.batch / seconds if taken > 0 and seconds > 0 and self.batch else None

    @property
    def left(self) -> float | None:
        """Seconds until the planned steps are taken, None where that cannot be told."""
        taken, seconds = self.step - self.first_step, self.seen - self.begun
        return (self.planned - self.step) * seconds / taken if taken > 0 and not self.finished else None

    @property
    def opinion(self) -> str:
        """What the watch thinks, in a few words."""
        if self.words:
            return self.words[-1]
        losses = self.series("eval_loss")
        if len(losses) > 1:
            best = losses.index(min(losses))
            return "held-out loss is at its lowest" if best == len(losses) - 1 else "held-out loss was lower before"
        return "nothing to say yet"


class Lines:
    """Writes the lines of a run's log.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG_FILE

    def write(self, **line: Any) -> None:
        """Append a line."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **line}, default=str) + "\n")


def read_progress(folder: str | Path) -> Progress:
    """How far the run in a folder is.

    Args:
        folder: of the run, one that goes on included.

    Raises:
        SettingsError: if there is no run.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record is None and not (folder / LOG_FILE).is_file():
        raise SettingsError(
            f"{str(folder)!r} holds no run: there is no readable {RUN_FILE}.",
            "Give the output_dir of pivot.optimize (pivot optimize -o).",
        )
    progress = of_lines(folder.resolve().name, read_lines(folder))
    finished = bool((record or {}).get("finished"))
    history = (record or {}).get("history") if finished else None
    if history:
        step = int(max((entry.get("step", 0) for entry in history), default=0))
        return _with(progress, finished=True, history=history, step=step, planned=progress.planned or step)
    return _with(progress, finished=finished)


def of_lines(name: str, lines: Sequence[Mapping[str, Any]]) -> Progress:
    """What the lines of a log come to.

    Args:
        name: of the run.
        lines: in the order in which they were written.
    """
    about: dict[str, Any] = {}
    # what was logged of a step behind which a session did not begin is written again by that session
    history: list[Mapping[str, Any]] = []
    words: list[str] = []
    for line in lines:
        about["seen"] = line.get("time", 0.0)
        if line.get("event") == "begin":
            known = ("planned", "first_step", "batch", "rows_are", "trained", "device")
            about |= {key: line[key] for key in known if key in line} | {"begun": line.get("time", 0.0)}
            about["step"] = line.get("first_step", 0)
            history = [entry for entry in history if entry.get("step", 0) <= about["step"]]
            words = []
        elif line.get("event") == "log":
            about |= {key: line[key] for key in ("step", "memory") if key in line}
            history.append({"step": line.get("step", 0), **line.get("logs", {})})
        elif line.get("event") == "said":
            words.append(str(line.get("text", "")))
    return Progress(name, **about, history=history, words=words)


def _with(progress: Progress, **values: Any) -> Progress:
    return Progress(**{**vars(progress), **values})
