"""The reference cache: log-probabilities of the model before training, computed once per pair and kept on disk.

One folder per reference (weights, processor and whatever else changes a log-probability), in it Arrow files (IPC) with
one row per pair, sorted by the hash of the pair's content. They are read by memory map and searched, so that a process
holds no more than the numbers it asks for. A file is written aside and renamed, so a killed run leaves whole files or
none, and the next run computes only what is missing. A pass writes one file for each process, and makes one file of all
at its end.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from pivot_plugin.errors import SettingsError, said
from pivot_plugin.files import write_whole

logger = logging.getLogger(__name__)

KEY = "S32"
# of a file that is written again whenever something is added to it
LARGEST_PART = 100_000


class ReferenceCache:
    """Reference log-probabilities on disk.

    Args:
        folder: where all references are kept.
        reference: what the log-probabilities depend on besides the pair: fingerprints and settings.
        columns: of a pair: its chosen and its rejected answer, and whatever is scored beside them.

    Raises:
        SettingsError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, reference: Mapping[str, object], columns: int = 2) -> None:
        described = json.dumps(reference, sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(described.encode()).hexdigest()[:32]
        described_file = self.folder / "reference.json"
        try:
            if not described_file.exists():
                write_whole(described_file, described)
        except OSError as error:
            raise SettingsError(
                f"The reference cache {str(folder)!r} cannot be written: {error.strerror or error}.",
                "Set PIVOT_CACHE or reference_cache= to a folder with room that can be written.",
            ) from error
        self.columns = columns
        self._part: Path | None = None
        self._rows = (np.zeros(0, dtype=KEY), np.zeros((0, columns), dtype=np.float32))

    def look_up(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is known of some pairs.

        Args:
            keys: (pairs,) hashes of their contents, 32 bytes each.

        Returns:
            (pairs,) whether a pair is known, and (pairs, columns) log-probabilities (natural log, summed over tokens),
            0 where it is not.
        """
        known = np.zeros(len(keys), dtype=bool)
        logps = np.zeros((len(keys), self.columns), dtype=np.float32)
        for file in self._files():
            missing = np.flatnonzero(~known)
            if not len(missing):
                break
            with _read(file, self.columns) as (kept, columns):
                if not len(kept):
                    continue
                rows = np.minimum(np.searchsorted(kept, keys[missing]), len(kept) - 1)
                is_here = kept[rows] == keys[missing]
                logps[missing[is_here]] = np.stack([column[rows[is_here]] for column in columns], axis=1)
                known[missing[is_here]] = True
        return known, logps

    def add(self, keys: np.ndarray, logps: np.ndarray) -> None:
        """Keep some more, in this process's own file.

        Args:
            keys: as for `look_up`, none of them twice.
            logps: (pairs, columns).
        """
        if not len(keys):
            return
        if self._part is None or len(self._rows[0]) >= LARGEST_PART:
            self._part = self.folder / f"{uuid.uuid4().hex}.arrow"
            self._rows = (keys[:0], logps[:0])
        self._rows = (np.concatenate([self._rows[0], keys]), np.concatenate([self._rows[1], logps]))
        _write(self._part, *self._rows)

    def merge(self) -> None:
        """Make one file of all; what stands in it alone stays as long as there is no other that holds it too."""
        files = self._files()
        if len(files) < 2:
            return
        parts = []
        for file in files:
            with _read(file, self.columns) as (kept, columns):
                parts.append((kept.copy(), np.stack(columns, axis=1)))
        keys, rows = np.unique(np.concatenate([part[0] for part in parts]), return_index=True)
        logps = np.concatenate([part[1] for part in parts])[rows]
        # of a name of its own: another run may be making one, too, of other files
        _write(self.folder / f"{uuid.uuid4().hex}.arrow", keys, logps)
        for file in files:
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.arrow"), key=lambda file: file.name)


def _schema(columns: int) -> pa.Schema:
    names = ["chosen", "rejected", *(f"beside-{number}" for number in range(columns - 2))]
    return pa.schema([("key", pa.binary(32)), *((name, pa.float32()) for name in names)])


def _write(file: Path, keys: np.ndarray, logps: np.ndarray) -> None:
    order, schema = np.argsort(keys), _schema(logps.shape[1])
    stored = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys[order]).tobytes())]
    )
    columns = [stored, *(pa.array(logps[order, number], pa.float32()) for number in range(logps.shape[1]))]
    table = pa.RecordBatch.from_arrays(columns, schema=schema)

    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(table)

    write_whole(file, write)


@contextmanager
def _read(file: Path, columns: int) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """The keys and columns of a file, read when they are used; none of one that cannot be read."""
    batch = None
    try:
        mapped = pa.memory_map(str(file))
        batch = pa.ipc.open_file(mapped).get_batch(0)
    # another run has put it into a larger one meanwhile
    except FileNotFoundError:
        pass
    except (OSError, pa.ArrowException) as error:
        logger.warning("%s is left out, and what it held is computed again: %s", file, said(error))
    if batch is None or batch.schema != _schema(columns) or not batch.num_rows:
        yield np.zeros(0, dtype=KEY), [np.zeros(0, dtype=np.float32)] * columns
    else:
        keys = np.frombuffer(batch.column(0).buffers()[1], dtype=KEY, count=batch.num_rows)
        yield keys, [batch.column(1 + number).to_numpy() for number in range(columns)]
