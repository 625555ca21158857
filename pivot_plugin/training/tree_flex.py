"""FlexAttention's block masks of trees, found from ranges of nodes: no mask of all nodes by all nodes is made.

FlexAttention looks at blocks of 128 queries by 128 keys. It skips those in which nobody sees anybody, computes those in
which everybody sees everybody without a mask, and asks for the others, node by node. Which blocks are which follows
from the smallest and largest end, depth and image block of the nodes in them. Where that does not tell for sure, a
block is asked for; it is never skipped.

Notation: B rows, N nodes of a row, T blocks of nodes in a row.
"""

from typing import Any

import torch

from .attention import FLEX_BLOCK, TreeAttention


def visited(attention: TreeAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks FlexAttention looks into, and which of them everybody sees.

    Args:
        attention: on trees.

    Returns:
        (B, T, T) booleans, queries in the second dimension: blocks in which somebody may see somebody, and those in
        which everybody sees everybody for sure. The second are among the first.
    """
    rows, nodes = attention.end.shape
    pattern = attention.pattern
    blocks = -(-nodes // FLEX_BLOCK)
    missing = blocks * FLEX_BLOCK - nodes

    def span(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) smallest and largest value of each block; what is missing of the last repeats its last node."""
        whole = torch.cat([values, values[:, -1:].expand(rows, missing)], dim=1).view(rows, blocks, FLEX_BLOCK)
        return whole.amin(-1), whole.amax(-1)

    number = torch.arange(blocks, device=attention.end.device)
    first = number * FLEX_BLOCK
    last = (first + FLEX_BLOCK - 1).clamp(max=nodes - 1)
    least_end, greatest_end = span(attention.end)
    least_depth, greatest_depth = span(attention.depth)
    behind = number[:, None] > number[None]
    # for a query in I and a key in J before it: the key's descendants reach the first query, or the last one
    seen = (behind & (greatest_end[:, None, :] > first[None, :, None])) | (number[:, None] == number[None])
    full = behind & (least_end[:, None, :] > last[None, :, None])
    if pattern.window is not None:
        near = least_depth[:, :, None] - greatest_depth[:, None, :] < pattern.window
        full &= greatest_depth[:, :, None] - least_depth[:, None, :] < pattern.window
        if not pattern.block_in_window:
            seen = _with_image_blocks(seen & near, attention, span)
        else:
            seen = _with_image_blocks(seen, attention, span) & near
    else:
        seen = _with_image_blocks(seen, attention, span)
    return seen, full & seen


def _with_image_blocks(seen: torch.Tensor, attention: TreeAttention, span: Any) -> torch.Tensor:
    """Blocks in which somebody may see somebody, by sharing an image as well."""
    if attention.block is None:
        return seen
    _, greatest = span(attention.block)
    # of those that belong to one; none is larger than any
    belonging = torch.where(attention.block < 0, torch.iinfo(attention.block.dtype).max, attention.block)
    least, _ = span(belonging)
    return seen | ((least[:, :, None] <= greatest[:, None, :]) & (least[:, None, :] <= greatest[:, :, None]))


def block_mask(attention: TreeAttention) -> Any:
    """A pattern on trees as a FlexAttention block mask.

    Args:
        attention: on trees.
    """
    from torch.nn.attention.flex_attention import BlockMask

    nodes = attention.end.shape[1]
    seen, full = visited(attention)
    partial = _listed(seen & ~full)
    return BlockMask.from_kv_blocks(
        *partial,
        *_listed(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=_mask_function(attention),
        seq_lengths=(nodes, nodes),
    )


def _listed(visits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 1, T) how many blocks of keys each block of queries visits, and (B, 1, T, T) their numbers, these first."""
    order = visits.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return visits.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()


def _mask_function(attention: TreeAttention) -> Any:
    """Who sees whom in the form in which FlexAttention asks: a plain function, which is compiled once for a pattern."""
    of_row = attention.in_int32()

    def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return of_row.sees(row, head, query, key)

    return sees
