"""A step in parts that fit: which pairs are computed together, and what the parts of a step say of the whole.

A loss of pairs is a mean over pairs, or over tokens, so that the mean of the parts' losses, each weighted by its share
of the pairs (tokens), is that of the whole, and so are gradients. Parts are runs of the batch in its order.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from pivot_plugin.errors import SettingsError

from .forest import common_prefix

# losses that compare the pairs of a batch with each other
WHOLE_BATCH_LOSSES = ("aot", "aot_unpaired")
# of a batch: its parts; of a part: its share of the pairs, and the chosen tokens of the whole batch
PARTS, SHARE, TOKENS = "parts", "share", "batch_tokens"
# metrics that TRL averages over tokens: of all answers, of the chosen, of the rejected
OVER_TOKENS = {"entropy": 0, "logits/chosen": 1, "mean_token_accuracy": 1, "logits/rejected": 2}


class NodeCount:
    """Nodes of the trees that sequences grow into, counted as they come."""

    def __init__(self) -> None:
        self._sequences: dict[Hashable, list[np.ndarray]] = {}
        self.total = 0

    def add(self, tree: Hashable, sequence: Sequence[int]) -> None:
        """Count a sequence.

        Args:
            tree: that it belongs to.
            sequence: token ids.
        """
        array = np.asarray(sequence, dtype=np.int64)
        others = self._sequences.setdefault(tree, [])
        self.total += len(array) - max((common_prefix(array, other) for other in others), default=0)
        others.append(array)


def runs_that_fit(
    pairs: Sequence[Sequence[tuple[Hashable, Sequence[int]]]], images: Sequence[Hashable], max_nodes: int
) -> list[slice]:
    """Cut pairs, in their order, into runs whose trees have no more than so many nodes.

    Pairs that show the same stay together where they fit, so that what they show is computed once. A pair that is
    larger by itself is a run of its own.

    Args:
        pairs: for each pair its sequences, each with the tree that it belongs to.
        images: for each pair what it shows.
        max_nodes: of a run.
    """

    def nodes(start: int, stop: int) -> int:
        count = NodeCount()
        for sequences in pairs[start:stop]:
            for tree, sequence in sequences:
                count.add(tree, sequence)
        return count.total

    bounds = [0]
    position = 0
    for _, group in groupby(images):
        stop = position + len(list(group))
        if nodes(bounds[-1], stop) > max_nodes:
            if position > bounds[-1]:
                bounds.append(position)
            for pair in range(position, stop):
                if pair > bounds[-1] and nodes(bounds[-1], pair + 1) > max_nodes:
                    bounds.append(pair)
        position = stop
    return [slice(start, stop) for start, stop in zip(bounds, [*bounds[1:], len(pairs)], strict=True)]


def parts_of(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a collated batch; itself where it has none."""
    parts: list[dict[str, Any]] = inputs.get(PARTS) or [inputs]
    return parts


def check(loss_types: Sequence[str], max_nodes: int | None, processes: int, balances_experts: bool) -> None:
    """Refuse to split what cannot be split.

    Args:
        loss_types: TRL's.
        max_nodes: the setting; None splits nothing.
        processes: that train together.
        balances_experts: whether a loss looks at the experts of a whole batch.

    Raises:
        SettingsError: for a loss that needs the batch as a whole, and in several processes.
    """
    if max_nodes is None:
        return
    whole = [name for name in loss_types if name in WHOLE_BATCH_LOSSES]
    reason = (
        f"the loss {whole[0]!r} compares the pairs of a batch with each other"
        if whole
        else f"{processes} processes train, of which each waits for what the others have of as many pairs"
        if processes > 1
        else "the balance of experts is one of whole batches"
        if balances_experts
        else None
    )
    if reason is not None:
        raise SettingsError(
            f"max_nodes is {max_nodes}, and {reason}.",
            "Leave max_nodes out, with a smaller per_device_train_batch_size and more gradient_accumulation_steps.",
        )


class MergedMetrics:
    """Puts what TRL logs of the parts of a batch together to what it would log of the whole.

    Args:
        metrics: TRL's, lists by name, to which each part appends.
    """

    def __init__(self, metrics: Mapping[str, list[float]]) -> None:
        self._metrics = metrics
        self._before = {name: len(values) for name, values in metrics.items()}

    def merge(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Replace what the parts appended.

        Args:
            parts: collated, in order, each with its `completion_mask` (S, 1 + C), chosen answers first.
        """
        masks = [part["completion_mask"][:, 1:].chunk(2) for part in parts]
        chosen = torch.tensor([float(sides[0].sum()) for sides in masks])
        rejected = torch.tensor([float(sides[1].sum()) for sides in masks])
        pairs = torch.tensor([float(part[SHARE]) for part in parts])
        tokens = [chosen + rejected, chosen, rejected]
        for name, values in self._metrics.items():
            first = self._before.get(name, 0)
            if len(values) - first != len(parts):
                continue
            weights = tokens[OVER_TOKENS[name]] if name in OVER_TOKENS else pairs
            mean = (torch.tensor(values[first:]) * weights).sum() / weights.sum().clamp(min=1e-9)
            values[first:] = [float(mean)]
