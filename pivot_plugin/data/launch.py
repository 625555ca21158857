"""The processes of a launch, as work on rows is divided among them."""

import os
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """Launch that do something together, each its share.

    Attributes:
        rank: of this one, from 0.
        count: how many there are.
        local_rank: of this one on its node, from 0.
        local_count: how many there are on its node.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    def gather(self, mine: T) -> list[T]:
        """What every process has, in the order of their ranks; to be called by all of them.

        Args:
            mine: what this one has.
        """
        if self.count == 1:
            return [mine]
        everyones: list[T] = [mine] * self.count
        torch.distributed.all_gather_object(everyones, mine)
        return everyones

    def broadcast(self, mine: T | None, source: int) -> T:
        """What one process has, in all of them; to be called by all.

        Args:
            mine: what this one has.
            source: rank of the one that it is taken from.
        """
        box = [mine if self.rank == source else None]
        if self.count > 1:
            torch.distributed.broadcast_object_list(box, source)
        return box[0]  # type: ignore[return-value]

    @property
    def cores(self) -> int:
        """Processor cores that this process may use, one at least."""
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, usable // self.local_count)


def this_launch() -> Launch:
    """Those of this launch; this one alone where none is running."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Launch()
    return Launch(
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
