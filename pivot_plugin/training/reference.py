"""The reference cache: log-probabilities of the model before training, computed once per pair and kept on disk.

One folder per reference (weights, processor and whatever else changes a log-probability), in it parquet parts with one
row per pair, keyed by the pair's content. A part is written aside and renamed, so a killed run leaves whole parts or
none, and the next run computes only what is missing.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pivot_plugin.files import write_whole

# of the chosen and the rejected answer, and of whatever is scored beside them
Logps = tuple[float, ...]
_COLUMNS = ("key", "chosen", "rejected")
_BESIDE = "beside"


class ReferenceCache:
    """Reference log-probabilities on disk.

    Args:
        folder: where all references are kept.
        reference: what the log-probabilities depend on besides the pair: fingerprints and settings.
    """

    def __init__(self, folder: Path, reference: Mapping[str, object]) -> None:
        described = json.dumps(reference, sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(described.encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        described_file = self.folder / "reference.json"
        if not described_file.exists():
            write_whole(described_file, described)

    def read(self) -> dict[str, Logps]:
        """All that is known: by pair key, log-probabilities (natural log, summed over tokens) of answers."""
        known: dict[str, Logps] = {}
        for part in sorted(self.folder.glob("*.parquet")):
            columns = pq.read_table(part).to_pydict()
            beside = columns.get(_BESIDE) or [()] * len(columns["key"])
            known.update(
                (key, (chosen, rejected, *others))
                for key, chosen, rejected, others in zip(*(columns[name] for name in _COLUMNS), beside, strict=True)
            )
        return known

    def add(self, rows: Iterable[tuple[str, Logps]]) -> None:
        """Keep some more, as one new part."""
        rows = list(rows)
        if not rows:
            return
        columns = {
            "key": [key for key, _ in rows],
            "chosen": pa.array([chosen for _, (chosen, *_) in rows], pa.float32()),
            "rejected": pa.array([rejected for _, (_, rejected, *_) in rows], pa.float32()),
        }
        if len(rows[0][1]) > 2:
            columns[_BESIDE] = pa.array([others for _, (_, _, *others) in rows], pa.list_(pa.float32()))
        table = pa.table(columns)
        write_whole(self.folder / f"{uuid.uuid4().hex}.parquet", lambda path: pq.write_table(table, path))
