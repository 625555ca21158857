"""Files and folders written as a whole, records compared with their settings, and where caches lie.

A reader of anything written here sees the old state or the new one, never half of one, also when two processes write
the same path: the last to finish wins.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pivot_plugin.errors import SettingsError

RUN_FILE = "run.json"
# what `_beside` names
_ASIDE = re.compile(r"\..+\.[0-9a-f]{32}", re.DOTALL)


def write_whole(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file as a whole or not at all; its folder is made.

    Args:
        path: of the file.
        content: text, bytes, or a function that writes to the path it is given.

    Raises:
        OSError: if it cannot be written; what stood there before is unchanged then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _beside(path)
    try:
        if isinstance(content, str):
            aside.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            aside.write_bytes(content)
        else:
            content(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder aside; it takes its place, and that of an old one, when all went well.

    Args:
        folder: to be written; the caller decides beforehand whether what is there may go.

    Yields:
        the folder to write into.

    Raises:
        OSError: if it cannot be written; what stood there before is unchanged then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, old = _beside(folder), _beside(folder)
    try:
        aside.mkdir()
        yield aside
        # a folder that is not empty cannot be renamed onto: the old one steps aside first, and comes back on failure
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


def cache_folder(name: str) -> Path:
    """Folder of one of this package's caches: below `$PIVOT_CACHE`, or `~/.cache/pivot_plugin`."""
    root = os.environ.get("PIVOT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "pivot_plugin") / name
