"""The forest against an independent trie, over random sequences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pivot_plugin.errors import DataError
from pivot_plugin.training.attention import AttentionPattern, TreeAttention, tree_attention
from pivot_plugin.training.forest import Forest, build_forest, build_tree, common_prefix, per_sequence


def causal(forest: Forest) -> TreeAttention:
    """Plain causality on the trees, as training has it."""
    return tree_attention(AttentionPattern(), forest, torch.zeros_like(forest.is_node))


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8)


@given(sequences)
def test_paths_give_back_the_sequences(given_sequences: list[list[int]]) -> None:
    tree = build_tree(given_sequences)
    assert [tree.tokens[path].tolist() for path in tree.paths] == given_sequences


@given(sequences)
def test_every_distinct_prefix_is_one_node(given_sequences: list[list[int]]) -> None:
    tree = build_tree(given_sequences)
    prefixes = {tuple(s[: n + 1]) for s in given_sequences for n in range(len(s))}
    assert len(tree.tokens) == len(prefixes)
    node_of: dict[tuple[int, ...], int] = {}
    for sequence, path in zip(given_sequences, tree.paths, strict=True):
        for n, node in enumerate(path.tolist()):
            assert node_of.setdefault(tuple(sequence[: n + 1]), node) == node
    assert sorted(node_of.values()) == list(range(len(tree.tokens)))


@given(sequences)
def test_depth_is_the_position_in_the_sequence(given_sequences: list[list[int]]) -> None:
    tree = build_tree(given_sequences)
    for path in tree.paths:
        assert tree.depth[path].tolist() == list(range(len(path)))


@given(sequences)
def test_the_mask_is_the_ancestor_relation(given_sequences: list[list[int]]) -> None:
    forest = build_forest([range(len(given_sequences))], given_sequences, [1] * len(given_sequences))
    expected = np.zeros((forest.tokens.shape[1],) * 2, dtype=bool)
    for path in forest.paths:
        for position, node in enumerate(path.tolist()):
            expected[node, path[: position + 1].numpy()] = True
    assert (causal(forest).mask()[0, 0].numpy() == expected).all()


@given(st.lists(sequences, min_size=1, max_size=3))
@settings(max_examples=50)
def test_padding_sees_only_itself_and_is_seen_by_nobody(trees: list[list[list[int]]]) -> None:
    flat = [sequence for tree in trees for sequence in tree]
    groups, start = [], 0
    for tree in trees:
        groups.append(range(start, start + len(tree)))
        start += len(tree)
    forest = build_forest(groups, flat, [1] * len(flat))
    mask = causal(forest).mask()[:, 0]
    for number in range(len(trees)):
        padding = ~forest.is_node[number]
        assert (mask[number][padding].sum(dim=1) == 1).all()
        assert not mask[number][~padding][:, padding].any()


@given(sequences, st.data())
def test_edges_lead_from_each_prediction_to_its_token(given_sequences: list[list[int]], data: st.DataObject) -> None:
    starts = [data.draw(st.integers(1, len(sequence))) for sequence in given_sequences]
    forest = build_forest([range(len(given_sequences))], given_sequences, starts)
    pairs = set(zip(forest.edge_parent.tolist(), forest.edge_token.tolist(), strict=True))
    assert len(pairs) == len(forest.edge_token), "an edge is scored twice"
    for index, (sequence, start) in enumerate(zip(given_sequences, starts, strict=True)):
        edges = forest.edge_of[index][forest.edge_of[index] >= 0]
        assert forest.edge_token[edges].tolist() == sequence[start:]
        assert forest.edge_parent[edges].tolist() == forest.paths[index][start - 1 : -1].tolist()


def test_values_of_shared_edges_collect_the_gradient_of_all_their_sequences() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    laid_out = per_sequence(values, torch.tensor([[0, 1], [0, 2], [2, -1]]))
    assert laid_out.tolist() == [[1, 2], [1, 3], [3, 0]]
    laid_out.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [2, 1, 2]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="empty prompt"):
        build_forest([[0]], [[1, 2]], [0])


@pytest.mark.parametrize(("first", "second", "expected"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [2, 2], 0)])
def test_common_prefix_of_two_sequences(first: list[int], second: list[int], expected: int) -> None:
    assert common_prefix(np.array(first), np.array(second)) == expected
