"""The list of rows that were left out."""

import json
import logging
from pathlib import Path
from typing import Any, Self

from pivot_plugin.errors import DataError, SettingsError

logger = logging.getLogger(__name__)


SKIPPED_FILE = "skipped.jsonl"


class SkippedRows:
    """The list of rows left out: a line of JSON each in a file, and one sentence when it is closed."""

    def __init__(self, name: str, path: str | Path | None) -> None:
        self._name = name
        self._path = None if path is None else Path(path)
        self._file: Any = None
        self._count = 0
        self.last = ""

    def add(self, index: int, error: DataError) -> None:
        self._count += 1
        self.last = error.finding
        if self._path is None:
            return
        if self._file is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w", encoding="utf-8")
            except OSError as failure:
                raise SettingsError(
                    f"The list of skipped rows cannot be written to {str(self._path)!r}: {failure.strerror}.",
                    "Give another file with skipped=.",
                ) from failure
        line = {"data": self._name, "row": index, "defect": error.kind, "finding": error.finding}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._count:
            listed = "" if self._path is None else f"; they are listed in {self._path}"
            logger.warning("%d rows of %s are left out%s.", self._count, self._name, listed)
