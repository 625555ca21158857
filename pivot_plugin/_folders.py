"""The folder of a run: claimed before anything is paid for, its record, and its checkpoints."""

import json
import os
import time
from pathlib import Path
from typing import Any

from pivot_plugin.errors import SettingsError

RUN_FILE = "run.json"


def claim(folder: Path, described: dict[str, Any], resume: bool) -> None:
    """Make sure of a folder that can be written and holds no other run.

    Args:
        folder: of the run.
        described: what the run is given.
        resume: whether it goes on with an earlier one of the same settings.

    Raises:
        SettingsError: if it cannot be written, or holds a run that this one does not continue.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{time.time_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"output_dir {str(folder)!r} cannot be written: {error.strerror or error}.", "Choose another output_dir."
        ) from error
    earlier = folder / RUN_FILE
    if not earlier.exists():
        return
    if not resume:
        raise SettingsError(
            f"output_dir {str(folder)!r} holds an earlier run.",
            "Choose another output_dir, delete this one, or go on with it by resume=True (--resume).",
        )
    was = json.loads(earlier.read_text()).get("settings", {})
    now = json.loads(json.dumps(described, default=str))
    if differing := sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name)):
        name = differing[0]
        raise SettingsError(
            f"The run in {str(folder)!r} had {name}={was.get(name)!r}, now it is {now.get(name)!r}.",
            "Resume with the same settings, or choose another output_dir.",
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new one, never half; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a run as a whole or not at all."""
    write_whole(folder / RUN_FILE, json.dumps(record, indent=2, default=str))


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


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; one that was being written when the run was killed does not count.

    Args:
        folder: of the run.
    """
    complete = {}
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            # the trainer writes this file last
            step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        except (OSError, ValueError, KeyError):
            continue
        complete[int(step)] = checkpoint
    return complete[max(complete)] if complete else None
