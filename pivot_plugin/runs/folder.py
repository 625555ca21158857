"""The folder of a run: claimed before anything is paid for, and its record."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivot_plugin.errors import SettingsError
from pivot_plugin.files import RUN_FILE, read_record, same_settings, write_whole


def claim(folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Make sure of a folder that can be written and holds no other run.

    Args:
        folder: of the run.
        settings: of the run, as its record keeps them.
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
    if not (folder / RUN_FILE).exists():
        return
    if not resume:
        raise SettingsError(
            f"output_dir {str(folder)!r} holds an earlier run.",
            "Choose another output_dir, delete this one, or go on with it by resume=True (--resume).",
        )
    record = read_record(folder)
    if record is None:
        raise SettingsError(
            f"{str(folder / RUN_FILE)!r} cannot be read.", "Choose another output_dir, or delete this one."
        )
    same_settings(
        record.get("settings", {}),
        settings,
        f"The run in {str(folder)!r}",
        "Resume with the same settings, or choose another output_dir.",
    )


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run as a whole or not at all.

    Args:
        folder: of the run.
        record: as JSON has it; what JSON does not know is written as text.
    """
    write_whole(folder / RUN_FILE, json.dumps(record, indent=2, default=str))
