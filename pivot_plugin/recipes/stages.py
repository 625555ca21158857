"""A stage: a folder of its own, skipped when it is done, gone on with when it was cut off, and never another's."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pivot_plugin.errors import SettingsError
from pivot_plugin.files import RUN_FILE, same_settings, write_whole

from .door import plain

logger = logging.getLogger(__name__)

STAGE_FILE = "stage.json"
REMEDY = "Choose another output_dir, or delete that stage's folder and those of the stages after it."


@dataclass(frozen=True)
class Stage:
    """One stage as it ended.

    Attributes:
        name: of the stage.
        folder: its own.
        seconds: the attempt that finished it took.
        outcome: what it told.
        ran: whether this call did its work; False where it was done before.
    """

    name: str
    folder: Path
    seconds: float
    outcome: dict[str, Any]
    ran: bool = True

    @property
    def trains(self) -> str | None:
        """Which parts trained; None for a stage that trains nothing."""
        trains: str | None = {"trains": None, **self.outcome}["trains"]
        return trains

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured before and after on held-out rows; empty where nothing was."""
        metrics: dict[str, Any] = {"metrics": {}, **self.outcome}["metrics"]
        return metrics


def stage(name: str, folder: Path, settings: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]) -> Stage:
    """Do the work of a stage, unless it is done.

    Args:
        name: shown to users.
        folder: of the stage.
        settings: all that decides what comes out.
        work: does it, going on with what lies in the folder; returns what is to be remembered.

    Raises:
        SettingsError: if the folder holds a stage of other settings, naming the first that differs, or a run that no
            stage began.
    """
    now = plain(settings)
    earlier = _read(folder)
    if earlier is not None:
        same_settings(earlier["settings"], now, f"The stage in {str(folder)!r}", REMEDY)
        if earlier["finished"]:
            logger.info("%s is done: %s", name, folder)
            return Stage(name, folder, float(earlier["seconds"]), earlier["outcome"], ran=False)
    elif (folder / RUN_FILE).exists():
        # with which settings, nobody knows
        raise SettingsError(f"The folder {str(folder)!r} holds a run that is no stage of this recipe.", REMEDY)
    state = PartialState()
    # no process may begin, and write, before all have looked
    state.wait_for_everyone()
    record = {"stage": name, "settings": now, "finished": False}
    if state.is_main_process:
        _write(folder, record)
    state.wait_for_everyone()
    logger.info("%s: %s", name, folder)
    began = time.monotonic()
    outcome = dict(work())
    seconds = time.monotonic() - began
    if state.is_main_process:
        _write(folder, record | {"finished": True, "seconds": seconds, "outcome": outcome})
    state.wait_for_everyone()
    return Stage(name, folder, seconds, json.loads(json.dumps(outcome, default=str)))


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    write_whole(folder / STAGE_FILE, json.dumps(record, indent=1, default=str))


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / STAGE_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{str(path)!r} cannot be read: {error}.", "Delete the stage's folder.") from error
    if not isinstance(record, dict) or not {"settings", "finished"} <= record.keys():
        raise SettingsError(f"{str(path)!r} is not what a stage writes.", "Delete the stage's folder.")
    return record
