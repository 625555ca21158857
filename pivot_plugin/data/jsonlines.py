"""JSON-lines files with random access in little memory: one number per row, a row is parsed when it is read.

Rows need not agree in their types, unlike in a table: one may hold text where the next holds messages.
"""

import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

from pivot_plugin.errors import DataError, foreign_code, said

IMAGE_COLUMNS = ("image", "images")


class JsonLines(Sequence[Mapping[str, Any]]):
    """The rows of one or more .jsonl files.

    Args:
        parts: files, each with the folder that its relative image paths start from (None: left as they are).

    Raises:
        DataError: for a file that cannot be read; for a line that is not a JSON object, when it is read.
    """

    def __init__(self, parts: Sequence[tuple[Path, Path | None]]) -> None:
        self._parts = list(parts)
        self._offsets: list[array[int]] = []
        self._starts: list[int] = []
        self._open: tuple[int, dict[int, Any]] | None = None
        count = 0
        for path, _ in self._parts:
            self._starts.append(count)
            self._offsets.append(_line_offsets(path))
            count += len(self._offsets[-1])
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        line, number, offset = self._line(index)
        path, folder = self._parts[number]
        try:
            row = parsed(line)
        # numbers of thousands of digits, brackets in brackets: not every broken text is a JSONDecodeError
        except Exception as error:
            with path.open("rb") as whole:
                lineno = whole.read(offset).count(b"\n") + 1
            detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else said(error)
            cut = "" if line.endswith(b"\n") else "; the file ends there and may have been cut"
            raise DataError(
                f"Line {lineno} of {path.name} is not JSON: {detail}{cut}.",
                "Each line holds one row as a JSON object.",
                "not JSON",
            ) from error
        if isinstance(row, Mapping) and folder is not None:
            row = {**row, **{name: _below(folder, row[name]) for name in IMAGE_COLUMNS if name in row}}
        return row  # type: ignore[no-any-return]

    def _line(self, index: int) -> tuple[bytes, int, int]:
        """A line, the number of its file, and where it begins there."""
        number = bisect_right(self._starts, index) - 1
        offset = self._offsets[number][index - self._starts[number]]
        with self._reading(number) as file:
            file.seek(offset)
            return file.readline(), number, offset

    def digest(self, indices: Sequence[int]) -> str:
        """A key that is equal for equal lines of equal folders."""
        digest = hashlib.sha256()
        first, last = (int(indices[0]), int(indices[-1])) if len(indices) else (0, -1)
        number = bisect_right(self._starts, first) - 1
        if last - first + 1 == len(indices) and bisect_right(self._starts, last) - 1 == number:
            # in one piece
            line, _, end = self._line(last)
            offset = self._offsets[number][first - self._starts[number]]
            with self._reading(number) as file:
                file.seek(offset)
                digest.update(f"{self._parts[number][1]} {offset - end} ".encode() + file.read(end - offset) + line)
            return digest.hexdigest()
        for index in indices:
            line, number, _ = self._line(int(index))
            digest.update(f"{self._parts[number][1]} {len(line)} ".encode() + line)
        return digest.hexdigest()

    @contextmanager
    def _reading(self, number: int) -> Iterator[Any]:
        with foreign_code(
            f"{self._parts[number][0].name} cannot be read", "Leave the file as it is while it is in use."
        ):
            yield self._file(number)

    def _file(self, number: int) -> Any:
        """An open file of this process; worker processes must not share a file's position."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), {})
        files = self._open[1]
        if number not in files:
            files[number] = self._parts[number][0].open("rb")
        return files[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "JsonLines":
        return self


def parsed(text: bytes | str) -> Any:
    """JSON, in which a key stands once.

    Args:
        text: of one value.

    Raises:
        ValueError: if it is none, or a key stands there twice, of which the parser would keep the last.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return made


def _line_offsets(path: Path) -> "array[int]":
    offsets: array[int] = array("q")
    try:
        with path.open("rb") as file:
            position = 0
            for line in file:
                if line.strip():
                    offsets.append(position)
                position += len(line)
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be read: {error.strerror or error}.", "Give the path of a file that exists."
        ) from error
    return offsets


def _below(folder: Path, value: object) -> object:
    if isinstance(value, str) and "://" not in value:
        return str(folder / value)
    return [_below(folder, item) for item in value] if isinstance(value, list) else value
