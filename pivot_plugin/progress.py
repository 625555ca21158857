"""How far long work is: a bar with its rate where somebody looks, and a line from time to time where a file does."""

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

# seconds between two lines
LINE_EVERY_S = 30.0


class Progress:
    """Progress of work whose length is known.

    Args:
        total: of things to be done.
        what: is being done, in a word or two: "sampling".
        unit: of the things: "question".
        done: of them beforehand.
        quiet_below: work of fewer things than this says nothing.
        clock: of seconds.
    """

    def __init__(
        self,
        total: int,
        what: str,
        unit: str = "row",
        done: int = 0,
        quiet_below: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._what = what
        self._unit = unit
        self._done = self._before = done
        self._silent = total < quiet_below
        self._clock = clock
        self._began = self._told = clock()
        self._bar: Any = None
        if not self._silent and is_watched():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1) -> None:
        """Say that so many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._silent and self._clock() - self._told >= LINE_EVERY_S:
            self._told = self._clock()
            logger.info("%s", self.line())

    def line(self) -> str:
        """How far the work is, at which rate, and how long the rest will take at it."""
        seconds = self._clock() - self._began
        rate = (self._done - self._before) / seconds if seconds > 0 else 0.0
        left = f", {_duration((self._total - self._done) / rate)} left" if rate > 0 else ""
        return f"{self._what}: {self._done:,} of {self._total:,} {self._unit}s, {rate:.3g} a second{left}"


def is_watched() -> bool:
    """Whether somebody sees a bar move: at a terminal, or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
