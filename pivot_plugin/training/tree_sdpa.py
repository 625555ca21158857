"""Attention over trees by scaled dot products, in blocks of queries that see few keys: no mask of a whole row exists.

Nodes stand in depth-first order, so that what a run of queries sees is the run itself and the ancestors of its first
node: an ancestor of a later one that stands before the run is also an ancestor of the first. A row is cut into such
runs, each is one call of transformers' own SDPA on the keys that it sees, and a tree's trunk needs no mask at all.

    a b c d e f g      trunk   a b c        causal, without a mask
    a b c h i          run     d e f g      keys a b c | d e f g
                       run     h i          keys a b c | h i

This is one of transformers' attention implementations, `TREE_SDPA`, which is plain SDPA for every other mask.

Notation: N nodes of a row, L queries and K keys of a run, H heads, D width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .attention import TREE_SDPA, AttentionPattern, TreeAttention

# runs below the first length are put together, those above the second are cut: their masks would be large
SMALL_RUN, LARGE_RUN = 128, 1024
# kernels on GPUs want rows of a mask to begin at multiples of this many numbers, and copy it for every layer otherwise
MASK_ALIGNMENT = 16


@dataclass(frozen=True)
class Run:
    """Queries that stand together, and what they see.

    Attributes:
        start, stop: the nodes that ask.
        keys: ranges of nodes that any of them may see, in order.
        trunk: whether they are a path from a root, of which each node sees all before it.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    trunk: bool = False


def runs_of(end: np.ndarray, depth: np.ndarray, block: np.ndarray | None, pattern: AttentionPattern) -> list[Run]:
    """Cut a row of trees into runs of queries.

    Args:
        end, depth, block: (N,) of one row, as `TreeAttention` has them.
        pattern: of the layer.
    """
    count = len(end)
    node = np.arange(count)
    # a node continues the path of the one before it if that has no other child
    continues = np.zeros(count, dtype=bool)
    continues[1:] = (end[:-1] > node[1:]) & (end[:-1] == end[1:])
    is_root = np.ones(count, dtype=bool)
    is_root[1:] = np.maximum.accumulate(end)[:-1] <= node[1:]
    bounds = [*np.flatnonzero(~continues).tolist(), count]
    runs: list[Run] = []
    begun: int | None = None

    def close(stop: int) -> None:
        nonlocal begun
        if begun is not None:
            for start in range(begun, stop, LARGE_RUN):
                last = min(start + LARGE_RUN, stop)
                runs.append(Run(start, last, _seen_keys(start, last, end, depth, block, pattern)))
        begun = None

    for start, stop in pairwise(bounds):
        length = stop - start
        causal = pattern.block is None and (pattern.window is None or length <= pattern.window)
        if is_root[start] and causal and length > SMALL_RUN:
            close(start)
            runs.append(Run(start, stop, ((start, stop),), trunk=True))
            continue
        if begun is not None and stop - begun > SMALL_RUN:
            close(start)
        if begun is None:
            begun = start
    close(count)
    return runs


def _seen_keys(
    start: int, stop: int, end: np.ndarray, depth: np.ndarray, block: np.ndarray | None, pattern: AttentionPattern
) -> tuple[tuple[int, int], ...]:
    """Ranges of all nodes that a run may see, and of few others."""
    keys = end > start
    keys[start:] = False
    if pattern.window is not None:
        # what is seen by the node nearest to the root is farthest away
        keys &= depth > depth[start:stop].min() - pattern.window
    keys[start:stop] = True
    if block is not None:
        together = np.unique(block[start:stop])
        keys |= np.isin(block, together[together >= 0])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], keys.astype(np.int8), [0]])))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@dataclass
class TreeMask:
    """What a decoder's layers need to compute a row of trees: runs of queries, their keys, and the runs' masks.

    Attributes:
        attention: who sees whom, of one row.
        runs: of the row, in order.
        pieces: lengths of the pieces that all runs and ranges of keys are made of.
    """

    attention: TreeAttention
    runs: list[Run]
    pieces: list[int] = field(default_factory=list)
    _first: dict[int, int] = field(default_factory=dict)
    _masks: dict[torch.dtype, list[torch.Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bounds = {0, self.attention.end.shape[1]}
        bounds |= {node for run in self.runs for part in (*run.keys, (run.start, run.stop)) for node in part}
        ordered = sorted(bounds)
        self.pieces = [stop - start for start, stop in pairwise(ordered)]
        self._first = {node: number for number, node in enumerate(ordered)}

    def pieces_of(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Numbers of the pieces that make some ranges of nodes."""
        return [number for start, stop in ranges for number in range(self._first[start], self._first[stop])]

    def masks(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """For each run what is added to its scores, (1, 1, L, K), None for trunks; made once for all layers.

        Booleans would be turned into numbers by every layer anew, and each would keep its own for the backward pass.

        Args:
            dtype: of the queries.
        """
        if dtype not in self._masks:
            self._masks[dtype] = [None if run.trunk else self._mask(run, dtype) for run in self.runs]
        return self._masks[dtype]

    def sees(self, run: Run) -> torch.Tensor:
        """(L, K) booleans: whether a query of a run sees a key of its ranges."""
        device = self.attention.end.device
        queries = torch.arange(run.start, run.stop, device=device)
        keys = torch.cat([torch.arange(start, stop, device=device) for start, stop in run.keys])
        if run.trunk:
            return keys[None] <= queries[:, None]
        row = torch.zeros((), dtype=torch.long, device=device)
        return self.attention.sees(row, None, queries[:, None], keys[None])

    def _mask(self, run: Run, dtype: torch.dtype) -> torch.Tensor:
        sees = self.sees(run)
        queries, keys = sees.shape
        width = -(-keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
        mask = torch.zeros(queries, width, dtype=dtype, device=sees.device)[:, :keys]
        return mask.masked_fill_(~sees, torch.finfo(dtype).min)[None, None]

    def dense(self) -> torch.Tensor:
        """(1, N, N) booleans: who sees whom, put together from the runs."""
        count = self.attention.end.shape[1]
        seen = torch.zeros(1, count, count, dtype=torch.bool, device=self.attention.end.device)
        for run in self.runs:
            keys = torch.cat([torch.arange(start, stop) for start, stop in run.keys])
            seen[0, run.start : run.stop, keys] = self.sees(run)
        return seen

    def to(self, device: torch.device) -> "TreeMask":
        """The same on another device."""
        attention = self.attention.to(device)
        return TreeMask(attention, self.runs)


class TreeMaskTensor(torch.Tensor):
    """A `TreeMask` in the form in which models hand masks to their layers: a (1, 1, N, N) tensor without memory.

    A model that looks into its mask, instead of handing it on, would read nothing true: so it is refused.
    """

    tree_mask: TreeMask

    @staticmethod
    def of(tree_mask: TreeMask) -> "TreeMaskTensor":
        """The tensor that stands for a mask."""
        end = tree_mask.attention.end
        nodes = end.shape[1]
        tensor = torch.empty((), dtype=torch.bool, device=end.device).expand(1, 1, nodes, nodes)
        standing_for = tensor.as_subclass(TreeMaskTensor)
        standing_for.tree_mask = tree_mask
        return standing_for

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        kwargs = kwargs or {}
        if name == "to":
            mask: TreeMaskTensor = args[0]
            asked = (*args[1:], kwargs.get("device"))
            devices = [value for value in asked if isinstance(value, str | int | torch.device)]
            device = torch.device(devices[0]) if devices else mask.device
            return mask if device == mask.device else cls.of(mask.tree_mask.to(device))
        # its form, which models, hooks and engines look at
        if name in ("__get__", "dim", "size", "is_floating_point", "is_complex", "element_size", "get_device"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise TypeError(f"a mask of trees is handed on to attention as it is, and not asked for {name}")


def tree_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, and over a mask of trees run by run.

    Args:
        module: the attention layer.
        query, key, value: (1, H, N, D); keys and values may have fewer heads.
        attention_mask: a `TreeMaskTensor`, or anything that SDPA takes.
        **kwargs: as for transformers' attention functions.

    Returns:
        (1, N, H, D), and no weights.
    """
    if not isinstance(attention_mask, TreeMaskTensor):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise TypeError("a position bias counts positions in rows, which trees do not have")
    kwargs.pop("is_causal", None)
    tree_mask = attention_mask.tree_mask
    # split once, so that the backward pass puts gradients together once, too
    queries = query.split([run.stop - run.start for run in tree_mask.runs], dim=2)
    keys, values = key.split(tree_mask.pieces, dim=2), value.split(tree_mask.pieces, dim=2)
    outputs = []
    for run, of_run, mask in zip(tree_mask.runs, queries, tree_mask.masks(query.dtype), strict=True):
        numbers = tree_mask.pieces_of(run.keys)
        seen_keys, seen_values = (_joined([parts[number] for number in numbers]) for parts in (keys, values))
        outputs.append(
            sdpa_attention_forward(module, of_run, seen_keys, seen_values, mask, is_causal=run.trunk, **kwargs)[0]
        )
    return _joined(outputs, dim=1), None


def _joined(parts: Sequence[torch.Tensor], dim: int = 2) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def tree_mask(attention: TreeAttention) -> TreeMaskTensor:
    """A mask of one row of trees for `tree_sdpa`.

    Args:
        attention: of a single row.
    """
    end, depth = attention.end[0].cpu().numpy(), attention.depth[0].cpu().numpy()
    block = None if attention.block is None else attention.block[0].cpu().numpy()
    return TreeMaskTensor.of(TreeMask(attention.in_int32(), runs_of(end, depth, block, attention.pattern)))


# any other mask is SDPA's, and made as SDPA's is
AttentionInterface.register(TREE_SDPA, tree_sdpa)
AttentionMaskInterface.register(TREE_SDPA, sdpa_mask)
