"""The list of rows that were left out."""

import json
import logging
from pathlib import Path
from typing import Self

from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.files import Lines

logger = logging.getLogger(__name__)


SKIPPED_FILE = "skipped.jsonl"
SKIPPED_EVAL_FILE = "skipped-eval.jsonl"
# of all rows; data of which more is bad are misread rather than damaged
LARGEST_SHARE = 0.5
# of a stream, before a share says anything
FEWEST_LOOKED_AT = 100


class SkippedRows:
    """The list of rows left out: a line of JSON each in a file, and one sentence when it is closed.

    Args:
        name: of the data.
        path: of the file; None writes none.
        rows: how many there are; None for a stream.
    """

    def __init__(self, name: str, path: str | Path | None, rows: int | None = None) -> None:
        self._name = name
        self._rows = rows
        self._path = None if path is None else Path(path)
        self._file: Lines | None = None
        self._count = 0

    def add(self, index: int, error: DataError) -> None:
        """Leave a row out.

        Args:
            index: its number.
            error: why.

        Raises:
            DataError: if that are more than a few; the list says which.
        """
        self._count += 1
        self._write(index, error)
        # of a stream those that came by now
        rows = max(index + 1, FEWEST_LOOKED_AT) if self._rows is None else self._rows
        if self._count > LARGEST_SHARE * rows:
            share = f"{self._count:,} of {rows:,} rows of {self._name} are bad, {self._count / rows:.0%}, and more than"
            share += f" {LARGEST_SHARE:.0%} are not left out"
            if self._count == self._rows:
                share = f"All {rows:,} rows of {self._name} are bad"
            raise DataError(
                f"{share}; the last: {error.finding}",
                "Check the data's layout" + ("." if self._path is None else f"; {self._path} lists the rows."),
                error.kind,
            ) from error

    def _write(self, index: int, error: DataError) -> None:
        if self._path is None:
            return
        if self._file is None:
            try:
                self._file = Lines(self._path)
            except OSError as failure:
                raise SettingsError(
                    f"The list of skipped rows cannot be written to {str(self._path)!r}: {failure.strerror}.",
                    "Give another file with skipped=.",
                ) from failure
        line = {"data": self._name, "row": index, "defect": error.kind, "finding": error.finding}
        self._file.add(f"{json.dumps(line, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._count:
            listed = "" if self._path is None else f"; they are listed in {self._path}"
            logger.warning("%d rows of %s are left out%s.", self._count, self._name, listed)
