"""What a run shows while it goes on: a panel in a terminal, a table in a notebook, lines elsewhere, and its log file.

It takes the place of transformers' bar and of the dictionaries that its trainer prints.
"""

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.live import Live
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from pivot_plugin.files import read_lines

from .panel import html, line, panel
from .progress import Lines, Progress, of_lines

logger = logging.getLogger(__name__)

Display = Literal["auto", "lines", "none", "all"]
# without a terminal: a line no more often than this, beside those of looks and ends
SECONDS_BETWEEN_LINES = 30.0
# what the watch and the checks of training have to say, and is kept with the log
SPEAKERS = ("pivot_plugin.training",)


class RunDisplay(TrainerCallback):
    """Writes what a trainer logs into the run's log, and shows it.

    Args:
        folder: of the run.
        rows_are: what a batch counts: "pairs", "roll-outs" or "conversations".
        trained: per part, parameters that train and that there are.
        show: is given how far the run is, and whether this is worth a line of its own; None shows nothing.
    """

    def __init__(
        self,
        folder: Path,
        rows_are: str,
        trained: dict[str, tuple[int, int]],
        show: Callable[[Progress, bool], None] | None,
    ) -> None:
        self._name = folder.resolve().name
        self._lines = Lines(folder)
        self._written = read_lines(folder)
        self._rows_are = rows_are
        self._trained = trained
        self._show = show
        self._step = 0
        self._waiting: tuple[int, dict[str, float], int] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._step = state.global_step
        self._write(
            event="begin",
            planned=state.max_steps,
            first_step=state.global_step,
            batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            rows_are=self._rows_are,
            trained={part: list(numbers) for part, numbers in self._trained.items()},
            device="GPU" if torch.cuda.is_available() and args.device.type == "cuda" else "process",
        )
        self._tell(worth_a_line=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = state.global_step
        if state.is_world_process_zero and self._show is not None:
            self._tell(worth_a_line=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.flush()
        # written when the other callbacks, in whatever order, have added to the entry what they have found
        newest = state.log_history[-1] if state.log_history else {}
        entry = newest if newest.get("step") == state.global_step else dict(logs)
        self._waiting = (state.global_step, entry, _memory(args))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.flush()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.flush()

    def flush(self) -> None:
        """Write the entry that waits, and show it."""
        if self._waiting is None:
            return
        step, entry, memory = self._waiting
        self._waiting = None
        self._write(event="log", step=step, logs=entry, memory=memory)
        self._tell(worth_a_line=any(name.startswith("eval_") for name in entry))

    def said(self, text: str) -> None:
        """Keep what was said of the run with its log.

        Args:
            text: in one line.
        """
        self._write(event="said", text=text)

    def _write(self, **entry: Any) -> None:
        try:
            self._lines.write(**entry)
        except OSError as error:
            # a full disk stops checkpoints, and those say so
            logger.debug("The log of the run cannot be written: %s", error)
        self._written.append({"time": time.time(), **entry})

    def ended(self) -> None:
        """Show that training has ended."""
        self.flush()
        self._tell(worth_a_line=False, finished=True)

    def _tell(self, worth_a_line: bool, finished: bool = False) -> None:
        if self._show is None:
            return
        now = of_lines(self._name, self._written)
        newest = {"step": self._step, "seen": time.time(), "finished": finished}
        self._show(Progress(**{**vars(now), **newest}), worth_a_line)


class _Said(logging.Handler):
    """Hands warnings of training on to a display."""

    def __init__(self, display: RunDisplay) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.said(" ".join(record.getMessage().split())[:300])


@contextmanager
def displayed(trainer: Trainer, folder: Path, rows_are: str, how: Display) -> Iterator[None]:
    """Show a run while its trainer trains.

    Args:
        trainer: of the run.
        folder: of the run.
        rows_are: as for `RunDisplay`.
        how: "auto": a panel in a terminal, a table in a notebook, lines elsewhere; "lines"; "none", the log file alone;
            "all": what the libraries show themselves.
    """
    ours = how != "all"
    if ours:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
    shown = how if trainer.is_world_process_zero() and not trainer.args.disable_tqdm else "none"
    trained = trainer.trained_parameters()
    with _shower(shown) as show:
        display = RunDisplay(folder, rows_are, trained, show)
        trainer.add_callback(display)
        handler = _Said(display)
        for name in SPEAKERS:
            logging.getLogger(name).addHandler(handler)
        try:
            yield
            display.ended()
        finally:
            display.flush()
            for name in SPEAKERS:
                logging.getLogger(name).removeHandler(handler)
            trainer.remove_callback(display)


@contextmanager
def _shower(how: Display) -> Iterator[Callable[[Progress, bool], None] | None]:
    console = Console(file=sys.stdout)
    if how in ("none", "all"):
        yield None
    elif how == "auto" and _in_notebook():
        yield _notebook_table()
    elif how == "auto" and console.is_terminal and not console.is_dumb_terminal:
        with Live(console=console, refresh_per_second=4, transient=False) as live:
            newest: list[Progress] = []
            # drawn anew four times a second, so that the clock goes on through a long step
            live.get_renderable = lambda: panel(newest[-1]) if newest else ""  # type: ignore[method-assign]

            def show(progress: Progress, worth_a_line: bool) -> None:
                newest[:] = [progress]

            yield show
            live.refresh()
    else:
        yield _plain_lines()


def _plain_lines() -> Callable[[Progress, bool], None]:
    told = [time.monotonic()]

    def show(progress: Progress, worth_a_line: bool) -> None:
        if worth_a_line or time.monotonic() - told[0] > SECONDS_BETWEEN_LINES:
            told[0] = time.monotonic()
            print(line(progress), flush=True)

    return show


def _notebook_table() -> Callable[[Progress, bool], None]:
    from IPython.display import HTML, display  # type: ignore[import-not-found]

    handle = display(HTML(""), display_id=True)

    def show(progress: Progress, worth_a_line: bool) -> None:
        handle.update(HTML(html(progress)))

    return show


def _in_notebook() -> bool:
    """Whether a Jupyter kernel shows what is displayed."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def _memory(args: TrainingArguments) -> int:
    """Peak memory in bytes, of the GPU where there is one, else of the process."""
    if torch.cuda.is_available() and args.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # kilobytes, of macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
