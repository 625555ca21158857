"""Held-out pairs looked at in shares, so that every process, and one by itself, finds the same numbers.

Trainers fill up the last batches of several processes with rows that were seen already, and count them; and a last
batch that is smaller counts as much as another. Here every pair counts once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.data_loader import DataLoaderShard
from datasets import Dataset

from pivot_plugin.data.launch import Launch


@dataclass(frozen=True)
class Look:
    """A batch of held-out pairs as one process computes it.

    Attributes:
        positions: of its pairs.
        pairs: how many the batches of all processes have together, none twice.
    """

    positions: list[int]
    pairs: int


def looks_of(rows: int, size: int, launch: Launch) -> list[Look]:
    """The batches of a process: all processes have equally many, and those of one number are of one length.

    What is left over when the rows are dealt out, fewer than there are processes, is computed by all of them.

    Args:
        rows: how many there are.
        size: of a batch.
        launch: processes that look together.
    """
    looks = []
    start = 0
    while rows - start >= launch.count:
        each = min(size, (rows - start) // launch.count)
        first = start + launch.rank * each
        looks.append(Look(list(range(first, first + each)), each * launch.count))
        start += each * launch.count
    for first in range(start, rows, size):
        positions = list(range(first, min(first + size, rows)))
        looks.append(Look(positions, len(positions)))
    return looks


def shares_of(rows: int, size: int, launch: Launch) -> tuple[list[list[int]], list[list[int]]]:
    """All batches of some rows, and those that a process scores; all processes score equally many.

    Args:
        rows: how many there are.
        size: of a batch.
        launch: processes that score together.
    """
    batches = [list(range(start, min(start + size, rows))) for start in range(0, rows, size)]
    share = batches[launch.rank :: launch.count]
    if len(share) < -(-len(batches) // launch.count):
        # where weights are divided all compute together: who has a batch less computes the first again
        share = [batches[0], *share]
    return batches, share


class _Batches:
    """The batches of a process, as a data loader takes them."""

    # so that accelerate finds nothing left over at the end
    batch_size = 1
    drop_last = False

    def __init__(self, looks: Sequence[Look]) -> None:
        self._looks = looks

    def __len__(self) -> int:
        return len(self._looks)

    def __iter__(self) -> Iterator[list[int]]:
        return (look.positions for look in self._looks)


class HeldOutLoader:
    """Batches of held-out pairs, and how much each counts.

    Args:
        rows: that point to the pairs.
        looks: at them, of this process.
        collator: of the rows.
        **options: of torch's data loader.

    Attributes:
        weight: of the batch that was given last, such that a mean over batches is one over pairs.
        pairs: of that batch in all processes, none twice.
    """

    def __init__(
        self, rows: Dataset, looks: Sequence[Look], collator: Callable[[Sequence[Any]], Any], **options: Any
    ) -> None:
        self.dataset = rows
        self.weight, self.pairs = 1.0, 0
        self._looks = looks
        # registers with accelerate, so that what is gathered meanwhile is not cut as the training data's last batch is
        self._loader = DataLoaderShard(rows, batch_sampler=_Batches(looks), collate_fn=collator, **options)

    def __len__(self) -> int:
        return len(self._looks)

    def __iter__(self) -> Iterator[Any]:
        pairs = sum(look.pairs for look in self._looks)
        for look, batch in zip(self._looks, self._loader, strict=True):
            self.weight, self.pairs = look.pairs * len(self._looks) / pairs, look.pairs
            yield batch
