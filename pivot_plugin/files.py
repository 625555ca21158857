"""Files written as a whole, the record of a run, and where this package keeps its caches."""

import json
import os
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new one, never half; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run, None where there is none or half of one."""
    try:
        record: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        return None
    return record


def cache_folder(name: str) -> Path:
    """Folder of one of this package's caches: below `$PIVOT_CACHE`, or `~/.cache/pivot_plugin`."""
    root = os.environ.get("PIVOT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "pivot_plugin") / name
