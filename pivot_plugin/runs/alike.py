"""What all processes of a run must have alike before it trains: code, settings, folder, model and rows.

Each compares itself with the first one. What differs is named by the process in which it does, and ends all.
"""

import functools
import hashlib
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import pivot_plugin
from pivot_plugin.data.pairs import PairStream
from pivot_plugin.data.rows import RowDataset
from pivot_plugin.encoders.record import versions
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.models.fingerprints import model_sample
from pivot_plugin.training.processes import Processes
from pivot_plugin.training.sharding import check_divisible

# of rows that tell two data sets apart; all would be read anew in every process
ROWS_COMPARED = 256
HASH_SHOWN = 16
# in which a file that one host has written is seen by another
SECONDS_TO_SEE_A_FILE = 10.0


def check_code(processes: Processes, folder: Path, settings: Mapping[str, Any]) -> None:
    """Make sure that all processes run the same code with the same settings.

    Args:
        processes: of the run.
        folder: of the run, as it was given.
        settings: as the run's record keeps them.

    Raises:
        SettingsError: naming what differs, where.
    """
    if processes.count > 1:
        facts = {"settings": settings, "output_dir": str(folder), "versions": versions(), "code": _sources()}
        processes.compare("code", facts)


@functools.cache
def _sources() -> str:
    """A hash of this package's own modules: checkouts differ where versions do not."""
    digest = hashlib.sha256()
    for base in map(Path, pivot_plugin.__path__):
        for file in sorted(base.rglob("*.py")):
            digest.update(str(file.relative_to(base)).encode() + file.read_bytes())
    return digest.hexdigest()[:HASH_SHOWN]


def check_folder(processes: Processes, folder: Path) -> None:
    """Make sure that all processes see the run's folder, which the first one has made.

    Args:
        processes: of the run.
        folder: of the run.

    Raises:
        SettingsError: in a process that does not see what the first one writes there.
    """
    if processes.count == 1:
        return
    mark = folder / f".seen.{uuid.uuid4().hex}"
    if processes.rank == 0:
        mark.touch()
    try:
        name = processes.decided("mark", mark.name)
        until = time.monotonic() + SECONDS_TO_SEE_A_FILE
        # a listing has network file systems look again
        while not (folder.is_dir() and any(file.name == name for file in folder.iterdir())):
            if time.monotonic() > until:
                raise SettingsError(
                    f"The run's folder {str(folder.resolve())!r} is not that of process 0: what it writes there is not "
                    "seen here.",
                    "Give an output_dir on a file system that all processes share, as an absolute path.",
                )
            time.sleep(0.2)
        processes.wait("mark seen")
    finally:
        if processes.rank == 0:
            mark.unlink(missing_ok=True)


def check_model(processes: Processes, model: PreTrainedModel) -> None:
    """Make sure that all processes hold the same model, and that it is one that their engine takes.

    Args:
        processes: of the run.
        model: the MLLM.

    Raises:
        SettingsError: naming what the engine does not take, or the process whose model differs.
    """
    if processes.count == 1:
        return
    check_divisible(model)
    facts = {"class": type(model).__name__, "dtype": str(model.dtype), "weights": model_sample(model)[:HASH_SHOWN]}
    processes.compare("model", {"model": facts})


def check_rows(processes: Processes, rows: RowDataset | PairStream, held_out: RowDataset | None) -> None:
    """Make sure that all processes have the same rows, and each at least one.

    Args:
        processes: of the run.
        rows: to train on; a stream is not looked at.
        held_out: to measure on.

    Raises:
        DataError: for fewer rows than processes.
        SettingsError: naming the process whose rows differ.
    """
    if processes.count == 1:
        return
    if isinstance(rows, RowDataset) and len(rows) < processes.count:
        raise DataError(
            f"{rows.name} has {len(rows)} rows to train on, fewer than the {processes.count} processes.",
            "Start fewer processes, or give more rows.",
        )
    named = {"data": rows, "held_out": held_out}
    processes.compare("rows", {name: _outline(data) for name, data in named.items() if isinstance(data, RowDataset)})


def _outline(rows: RowDataset) -> dict[str, Any]:
    step = max(1, len(rows) // ROWS_COMPARED)
    digest = hashlib.sha256()
    for position in range(0, len(rows), step):
        digest.update(rows.content_key(position).encode())
    return {"rows": len(rows), "content": digest.hexdigest()[:HASH_SHOWN]}
