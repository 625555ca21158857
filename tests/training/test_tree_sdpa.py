"""Attention run by run against one mask of the whole row: the same masks, outputs and gradients, and no such tensor."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pivot_plugin.training import tree_sdpa as module
from pivot_plugin.training.attention import AttentionPattern, TreeAttention, tree_attention
from pivot_plugin.training.forest import Forest, RowLayout, build_forest
from pivot_plugin.training.tree_sdpa import TreeMaskTensor, tree_mask, tree_sdpa
from tests.helpers.peaks import LargestTensor

IMAGE = 9
PATTERNS = [
    AttentionPattern(window, block, block_in_window)
    for window in (None, 1, 3)
    for block in (None, "image", "images", "prompt")
    for block_in_window in (True, False)
    if block_in_window or (block and window)
]
tokens = st.lists(st.sampled_from([1, 2, IMAGE]), min_size=1, max_size=6)
answers = st.lists(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=6), min_size=1, max_size=3)


def packed(trees: list[tuple[list[int], list[list[int]]]], multiple: int = 1) -> Forest:
    sequences = [prompt + answer for prompt, of_tree in trees for answer in of_tree]
    starts = [len(prompt) for prompt, of_tree in trees for _ in of_tree]
    groups, count = [], 0
    for _, of_tree in trees:
        groups.append(list(range(count, count + len(of_tree))))
        count += len(of_tree)
    return build_forest(groups, sequences, starts, RowLayout(True, multiple))


@pytest.fixture(params=[(1, 2), (2, 3), (4, 8)], ids=lambda lengths: "-".join(map(str, lengths)))
def short_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL_RUN", request.param[0])
    monkeypatch.setattr(module, "LARGE_RUN", request.param[1])


@pytest.mark.usefixtures("short_runs")
@given(st.lists(st.tuples(tokens, answers), min_size=1, max_size=3), st.sampled_from(PATTERNS), st.sampled_from([1, 4]))
@settings(max_examples=60)
def test_runs_say_what_the_mask_of_the_whole_row_says(
    trees: list[tuple[list[int], list[list[int]]]], pattern: AttentionPattern, multiple: int
) -> None:
    forest = packed(trees, multiple)
    attention = tree_attention(pattern, forest, forest.tokens == IMAGE)
    found = tree_mask(attention).tree_mask
    assert torch.equal(found.dense(), attention.mask()[:, 0])
    # in order, without a gap, and no longer than they may be where they need a mask
    bounds = [(run.start, run.stop) for run in found.runs]
    assert [0, *(stop for _, stop in bounds)] == [*(start for start, _ in bounds), forest.tokens.shape[1]]
    assert all(run.trunk or run.stop - run.start <= module.LARGE_RUN for run in found.runs)


@given(st.lists(st.tuples(tokens, answers), min_size=2, max_size=3), st.sampled_from(PATTERNS))
@settings(max_examples=60)
def test_trees_of_one_row_are_the_trees_of_a_row_each(
    trees: list[tuple[list[int], list[list[int]]]], pattern: AttentionPattern
) -> None:
    row = packed(trees)
    apart = build_forest(
        [[i for i, tree in enumerate(row.sequence_tree.tolist()) if tree == n] for n in range(len(trees))],
        [prompt + answer for prompt, of_tree in trees for answer in of_tree],
        [len(prompt) for prompt, of_tree in trees for _ in of_tree],
    )
    in_row = tree_attention(pattern, row, row.tokens == IMAGE).mask()[0, 0]
    of_trees = tree_attention(pattern, apart, apart.tokens == IMAGE).mask()[:, 0]
    assert row.tokens.shape[1] == apart.node_count == row.node_count
    for index, (number, path) in enumerate(apart.placed()):
        nodes = row.paths[index]
        assert row.tokens[0, nodes].tolist() == apart.tokens[number, path].tolist()
        assert torch.equal(in_row[nodes][:, nodes], of_trees[number][path][:, path])
        others = torch.ones(len(in_row), dtype=torch.bool)
        others[torch.cat([row.paths[i] for i, tree in enumerate(row.sequence_tree.tolist()) if tree == number])] = False
        assert not in_row[nodes][:, others].any(), "a node sees one of another tree"
    edges = zip(row.edge_parent.tolist(), row.edge_token.tolist(), strict=True)
    assert [token for _, token in edges] == apart.edge_token.tolist()


def random_heads(nodes: int, heads: int, width: int = 8) -> torch.Tensor:
    return torch.randn(1, heads, nodes, width, requires_grad=True)


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[1], PATTERNS[8]], ids=str)
def test_outputs_and_gradients_are_those_of_one_masked_call(pattern: AttentionPattern, key_heads: int) -> None:
    torch.manual_seed(0)
    prompt = [1, *[IMAGE] * 6, 2, 3]
    forest = packed([(prompt, [[4, 5, 6], [4, 7]]), ([2], [[1, 1, 1, 1], [3]]), (prompt, [[8, 4, 4, 4, 4, 4], [5]])])
    attention = tree_attention(pattern, forest, forest.tokens == IMAGE)
    nodes = forest.tokens.shape[1]
    layer = SimpleNamespace(num_key_value_groups=4 // key_heads, is_causal=True, training=True)
    states = [random_heads(nodes, heads) for heads in (4, key_heads, key_heads)]
    results = []
    for mask, attend in ((attention.mask(), sdpa_attention_forward), (tree_mask(attention), tree_sdpa)):
        output = attend(layer, *states, mask, scaling=0.3)[0]  # type: ignore[operator]
        gradients = torch.autograd.grad(output.sin().sum(), states)
        results.append((output, *gradients))
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_any_other_mask_is_sdpa_s() -> None:
    torch.manual_seed(0)
    layer = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    states = [random_heads(5, 2) for _ in range(3)]
    for mask in (None, torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()):
        assert torch.equal(tree_sdpa(layer, *states, mask)[0], sdpa_attention_forward(layer, *states, mask)[0])  # type: ignore[arg-type]


def test_a_model_that_looks_into_a_mask_is_refused() -> None:
    mask = tree_mask(tree_attention(AttentionPattern(), packed([([1, 2], [[3], [4]])]), torch.zeros(1, 4).bool()))
    assert isinstance(mask, TreeMaskTensor)
    assert (mask.shape, mask.dtype, mask.ndim, mask.device.type) == ((1, 1, 4, 4), torch.bool, 4, "cpu")
    assert mask.to("cpu") is mask
    for look in (
        lambda: mask[:, :, :, :2],
        lambda: torch.add(mask, 1),
        lambda: mask.masked_fill(mask, 0),
        lambda: mask.float(),
    ):
        with pytest.raises(TypeError, match="handed on to attention as it is"):
            look()


def chain(nodes: int, answers: int, trunk: int) -> Forest:
    """A long prompt with some long answers."""
    each = (nodes - trunk) // answers
    return packed([([1] * trunk, [[2 + n] * each for n in range(answers)])])


@pytest.mark.parametrize(
    ("pattern", "answers", "trunk"),
    [(AttentionPattern(), 2, 2**13), (AttentionPattern(512), 1, 2), (AttentionPattern(512, "images"), 64, 2**12)],
    ids=["two long answers", "one path, in a window", "many answers, a block of images"],
)
def test_no_tensor_of_all_nodes_by_all_nodes_exists(pattern: AttentionPattern, answers: int, trunk: int) -> None:
    nodes = 2**14
    torch.manual_seed(0)
    states = [random_heads(nodes, 1) for _ in range(3)]
    layer = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=True)
    with LargestTensor() as largest:
        forest = chain(nodes, answers, trunk)
        is_image = torch.zeros_like(forest.is_node)
        is_image[:, 100:2000] = pattern.block is not None
        mask = tree_mask(tree_attention(pattern, forest, is_image))
        output, _ = tree_sdpa(layer, *states, mask)  # type: ignore[arg-type]
        output.sum().backward()
    # numbers of 1,024 queries by all nodes, 64 MiB; all by all are 256 MiB as booleans
    assert largest.bytes <= module.LARGE_RUN * nodes * 4, largest.shape


def test_a_forest_on_other_devices_takes_its_masks_along(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = tree_mask(tree_attention(AttentionPattern(), packed([([1, 2], [[3], [4]])]), torch.zeros(1, 4).bool()))
    moved: Any = mask.to(torch.device("meta"))
    assert moved.device.type == moved.tree_mask.attention.end.device.type == "meta"
    assert isinstance(moved.tree_mask.attention, TreeAttention)
