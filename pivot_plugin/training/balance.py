"""Pairs of an optimiser step dealt out to processes so that none waits long for another.

Which pairs a step has, and so its gradient, is left as it is: only who computes which of them changes. A forest costs
its nodes, and pairs that share their images share the nodes of these where they stand in one batch.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
from torch.utils.data import Sampler

from pivot_plugin.data.looks import Looks

from .batch import ForestBatch

T = TypeVar("T")
# rows of which it is measured how many nodes become of pixels and characters
MEASURED_ROWS = 16


def _batched(items: Iterable[T], length: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, length)):
        yield batch


class Ordered(Protocol):
    """An order of pairs that is drawn anew in every epoch."""

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...


@dataclass(frozen=True)
class Nodes:
    """How many nodes of a forest each pair is about.

    Attributes:
        shared: (pairs,) those of its images.
        own: (pairs,) those of its texts.
        keys: (pairs,) of image sets, empty for none; pairs with one key share the nodes of their images.
    """

    shared: np.ndarray
    own: np.ndarray
    keys: np.ndarray

    def of_batch(self, positions: Sequence[int]) -> float:
        """Of the forest of some pairs, about."""
        shared = {self.keys[position] or position: float(self.shared[position]) for position in positions}
        return sum(shared.values()) + float(self.own[list(positions)].sum())


@dataclass(frozen=True)
class NodeRates:
    """How many nodes become of pixels and characters, measured on some rows.

    Attributes:
        pixels, image_nodes: of the rows, by number of pixels; in between nodes grow evenly.
        per_character: nodes of a character.
    """

    pixels: tuple[float, ...]
    image_nodes: tuple[float, ...]
    per_character: float

    def nodes(self, looks: Looks) -> Nodes:
        """Of rows that were looked at."""
        shared = np.interp(looks.pixels, self.pixels, self.image_nodes) * (looks.pixels > 0)
        return Nodes(shared, looks.characters * self.per_character, looks.keys)


def measure_rates(looks: Looks, collate: Callable[[int], Mapping[str, Any]]) -> NodeRates:
    """Measure how many nodes become of pixels and characters, on rows from few pixels to many.

    Args:
        looks: at the rows.
        collate: makes the batch of one row, by its position.
    """
    order = np.argsort(looks.pixels, kind="stable")
    sample = order[np.unique(np.linspace(0, len(order) - 1, MEASURED_ROWS).round().astype(int))]
    by_pixels: dict[float, list[float]] = defaultdict(list)
    texts = characters = 0.0
    for position in sample.tolist():
        batch: ForestBatch = collate(position)["forest"]
        of_images = float(sum(batch.image_tokens))
        by_pixels[float(looks.pixels[position])].append(of_images)
        texts += float(batch.forest.is_node.sum()) - of_images
        characters += float(looks.characters[position])
    pixels = sorted(by_pixels)
    image_nodes = tuple(sum(by_pixels[number]) / len(by_pixels[number]) for number in pixels)
    return NodeRates(tuple(pixels), image_nodes, max(texts, 1.0) / max(characters, 1.0))


def deal(positions: Sequence[int], nodes: Nodes, batches: int, size: int) -> list[list[int]]:
    """Deal pairs out to batches of equal length whose forests have about equally many nodes.

    The largest first, each to the batch with the fewest nodes that has room; pairs that share their images stay
    together where a batch has room for them.

    Args:
        positions: of the pairs, `batches` times `size` of them.
        nodes: of all pairs.
        batches: how many.
        size: of a batch.

    Returns:
        the batches, each with its pairs in the order in which they came.
    """
    groups: dict[object, list[int]] = defaultdict(list)
    for position in positions:
        groups[nodes.keys[position] or position].append(position)
    # what does not fit into one batch is several
    together = [part for group in groups.values() for part in _batched(group, size)]
    together.sort(key=nodes.of_batch, reverse=True)
    made: list[list[int]] = [[] for _ in range(batches)]
    loads = [0.0] * batches
    while together:
        group = together.pop(0)
        room = [number for number in range(batches) if size - len(made[number]) >= len(group)]
        if room:
            chosen = min(room, key=lambda number: loads[number])
            part = group
        else:
            # the roomiest takes what it can
            chosen = max(range(batches), key=lambda number: (size - len(made[number]), -loads[number]))
            part, rest = group[: size - len(made[chosen])], group[size - len(made[chosen]) :]
            together.insert(0, rest)
        made[chosen] += part
        loads[chosen] += nodes.of_batch(part)
    place = {position: number for number, position in enumerate(positions)}
    return [sorted(batch, key=place.__getitem__) for batch in made]


class BalancedSampler(Sampler[int]):
    """An order of pairs in which those of an optimiser step are dealt out to the processes evenly.

    Every step has the pairs that it has in the order it is made from. The last one, where it is not full, stays as it
    is.

    Args:
        order: of the pairs, drawn anew in every epoch.
        nodes: of all pairs.
        processes: of the launch; accelerate gives batches to them in turn.
        size: pairs of a batch.
        accumulated: batches of a process in an optimiser step.
        seed: by which it is drawn who computes which batch.
    """

    def __init__(self, order: Ordered, nodes: Nodes, processes: int, size: int, accumulated: int, seed: int) -> None:
        self._order = order
        self._nodes = nodes
        self._processes = processes
        self._size = size
        self._accumulated = accumulated
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; called by the data loader."""
        self._epoch = epoch
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self._seed}-{self._epoch}-balance")
        batches = self._processes * self._accumulated
        for step in _batched(self._order, batches * self._size):
            if len(step) < batches * self._size:
                yield from step
                continue
            dealt = sorted(deal(step, self._nodes, batches, self._size), key=self._nodes.of_batch)
            # engines that divide weights wait for each other in every batch: those of about a size come together,
            # and over the batches of a step each process gets its large ones and its small ones
            rounds = list(_batched(dealt, self._processes))
            whose = rng.sample(range(self._processes), self._processes)
            for number, one in enumerate(rounds):
                turned = one if number % 2 == 0 else one[::-1]
                rounds[number] = [turned[who] for who in whose]
            rng.shuffle(rounds)
            for one in rounds:
                for batch in one:
                    yield from batch
