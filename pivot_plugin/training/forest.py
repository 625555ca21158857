"""The prefix forest: token sequences that begin alike, stored and computed once.

A tree is the trie of its sequences: a node is a token, a sequence is a path from the root, and every distinct prefix is
one node. The nodes of a tree stand in one row in depth-first order, so the descendants of a node are the run of nodes
behind it; one number per node, where that run ends, is the whole attention mask.

    a b c      nodes   a  b  c  d  e        a node sees itself and its ancestors:
    a b d e    depth   0  1  2  2  3        c sees a b c, e sees a b d e
               end     5  5  3  5  5

The log-probability of a completion is the sum over its tokens of log p(token | parent node): the chain rule along the
path, so it equals a separate forward pass over the sequence. This file knows tokens, parents and depths. It knows
nothing of images, families, positions or losses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from pivot_plugin.errors import DataError


@dataclass(frozen=True)
class Tree:
    """The trie of some sequences, nodes in depth-first order.

    Attributes:
        tokens: (nodes,) token of each node.
        depth: (nodes,) distance from the root; the position of a token in its sequence.
        end: (nodes,) index after the last descendant.
        paths: for each sequence, in the order given, the nodes of its tokens.
    """

    tokens: np.ndarray
    depth: np.ndarray
    end: np.ndarray
    paths: list[np.ndarray]


def build_tree(sequences: Sequence[Sequence[int]]) -> Tree:
    """Build the trie of some sequences.

    In sorted order a sequence shares with all before it exactly what it shares with the one just before, so each adds
    the tokens behind that common prefix as new nodes.

    Args:
        sequences: token ids; equal ones share all nodes.
    """
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    order = sorted(range(len(arrays)), key=lambda index: tuple(sequences[index]))
    tokens: list[np.ndarray] = []
    depth: list[np.ndarray] = []
    total = sum(len(array) for array in arrays)
    end = np.zeros(total, dtype=np.int64)
    paths: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(arrays)
    count = 0
    previous, path = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for index in order:
        current = arrays[index]
        shared = common_prefix(previous, current)
        end[path[shared:]] = count
        added = len(current) - shared
        tokens.append(current[shared:])
        depth.append(np.arange(shared, len(current)))
        path = np.concatenate([path[:shared], np.arange(count, count + added)])
        paths[index] = path
        count += added
        previous = current
    end[path] = count
    none = np.empty(0, dtype=np.int64)
    return Tree(np.concatenate([*tokens, none]), np.concatenate([*depth, none]), end[:count], paths)


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


@dataclass(frozen=True)
class RowLayout:
    """How trees stand in the rows of a batch.

    Trees of one row cannot see each other: a node sees its ancestors alone.

    Attributes:
        packed: all trees one behind the other in a single row, which leaves nothing to pad; else a row for each.
        multiple: of nodes that a row is padded to.
    """

    packed: bool = False
    multiple: int = 1


ROW_PER_TREE = RowLayout()


@dataclass(frozen=True)
class Forest:
    """A batch of trees and which of their edges are scored for which sequence. Padding nodes see only themselves.

    Trees stand in the rows in their order. An edge leads from a parent node to one of its children; it is scored once,
    however many sequences it belongs to.

    Attributes:
        tokens: (B, N) token of each node, 0 for padding.
        depth: (B, N) position of each node in its sequence.
        end: (B, N) index after the last descendant.
        is_node: (B, N) false for padding.
        edge_row: (E,) row of each scored edge.
        edge_parent: (E,) node that predicts the edge's token.
        edge_token: (E,) the token predicted.
        edge_of: (S, C) edge of each completion token, -1 for padding.
        sequence_tree: (S,) tree of each sequence.
        sequence_row: (S,) row that its tree stands in.
        paths: for each sequence the nodes of its tokens, in its row.
    """

    tokens: torch.Tensor
    depth: torch.Tensor
    end: torch.Tensor
    is_node: torch.Tensor
    edge_row: torch.Tensor
    edge_parent: torch.Tensor
    edge_token: torch.Tensor
    edge_of: torch.Tensor
    sequence_tree: torch.Tensor
    sequence_row: torch.Tensor
    paths: list[torch.Tensor]

    @property
    def node_count(self) -> int:
        """Tokens that the model computes, padding left out."""
        return int(self.is_node.sum())

    @property
    def sequence_token_count(self) -> int:
        """Tokens that separate forward passes over the sequences would compute."""
        return sum(len(path) for path in self.paths)

    def placed(self) -> Iterator[tuple[int, torch.Tensor]]:
        """For each sequence its row, and the nodes of its tokens there."""
        return zip(self.sequence_row.tolist(), self.paths, strict=True)

    def prompt_lengths(self) -> list[int]:
        """For each sequence how many tokens stand before its completion."""
        completions = (self.edge_of >= 0).sum(dim=1).tolist()
        return [len(path) - completion for path, completion in zip(self.paths, completions, strict=True)]


def build_forest(
    groups: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    layout: RowLayout = ROW_PER_TREE,
) -> Forest:
    """Build the forest of some sequences.

    Args:
        groups: for each tree the indices of its sequences; every sequence stands in exactly one.
        sequences: S token sequences, prompt and completion.
        starts: for each sequence, where its completion starts.
        layout: of the rows.

    Raises:
        DataError: for a completion that starts at the first token, which nothing predicts.
    """
    if any(start < 1 for start in starts):
        raise DataError(
            "A sequence has an empty prompt, so nothing predicts its first token.", "Give every pair a prompt."
        )
    trees = [build_tree([sequences[index] for index in group]) for group in groups]
    lengths = [len(tree.tokens) for tree in trees]
    # where each tree stands: its row, and the node it begins at
    if layout.packed:
        rows, first = [0] * len(trees), [0, *accumulate(lengths)][:-1]
    else:
        rows, first = list(range(len(trees))), [0] * len(trees)
    sequence_tree = np.zeros(len(sequences), dtype=np.int64)
    paths: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(sequences)
    for number, (group, tree) in enumerate(zip(groups, trees, strict=True)):
        for index, path in zip(group, tree.paths, strict=True):
            sequence_tree[index], paths[index] = number, path + first[number]

    edges: dict[tuple[int, int], int] = {}
    edge_row, edge_parent, edge_token, edge_of = [], [], [], []
    for index, start in enumerate(starts):
        owner = int(sequence_tree[index])
        row = []
        for parent, child in pairwise(paths[index][start - 1 :].tolist()):
            if (owner, child) not in edges:
                edges[owner, child] = len(edges)
                edge_row.append(rows[owner])
                edge_parent.append(parent)
                edge_token.append(int(trees[owner].tokens[child - first[owner]]))
            row.append(edges[owner, child])
        edge_of.append(torch.tensor(row, dtype=torch.long))

    filled = [0] * (max(rows) + 1)
    for number, row_number in enumerate(rows):
        filled[row_number] = first[number] + lengths[number]
    shape = (len(filled), -(-max(filled) // layout.multiple) * layout.multiple)
    tokens, depth = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    end = np.tile(np.arange(1, shape[1] + 1), (shape[0], 1))
    for tree, row_number, begin in zip(trees, rows, first, strict=True):
        nodes = slice(begin, begin + len(tree.tokens))
        tokens[row_number, nodes], depth[row_number, nodes] = tree.tokens, tree.depth
        end[row_number, nodes] = tree.end + begin
    return Forest(
        tokens=torch.from_numpy(tokens),
        depth=torch.from_numpy(depth),
        end=torch.from_numpy(end),
        is_node=torch.arange(shape[1]) < torch.tensor(filled)[:, None],
        edge_row=torch.tensor(edge_row, dtype=torch.long),
        edge_parent=torch.tensor(edge_parent, dtype=torch.long),
        edge_token=torch.tensor(edge_token, dtype=torch.long),
        edge_of=pad_sequence(edge_of, batch_first=True, padding_value=-1),
        sequence_tree=torch.from_numpy(sequence_tree),
        sequence_row=torch.tensor(rows)[torch.from_numpy(sequence_tree)],
        paths=[torch.from_numpy(path) for path in paths],
    )


def per_sequence(values: torch.Tensor, edge_of: torch.Tensor) -> torch.Tensor:
    """Values of the scored edges, laid out by sequence.

    Args:
        values: (E,) one value per edge.
        edge_of: (S, C) edge of each completion token, -1 for padding.

    Returns:
        (S, C) values, zero for padding; differentiable in `values`.
    """
    return values[edge_of.clamp(min=0)].masked_fill(edge_of < 0, 0)
