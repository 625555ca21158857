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
from pivot_plugin.files import write_whole

logger = logging.getLogger(__name__)

STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class Stage:
    """One stage as it ended.

    Attributes:
        name: of the stage.
        folder: its own.
        seconds: it took, over all attempts that ended; 0 for one that is not done.
        outcome: what it told.
    """

    name: str
    folder: Path
    seconds: float
    outcome: dict[str, Any]


def stage(name: str, folder: Path, settings: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]) -> Stage:
    """Do the work of a stage, unless it is done.

    Args:
        name: shown to users.
        folder: of the stage.
        settings: all that decides what comes out, in words that JSON has.
        work: does it, going on with what lies in the folder; returns what is to be remembered.

    Raises:
        SettingsError: if the folder holds a stage of other settings, naming the first that differs.
    """
    now = json.loads(json.dumps(settings, default=str))
    earlier = _read(folder)
    if earlier is not None:
        _same(folder, earlier["settings"], now)
        if earlier.get("finished"):
            logger.info("%s is done: %s", name, folder)
            return Stage(name, folder, float(earlier["seconds"]), earlier["outcome"])
    state = PartialState()
    if state.is_main_process:
        write_whole(folder / STAGE_FILE, json.dumps({"stage": name, "settings": now, "finished": False}, indent=1))
    state.wait_for_everyone()
    logger.info("%s: %s", name, folder)
    began = time.monotonic()
    outcome = dict(work())
    seconds = time.monotonic() - began
    if state.is_main_process:
        record = {"stage": name, "settings": now, "finished": True, "seconds": seconds, "outcome": outcome}
        write_whole(folder / STAGE_FILE, json.dumps(record, indent=1, default=str))
    state.wait_for_everyone()
    return Stage(name, folder, seconds, json.loads(json.dumps(outcome, default=str)))


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((folder / STAGE_FILE).read_text())
    except OSError:
        return None
    except ValueError as error:
        raise SettingsError(
            f"{str(folder / STAGE_FILE)!r} is not what a stage writes: {error}.", "Delete the stage's folder."
        ) from error
    return record


def _same(folder: Path, was: Any, now: Any) -> None:
    name, before, after = _first_difference(was, now, ())
    if name is None:
        return
    raise SettingsError(
        f"The stage in {str(folder)!r} is another recipe's: its {name} was {before!r}, here it is {after!r}.",
        "Choose another output_dir, or delete that stage's folder and those of the stages after it.",
    )


def _first_difference(was: Any, now: Any, path: tuple[str, ...]) -> tuple[str | None, Any, Any]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*was, *now]):
            found = _first_difference(was.get(key), now.get(key), (*path, str(key)))
            if found[0] is not None:
                return found
        return None, None, None
    return (None, None, None) if was == now else (".".join(path), was, now)
