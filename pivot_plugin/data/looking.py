"""One look at every row before training: in shares over processes, and remembered by content.

Rows are looked at in blocks. A block whose stored rows, image files and judge are those of an earlier look is read from
the cache. Blocks are dealt out to processes, and after every round each process has what all have found, so that all go
on, or stop at the same row, alike.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from pivot_plugin.errors import DataError

from .edits import made_of
from .images import ImageAccess, KnownImage, is_address
from .launch import Launch
from .looks import Looks, look_at
from .records import LARGEST_POOL, WORTH_PROCESSES, Judge
from .remembered import Block, RememberedBlocks, State, state_of

ROWS_PER_BLOCK = 1024
# between two exchanges, over all processes; what is exchanged is in the memory of each
BLOCKS_PER_ROUND = 256


class Rows(Protocol):
    """Rows in the normal form that can be looked at one by one."""

    @property
    def name(self) -> str: ...

    @property
    def access(self) -> ImageAccess: ...

    def __len__(self) -> int: ...

    def plain(self, position: int) -> dict[str, Any]: ...

    def where(self, position: int) -> str: ...

    def stored_digest(self, positions: range) -> str | None: ...


@dataclass(frozen=True)
class Looking:
    """A look at every row.

    Attributes:
        rows: to look at.
        judge: says which rows a model cannot take.
        known: what an earlier look without the judge has found; then rows are judged, and not decoded again.
        launch: processes that look together, each at its share.
        remembered: what earlier looks have found; None where nothing is kept.
    """

    rows: Rows
    judge: Judge | None = None
    known: Looks | None = None
    launch: Launch = field(default_factory=Launch)
    remembered: RememberedBlocks | None = None

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """The blocks in order, in every process all of them, each with the position of its first row."""
        count = -(-len(self.rows) // ROWS_PER_BLOCK)
        share = range(self.launch.rank, count, self.launch.count)
        found = self._found(share)
        round_length = max(BLOCKS_PER_ROUND, self.launch.count)
        quiet = len(self.rows) < WORTH_PROCESSES or self.launch.rank > 0
        with tqdm(total=len(self.rows), desc=f"checking {self.rows.name}", disable=quiet, leave=False) as bar:
            for start in range(0, count, round_length):
                numbers = range(start, min(start + round_length, count))
                of_round = self.launch.gather({number: next(found) for number in numbers if number in share})
                blocks = {number: block for one in of_round for number, block in one.items()}
                if self.remembered is not None and self.launch.local_rank == 0:
                    self.remembered.add([blocks[number] for number in numbers if blocks[number].fresh])
                for number in numbers:
                    yield number * ROWS_PER_BLOCK, blocks[number]
                    bar.update(len(blocks[number].looks))

    def _found(self, numbers: range) -> Iterator[Block]:
        """The blocks of this process: those that are remembered, and looks at the others."""
        digests: dict[int, str | None] = {}
        remembered: Mapping[str, Block] = {}
        if self.remembered is not None:
            digests = {number: self._digest(number) for number in numbers}
            remembered = self.remembered.read(digests.values())
        unknown = [number for number in numbers if digests.get(number) not in remembered]
        workers = min(self.launch.cores, LARGEST_POOL, len(unknown))
        loader = DataLoader(
            _Unknown(self, [(number, digests.get(number)) for number in unknown]),
            batch_size=None,
            # they take a second to start
            num_workers=workers if workers > 1 and len(self.rows) >= WORTH_PROCESSES else 0,
            # else it draws from the global one, and looking would change what is sampled or shuffled later
            generator=torch.Generator(),
        )
        looked: Iterator[Block] = iter(loader) if unknown else iter(())
        fresh = set(unknown)
        for number in numbers:
            yield next(looked) if number in fresh else remembered[str(digests[number])]

    def _digest(self, number: int) -> str | None:
        """What a block is remembered by; None where its stored rows have no digest."""
        positions = self.positions(number)
        stored = self.rows.stored_digest(positions)
        if stored is None:
            return None
        # errors name rows by their numbers
        named = [stored, self.rows.where(positions[0]), self.rows.where(positions[-1])]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()

    def positions(self, number: int) -> range:
        """Of the rows of a block."""
        return range(number * ROWS_PER_BLOCK, min((number + 1) * ROWS_PER_BLOCK, len(self.rows)))

    def look(self, number: int, digest: str | None) -> Block:
        """Look at the rows of one block.

        Args:
            number: of the block.
            digest: that it is to be remembered by.
        """
        positions = self.positions(number)
        known = self.known
        looks = Looks.empty(len(positions)) if known is None else known.at(slice(positions.start, positions.stop))
        errors: list[tuple[int, str, str, str]] = []
        files: dict[str, State] = {}
        met: dict[str, KnownImage] = {}

        def know(source: object, where: str) -> KnownImage:
            if not isinstance(source, str):
                return self.rows.access.known(source, where)
            # pairs of one picture mostly follow each other
            if source not in met:
                met[source] = self.rows.access.known(source, where)
            return met[source]

        lasts = digest is not None
        for offset, position in enumerate(positions):
            try:
                row, where = self.rows.plain(position), self.rows.where(position)
                if lasts:
                    shown = [*row["images"], *row.get("rejected_images", ())]
                    lasts = all(self._noted(source, files) for source in shown)
                if known is None:
                    looks.put(offset, look_at(row, self.rows.access, where, know))
                if self.judge is not None:
                    self.judge(row, self.rows.access, where)
            except DataError as error:
                errors.append((offset, error.finding, error.remedy, error.kind))
        return Block(digest if lasts else None, looks, errors, files)

    def _noted(self, source: object, files: dict[str, State]) -> bool:
        """Note the file of an image as it is now; False for an image that can change and leave no trace of it."""
        if any(is_address(one) for one in made_of(source)):
            return False
        try:
            paths = self.rows.access.files_of(source)
        except (OSError, ValueError):
            # which the look itself will say
            return False
        for path in paths:
            if str(path) not in files:
                files[str(path)] = state_of(path)
        return True


class _Unknown(Dataset[Block]):
    """Looks at blocks, in whichever process asks."""

    def __init__(self, looking: Looking, blocks: Sequence[tuple[int, str | None]]) -> None:
        self._looking = looking
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Block:
        return self._looking.look(*self._blocks[index])
