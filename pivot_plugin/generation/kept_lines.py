"""What was finished for each question, a line each on disk, so that a second run goes on where a first one stopped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pivot_plugin.files import Lines, same_settings


class KeptLines:
    """Finished values by question, in memory and, where there is a path, on disk: a line on what they depend on first.

    Args:
        path: of the file; None keeps them in memory alone.
        settings: what the values depend on.
        value_name: what a value is called in its line: "completions".

    Attributes:
        values: by the position of the question.

    Raises:
        SettingsError: if the file holds values of other settings, naming the one that differs.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], value_name: str) -> None:
        self.values: dict[int, Any] = {}
        self._name = value_name
        self._file: Lines | None = None
        if path is None:
            return
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        # a run that was killed may have left half a line
        whole = lines[:-1]
        if whole:
            same_settings(
                json.loads(whole[0]),
                settings,
                f"The run whose {value_name} {str(path)!r} holds",
                "Choose another output_dir, delete this one, or use the same settings.",
            )
            for line in whole[1:]:
                row = json.loads(line)
                self.values[row["question"]] = row[value_name]
        self._file = Lines(path, keep=sum(len(line) + 1 for line in whole))
        if not whole:
            self._file.add(_line(settings))

    def add(self, position: int, value: Any) -> None:
        """Keep the value of one question."""
        self.values[position] = value
        if self._file is not None:
            self._file.add(_line({"question": position, self._name: value}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def _line(value: object) -> bytes:
    return json.dumps(value, default=str).encode() + b"\n"
