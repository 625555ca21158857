"""What was found in blocks of rows, kept on disk, so that the same data are not looked at twice.

A block is found again by the digest of its stored rows, in a folder of everything else that what is found depends on.
The files of its images must have the size and the time of change that they had. Parquet files, one for every round of a
look, are written aside and renamed.
"""

import functools
import hashlib
import inspect
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.fingerprint import Hasher

from pivot_plugin import __version__
from pivot_plugin.errors import said
from pivot_plugin.files import write_whole

from .images import KEY_LENGTH
from .looks import CONTENT_LENGTH, Looks

logger = logging.getLogger(__name__)

# of a file: bytes and nanoseconds, None where there is none
State = tuple[int, int] | None
_DIGEST = "digest"


@dataclass(frozen=True)
class Block:
    """What was found in some rows.

    Attributes:
        digest: by which it is found again, None where it is not to be kept.
        looks: at the rows; empty ones at rows that cannot be used.
        errors: (row, finding, remedy, kind) of each row that cannot be used, counted from the block's first.
        files: of the images, as they were before they were looked at, by path.
        fresh: whether the rows were looked at now.
    """

    digest: str | None
    looks: Looks
    errors: Sequence[tuple[int, str, str, str]] = ()
    files: Mapping[str, State] = field(default_factory=dict)
    fresh: bool = True

    def unchanged(self) -> bool:
        """Whether the files of its images are as they were."""
        return all(state_of(path) == state for path, state in self.files.items())


def state_of(path: Path | str) -> State:
    """Size and time of change of a file."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


class RememberedBlocks:
    """Blocks on disk.

    Args:
        folder: where all are kept.
        context: what is found depends on besides stored rows and files: layout, access, judge, versions.
    """

    def __init__(self, folder: Path, context: Mapping[str, object]) -> None:
        described = json.dumps(context, sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(described.encode()).hexdigest()[:32]

    def read(self, digests: Iterable[str | None]) -> dict[str, Block]:
        """Those of some blocks that are kept, and whose files are unchanged.

        Args:
            digests: of the blocks.
        """
        wanted = set(digests) - {None}
        kept: dict[str, Block] = {}
        for part in sorted(self.folder.glob("*.parquet")):
            try:
                here = pq.read_table(part, columns=[_DIGEST]).column(_DIGEST).to_pylist()
                rows = [row for row, digest in enumerate(here) if digest in wanted and digest not in kept]
                if rows:
                    found = map(_block, pq.read_table(part).take(rows).to_pylist())
                    kept |= {str(block.digest): block for block in found}
            # damaged, or another version's: what it held is looked at again
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
                logger.warning("%s is left out: %s", part, said(error))
        return {digest: block for digest, block in kept.items() if block.unchanged()}

    def add(self, blocks: Sequence[Block]) -> None:
        """Keep some more, as one new part; where the disk refuses, they are looked at again the next time."""
        blocks = [block for block in blocks if block.digest is not None]
        if not blocks:
            return
        table = pa.Table.from_pylist([_row(block) for block in blocks])
        try:
            write_whole(self.folder / f"{uuid.uuid4().hex}.parquet", lambda path: pq.write_table(table, path))
        except OSError as error:
            logger.warning("What was checked is not kept in %s: %s", self.folder, said(error))


@functools.cache
def _own_code() -> str:
    """A hash of the code by which rows are read and judged."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    digest.update(__version__.encode())
    for library in ("pillow", "transformers", "tokenizers"):
        digest.update(version(library).encode())
    return digest.hexdigest()


def code_of(layout: Callable[..., object] | None) -> str | None:
    """A hash of the code by which rows are read, None where it cannot be told.

    Args:
        layout: that rows come in; a plugin's stands in a file of its own, or came with a notebook.
    """
    if layout is None:
        return _own_code()
    try:
        file = inspect.getsourcefile(layout if inspect.isroutine(layout) else type(layout))
        source = Path(str(file)).read_bytes()
        return hashlib.sha256(_own_code().encode() + Hasher.hash(layout).encode() + source).hexdigest()
    # pickling whatever a function holds
    except Exception:
        return None


def digest_of(rows: Sequence[object]) -> str:
    """A key that is equal for rows of equal plain values.

    Args:
        rows: as they are stored.

    Raises:
        TypeError: for values that are not plain.
    """
    return hashlib.sha256(json.dumps(rows, default=_plain).encode()).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, Path):
        return {"path": str(value)}
    raise TypeError(f"a {type(value).__name__}")


def _row(block: Block) -> dict[str, str | bytes | None]:
    arrays = {name: np.ascontiguousarray(values).tobytes() for name, values in vars(block.looks).items()}
    return {_DIGEST: block.digest, "errors": json.dumps(block.errors), "files": json.dumps(block.files), **arrays}


def _block(row: Mapping[str, str | bytes]) -> Block:
    files = {path: state and tuple(state) for path, state in json.loads(row["files"]).items()}
    errors = [tuple(error) for error in json.loads(row["errors"])]
    keys, rejected_keys, origins = (
        np.frombuffer(row[name], dtype=f"S{KEY_LENGTH}")  # type: ignore[arg-type]
        for name in ("keys", "rejected_keys", "origins")
    )
    contents = np.frombuffer(row["contents"], dtype=np.uint8).reshape(-1, CONTENT_LENGTH)  # type: ignore[arg-type]
    pixels = np.frombuffer(row["pixels"], dtype=np.int64)  # type: ignore[arg-type]
    characters = np.frombuffer(row["characters"], dtype=np.int32)  # type: ignore[arg-type]
    looks = Looks(keys, rejected_keys, origins, contents, pixels, characters)
    if len({len(values) for values in vars(looks).values()}) > 1:
        raise ValueError("arrays of unequal lengths")
    return Block(str(row[_DIGEST]), looks, errors, files, fresh=False)
