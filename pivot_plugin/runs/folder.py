"""The folder of a run: claimed before anything is paid for, and its record."""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivot_plugin.errors import SettingsError
from pivot_plugin.files import RUN_FILE, read_record, remove_halves, same_settings, write_whole
from pivot_plugin.training.checkpoints import final_checkpoint, last_checkpoint

from .leftovers import whole_model

logger = logging.getLogger(__name__)

# what a run has paid for, beside its record
PAID_FOR = ("checkpoint-*", "own-answers", "round-*", "encoder", "probes")
# per device, as TRL and transformers have them
BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
# settings that change how much memory a run takes, and not what it computes, where the effective batch is the same
MEMORY = frozenset(
    (
        *BATCH,
        *("per_device_eval_batch_size", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "torch_empty_cache_steps"),
        *("eval_accumulation_steps", "sampling_batch_size", "precompute_ref_batch_size"),
    )
)
# settings of what is shown and reported
SHOWN = frozenset(
    (
        *("disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "logging_dir", "log_level"),
        *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
    )
)


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
    record = read_record(folder)
    if not resume:
        _refuse_what_was_paid_for(folder, record)
        return
    if record is None:
        raise SettingsError(
            f"{str(folder / RUN_FILE)!r} cannot be read.", "Choose another output_dir, or delete this one."
        )
    if not isinstance(record.get("settings"), dict) or not isinstance(record.get("finished", False), bool):
        raise SettingsError(
            f"{str(folder / RUN_FILE)!r} is not what a run writes.", "Choose another output_dir, or delete this one."
        )
    was, now = dict(record["settings"]), dict(settings)
    if _batch(was) == _batch(now):
        # the same steps on the same rows, in more or less memory
        was, now = ({name: value for name, value in one.items() if name not in MEMORY} for one in (was, now))
    same_settings(
        {name: value for name, value in was.items() if name not in SHOWN},
        {name: value for name, value in now.items() if name not in SHOWN},
        f"The run in {str(folder)!r}",
        "Resume with the same settings, or choose another output_dir.",
    )
    remove_halves(folder)


def _refuse_what_was_paid_for(folder: Path, record: Mapping[str, Any] | None) -> None:
    """Refuse a folder with anything of an earlier run that would be lost; a start that failed has left nothing.

    Raises:
        SettingsError: if it has, or another process is at it.
    """
    remedy = "Choose another output_dir, delete this one, or go on with it by resume=True (--resume)."
    process = (record or {}).get("process") or {}
    if _runs(process):
        raise SettingsError(
            f"output_dir {str(folder)!r} is that of a run that goes on, in process {process['pid']} on "
            f"{process['host']}.",
            "Choose another output_dir, or wait for it.",
        )
    paid = record is None or record.get("finished") is not False or any(any(folder.glob(name)) for name in PAID_FOR)
    if paid:
        raise SettingsError(f"output_dir {str(folder)!r} holds an earlier run.", remedy)
    logger.info("An earlier start in %s came to no checkpoint; the folder is used anew.", folder)


def _runs(process: Mapping[str, Any]) -> bool:
    """Whether a process that is not this one goes on, as far as can be told; on another machine it is taken to."""
    pid, host = process.get("pid"), process.get("host")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def this_process() -> dict[str, Any]:
    """Which process is at a run, for its record."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _batch(settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Rows of an optimiser step on a process, None where settings are not what they should be."""
    size, times = (settings.get(name, default) for name, default in BATCH.items())
    return (size * times,) if isinstance(size, int) and isinstance(times, int) else None


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run in a folder if it has finished.

    Args:
        folder: of the run, claimed already.

    Raises:
        SettingsError: if it has, and left neither a checkpoint nor a folder that its model could be taken from.
    """
    record = read_record(folder)
    if record is None or not record.get("finished"):
        return None
    if final_checkpoint(folder, record.get("history", [])) is None and whole_model(folder, record) is None:
        raise SettingsError(
            f"The run in {str(folder)!r} has finished, and kept no checkpoint of its last step, from which the "
            "language model that it trained could be taken.",
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
