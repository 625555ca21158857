"""The folder of a run: claimed before anything is paid for, its record, and its checkpoints."""

import json
import time
from pathlib import Path
from typing import Any

from pivot_plugin.errors import SettingsError
from pivot_plugin.files import RUN_FILE, write_whole


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


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a run as a whole or not at all."""
    write_whole(folder / RUN_FILE, json.dumps(record, indent=2, default=str))
