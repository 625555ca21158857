"""The folder of a run: claimed before anything is paid for, and its record."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivot_plugin.errors import SettingsError
from pivot_plugin.files import RUN_FILE, read_record, remove_halves, same_settings, write_whole
from pivot_plugin.training.checkpoints import final_checkpoint, last_checkpoint

logger = logging.getLogger(__name__)


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
        if resume and (left := last_checkpoint(folder)) is not None:
            raise SettingsError(
                f"{str(folder)!r} holds {left.name} and no {RUN_FILE}, which says with which settings it was made.",
                f"Put {RUN_FILE} back, choose another output_dir, or delete the checkpoints.",
            )
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
    if not isinstance(record.get("settings"), dict) or not isinstance(record.get("finished", False), bool):
        raise SettingsError(
            f"{str(folder / RUN_FILE)!r} is not what a run writes.", "Choose another output_dir, or delete this one."
        )
    same_settings(
        record["settings"],
        settings,
        f"The run in {str(folder)!r}",
        "Resume with the same settings, or choose another output_dir.",
    )
    remove_halves(folder)


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run in a folder if it has finished.

    Args:
        folder: of the run, claimed already.

    Raises:
        SettingsError: if it has, and kept no checkpoint that its model could be taken from.
    """
    record = read_record(folder)
    if record is None or not record.get("finished"):
        return None
    if final_checkpoint(folder, record.get("history", [])) is None:
        raise SettingsError(
            f"The run in {str(folder)!r} has finished, and kept no checkpoint of its last step.",
            f"Take what it left from {str(folder)!r}, or choose another output_dir to train anew.",
        )
    logger.info("The run in %s has finished. Nothing is trained, and the folder stays as it is.", folder)
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run as a whole or not at all.

    Args:
        folder: of the run.
        record: as JSON has it; what JSON does not know is written as text.
    """
    write_whole(folder / RUN_FILE, json.dumps(record, indent=2, default=str))
