"""What the command shows of a run: the run's own display, and everything else in the run's log file."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pivot_plugin.files import RUN_FILE, read_record

OUTPUT_FILE = "output.log"
# our own, whose information is for the reader of the terminal
OURS = "pivot_plugin"


class _InFolder(logging.Handler):
    """Keeps records until a folder is that of a run, and writes them there: a start that is refused leaves nothing.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.INFO)
        self._folder = folder
        # a run that has ended stays as it is, whoever asks for its result again
        self._ended = bool((read_record(folder) or {}).get("finished"))
        self._waiting: list[str] = []
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._waiting.append(self.format(record))
        self.flush()

    def flush(self) -> None:
        """Write what waits, where it can be written."""
        if self._ended or not self._waiting or not (self._folder / RUN_FILE).is_file():
            return
        try:
            with (self._folder / OUTPUT_FILE).open("a", encoding="utf-8") as file:
                file.write("\n".join(self._waiting) + "\n")
        except OSError:
            # a full disk is told by what matters more
            pass
        self._waiting.clear()


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == OURS


@contextmanager
def of_a_run(folder: Path, quiet: bool, verbose: bool) -> Iterator[Literal["auto", "none", "all"]]:
    """Show a run meanwhile: what libraries say goes to `output.log` in its folder.

    Args:
        folder: of the run.
        quiet: whether nothing but errors is shown.
        verbose: whether everything is, as it comes, in the terminal and not in the file.

    Yields:
        the display that the run is to have.
    """
    if verbose:
        yield "all"
        return
    root = logging.getLogger()
    before, levels = list(root.handlers), {}
    keeper = _InFolder(folder)
    for handler in before:
        handler.addFilter(_is_ours)
        levels[handler] = handler.level
        if quiet:
            handler.setLevel(logging.ERROR)
    root.addHandler(keeper)
    bars = _bars_off()
    logging.captureWarnings(True)
    try:
        yield "none" if quiet else "auto"
    finally:
        keeper.flush()
        logging.captureWarnings(False)
        root.removeHandler(keeper)
        for handler in before:
            handler.removeFilter(_is_ours)
            handler.setLevel(levels[handler])
        for name, value in bars.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _bars_off() -> dict[str, str | None]:
    """Switch off the bars of libraries, those that come with imports of later included; returns what was set before."""
    before = {
        name: os.environ.get(name) for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    }
    os.environ.update(dict.fromkeys(before, "1"))
    import datasets
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    # transformers hands its records on to ours, which write them into the file
    of_transformers.disable_default_handler()
    of_transformers.enable_propagation()
    datasets.disable_progress_bars()
    return before
