"""Everything this package raises on purpose, by what the user can do about it.

PivotError
+-- DataError        a pair, image or file of the preference data: mend or leave out the row
+-- ModelError       the model, its processor or its family: pass another, or install a plugin for it
+-- SettingsError    an option or a combination of options: change it
|   +-- DiskError    a file cannot be written: make room, or choose another place
+-- PluginError      an installed plugin failed: mend, update or disable it
+-- TrainingError    training itself went wrong: the run's folder holds what was paid for
|   +-- PeerError    another process of the run failed first
+-- EncoderError     an encoder folder or a graft that does not fit
+-- PublishError     the Hub refused or failed; its text says whether anything is changed there
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LISTED = 14


class PivotError(Exception):
    """Base of all errors raised on purpose.

    Args:
        finding: what thing, what was found, what was expected.
        remedy: what to do next.
    """

    def __init__(self, finding: str = "", remedy: str = "") -> None:
        # what is named may hold half a surrogate pair, which no terminal, log or file can be written
        finding, remedy = (text.encode("utf-8", "backslashreplace").decode() for text in (finding, remedy))
        super().__init__(finding, remedy)
        self.finding = finding
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.finding} {self.remedy}".strip()


class DataError(PivotError):
    """The preference data cannot be used as it is.

    Args:
        finding, remedy: as for `PivotError`.
        kind: of the defect, a few words; what a report counts under one head.
    """

    def __init__(self, finding: str = "", remedy: str = "", kind: str = "unusable row") -> None:
        super().__init__(finding, remedy)
        # exceptions are pickled by their args, on the way out of worker processes too
        self.args = (self.finding, self.remedy, kind)
        self.kind = kind


class ModelError(PivotError):
    """The model or its processor cannot be used."""


class SettingsError(PivotError):
    """An option, or a combination of options, cannot be used."""


class DiskError(SettingsError, OSError):
    """A file cannot be written: there is no room, or no right to. An `OSError` too, which is what it began as.

    Args:
        finding, remedy: as for `PivotError`.
        because: what the operating system said.
    """

    def __init__(self, finding: str = "", remedy: str = "", because: str = "") -> None:
        super().__init__(finding, remedy)
        self.args = (self.finding, self.remedy, because)
        self.strerror = because


class PluginError(PivotError):
    """An installed plugin failed."""


class TrainingError(PivotError):
    """Training stopped for a reason that the user should see."""


class PeerError(TrainingError, SystemExit):
    """Another process of the run failed first, and has said so.

    Where nobody catches it, this process ends without a word of its own, so that what happened is told once.

    Args:
        finding, remedy: as for `PivotError`, with the other process's message.
        status: of this process.
    """

    def __init__(self, finding: str = "", remedy: str = "", status: int = 1) -> None:
        super().__init__(finding, remedy)
        self.args = (self.finding, self.remedy, status)
        self.code = status


class EncoderError(PivotError):
    """An encoder folder cannot be loaded, or an encoder does not fit a model."""


class PublishError(PivotError):
    """Publishing on the Hub did not work; the finding says what stands there now."""


def unknown(what: str, name: object, known: Iterable[object], finding: str = "") -> SettingsError:
    """The error for a name that nobody knows, with the nearest ones, or all there are.

    Args:
        what: kind of thing that is named, in a word: "reward".
        name: as given.
        known: names there are.
        finding: said instead of "There is no <what> <name>.".
    """
    names = [str(other) for other in known]
    near = difflib.get_close_matches(str(name), names, n=3)
    listed = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    return SettingsError(
        finding or f"There is no {what} {name!r}.",
        f"Did you mean {' or '.join(near)}?" if near else f"There are {listed or 'none'}.",
    )


SAID = 300


@contextmanager
def foreign_code(
    finding: str, remedy: str, error_cls: type[PivotError] = DataError, kind: str | None = None
) -> Iterator[None]:
    """Call the code of others meanwhile, on what others have written: whatever it raises comes out as an error of ours.

    Decoders and parsers raise what they like of a broken file: no list of exceptions is complete.

    Args:
        finding: which thing cannot be used, as the beginning of a sentence that what was raised ends.
        remedy: what to do next.
        error_cls: of the error.
        kind: of the defect, for a `DataError`.

    Raises:
        PivotError: for every exception; one of ours comes out as it is.
    """
    try:
        yield
    except PivotError:
        raise
    except Exception as error:
        details = (kind,) if kind is not None else ()
        raise error_cls(f"{finding}: {said(error)}.", remedy, *details) from error


def said(error: BaseException) -> str:
    """What an exception says, in one line and not at any length; its class where that is not plain from the words."""
    try:
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
    except Exception:
        text = ""
    # a lone surrogate can be written nowhere
    text = text.encode("utf-8", "backslashreplace").decode().rstrip(".")
    text = text if len(text) <= SAID else f"{text[:SAID]}..."
    if isinstance(error, OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
