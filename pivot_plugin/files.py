"""Files and folders written as a whole, records compared with their settings, and where caches lie.

A reader of anything written here sees the old state or the new one, never half of one, also when two processes write
the same path: the last to finish wins.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pivot_plugin.errors import DiskError, PivotError, SettingsError, said

RUN_FILE = "run.json"
# what `_beside` names
_ASIDE = re.compile(r"\..+\.[0-9a-f]{32}", re.DOTALL)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# libraries that write by themselves say it in words: safetensors, Arrow, torch
FULL_IN_WORDS = (*(f"os error {number}" for number in FULL), *map(os.strerror, FULL), "PytorchStreamWriter failed")


def is_full(error: BaseException) -> bool:
    """Whether an exception says that there is no room for a file.

    Args:
        error: of Python, or of a library that writes files by itself.
    """
    return (isinstance(error, OSError) and error.errno in FULL) or any(words in str(error) for words in FULL_IN_WORDS)


def unwritten(path: Path, error: BaseException) -> DiskError:
    """The error for a file or folder that cannot be written.

    Args:
        path: of it.
        error: that says so.
    """
    there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    try:
        room = f" ({shutil.disk_usage(there).free / 1e9:.1f} GB are free)"
    except OSError:
        room = ""
    return DiskError(
        f"{str(path)!r} cannot be written: {said(error)}.",
        f"Make room there{room}, or choose another place.",
        said(error),
    )


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Write meanwhile: what says that this cannot be comes out as an error of ours, with the path."""
    try:
        yield
    except PivotError:
        raise
    except Exception as error:
        forbidden = isinstance(error, OSError) and error.errno in FORBIDDEN
        if (is_full(error) or forbidden) and not _is_of_another(error, path):
            raise unwritten(path, error) from error
        raise


def _is_of_another(error: Exception, path: Path) -> bool:
    """Whether an exception names a file somewhere else, as one that was read meanwhile."""
    name = getattr(error, "filename", None)
    return isinstance(name, str) and path.absolute().parent not in (
        Path(name).absolute(),
        *Path(name).absolute().parents,
    )


class Lines:
    """A file that grows line by line, each of them on the disk when `add` returns.

    Args:
        path: of the file; its folder is made.
        keep: bytes of what stands there already that stay.

    Raises:
        DiskError: if it cannot be written, by every method.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self._path = path
        with _written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # without a buffer: closing a file whose last lines found no room would fail again
            self._file = path.open("ab", buffering=0)
            self._file.truncate(keep)

    def add(self, line: bytes) -> None:
        """Write a line, with its end."""
        with _written(self._path):
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """No line is to come."""
        self._file.close()


def write_whole(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file as a whole or not at all; its folder is made.

    Args:
        path: of the file.
        content: text, bytes, or a function that writes to the path it is given.

    Raises:
        DiskError: if there is no room or right to write it; what stood there before is unchanged then, after any other
            failure too.
    """
    aside = _beside(path)
    with _written(path), _gone_afterwards(aside):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            aside.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            aside.write_bytes(content)
        else:
            content(aside)
        aside.replace(path)


@contextmanager
def _gone_afterwards(aside: Path) -> Iterator[None]:
    try:
        yield
    finally:
        # its folder may be a file, or of somebody else
        with suppress(OSError):
            aside.unlink()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder aside; it takes its place, and that of an old one, when all went well.

    Args:
        folder: to be written; the caller decides beforehand whether what is there may go.

    Yields:
        the folder to write into.

    Raises:
        DiskError: if there is no room or right to write it; what stood there before is unchanged then, after any other
            failure too.
    """
    aside, old = _beside(folder), _beside(folder)
    try:
        with _written(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside.mkdir()
            yield aside
            # a folder that is not empty cannot be renamed onto: the old one steps aside, and comes back on failure
            if folder.exists():
                folder.replace(old)
            try:
                aside.replace(folder)
            except OSError:
                if old.exists() and not folder.exists():
                    old.replace(folder)
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_halves(folder: Path) -> None:
    """Remove what was being written in a folder when its process was killed.

    Args:
        folder: into which nobody writes now.
    """
    for path in folder.iterdir():
        if _ASIDE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path) -> Path:
    # not by tempfile, whose files nobody else may read
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def same_settings(was: Any, now: Any, what: str, remedy: str) -> None:
    """Make sure that something on disk was made with the settings of today.

    Args:
        was: its settings, as JSON gave them back.
        now: those of today; compared as JSON would give them back.
        what: it is, as the beginning of a sentence: "The run in 'pivot-run'".
        remedy: what to do where they differ.

    Raises:
        SettingsError: naming the first setting that differs, in dots, and both its values.
    """
    difference = first_difference(was, json.loads(json.dumps(now, default=str)))
    if difference is not None:
        name, before, after = difference
        raise SettingsError(f"{what} had {name}={before!r}, now it is {after!r}.", remedy)


def first_difference(was: Any, now: Any, path: tuple[str, ...] = ()) -> tuple[str, Any, Any] | None:
    """Name, in dots, and both values of the first thing in which two records differ, None where they are the same.

    Args:
        was, now: as JSON gives them back.
        path: where in larger records they stand.
    """
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        inner = (first_difference(was.get(key), now.get(key), (*path, str(key))) for key in {**was, **now})
        return next((difference for difference in inner if difference is not None), None)
    return None if was == now else (".".join(path), was, now)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run, None where there is none or half of one."""
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


# what a run logs, a line of JSON each; it grows while the run goes on
LOG_FILE = "log.jsonl"


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; one that is being written is left out."""
    try:
        texts = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def logged(folder: Path) -> list[dict[str, Any]]:
    """Entries of a run's log, each with its step; those that a resumed run has written anew, once."""
    history: list[dict[str, Any]] = []
    for line in read_lines(folder):
        if line.get("event") == "begin":
            history = [entry for entry in history if entry["step"] <= line.get("first_step", 0)]
        elif line.get("event") == "log" and isinstance(line.get("logs"), dict):
            history.append({**line["logs"], "step": line.get("step", 0)})
    return history


def is_path(name: str | Path) -> bool:
    """Whether a text can only be a path, since no Hub id begins or is built like it."""
    text = str(name)
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def cache_folder(name: str) -> Path:
    """Folder of one of this package's caches: below `$PIVOT_CACHE`, or `~/.cache/pivot_plugin`."""
    root = os.environ.get("PIVOT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "pivot_plugin") / name
