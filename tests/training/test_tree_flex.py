"""FlexAttention's blocks of trees against the mask of all nodes, outputs and gradients, and how often it compiles."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention, flex_attention_hop
from transformers.integrations.flex_attention import WrappedFlexAttention

from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.models.find import find_adapter
from pivot_plugin.training import forward, tree_flex
from pivot_plugin.training.attention import TREE_SDPA, AttentionPattern, TreeAttention, attend_by, tree_attention
from pivot_plugin.training.batch import ForestCollator
from pivot_plugin.training.forest import Forest, RowLayout, build_forest
from pivot_plugin.training.forest_check import read_rows, varied_rows
from pivot_plugin.training.tree_flex import block_mask, visited
from tests.helpers.peaks import LargestTensor
from tests.helpers.training import normal

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


def long_forest(seed: int, multiple: int = 1) -> Forest:
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> list[int]:
        return torch.randint(1, 9, (count,), generator=generator).tolist()

    return packed(
        [([1, *[IMAGE] * 90, 2, *some(20)], [some(60), some(45)]), ([*[IMAGE] * 70, 3], [some(90), some(8)])], multiple
    )


@given(
    st.lists(st.tuples(tokens, answers), min_size=1, max_size=3), st.sampled_from(PATTERNS), st.sampled_from([1, 2, 4])
)
@settings(max_examples=150)
def test_a_block_is_skipped_only_if_nobody_sees_and_unmasked_only_if_everybody_does(
    trees: list[tuple[list[int], list[list[int]]]], pattern: AttentionPattern, size: int
) -> None:
    forest = packed(trees)
    attention = tree_attention(pattern, forest, forest.tokens == IMAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_flex, "FLEX_BLOCK", size)
        seen, full = visited(attention)
    mask = attention.mask()[0, 0]
    for query in range(seen.shape[1]):
        for key in range(seen.shape[2]):
            of_block = mask[query * size : (query + 1) * size, key * size : (key + 1) * size]
            assert bool(seen[0, query, key]) >= bool(of_block.any())
            assert bool(full[0, query, key]) <= bool(of_block.all())


def test_of_plain_trees_every_block_that_is_visited_is_seen() -> None:
    attention = tree_attention(AttentionPattern(), long_forest(0), torch.zeros(1, 1).bool())
    seen, full = visited(attention)
    mask = attention.mask()[0, 0]
    for query, key in seen[0].nonzero().tolist():
        of_block = mask[query * 128 : (query + 1) * 128, key * 128 : (key + 1) * 128]
        assert of_block.any()
        # of nodes with themselves a mask is always asked
        assert bool(full[0, query, key]) == (query != key and bool(of_block.all()))
    assert int(seen.sum()) < seen.shape[1] * (seen.shape[1] + 1) // 2, "blocks of other branches are skipped"


def states_of(nodes: int, heads: int = 2, width: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, nodes, width, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("pattern", [PATTERNS[0], AttentionPattern(40, "images", False)], ids=str)
def test_outputs_and_gradients_are_those_of_one_masked_call(pattern: AttentionPattern) -> None:
    forest = long_forest(1, multiple=128)
    attention = tree_attention(pattern, forest, forest.tokens == IMAGE)
    states = states_of(forest.tokens.shape[1])
    plain = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=attention.mask())
    # the operator below FlexAttention, which refuses gradients on the host although it has them
    found = flex_attention_hop(*states, _as_they_are, block_mask(attention).as_tuple(), 16**-0.5, {})[0]
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(output.sin().sum(), states) for output in (plain, found)]
    for expected, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def _as_they_are(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
    return score


def test_ten_sizes_compile_twice() -> None:
    # what is traced, and when anew, does not depend on who makes kernels of it
    compiled: Any = torch.compile(flex_attention, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    for size in range(10):
        forest = packed([([1] * (100 + 90 * size), [[2] * 30, [3] * 20]), ([4] * 50, [[5], [6]])], 128)
        attention = tree_attention(AttentionPattern(), forest, torch.zeros_like(forest.is_node))
        states = [state.detach() for state in states_of(forest.tokens.shape[1])]
        found = compiled(*states, block_mask=block_mask(attention))
        plain = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=attention.mask())
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    # the first size by itself, then any
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


def test_no_tensor_of_all_nodes_by_all_nodes_exists() -> None:
    nodes = 2**14
    with LargestTensor() as largest:
        forest = packed([([1] * 2**13, [[2] * 2**12, [3] * 2**12])], 128)
        block_mask(tree_attention(AttentionPattern(512), forest, torch.zeros_like(forest.is_node)))
    assert forest.tokens.shape[1] == nodes
    assert largest.bytes <= 8 * nodes, largest.shape


def test_trees_in_rows_of_their_own_have_blocks_too() -> None:
    forest = build_forest([[0, 1], [2]], [[1] * 150 + [2], [1] * 150 + [3], [4] * 30], [150, 150, 1])
    attention = tree_attention(AttentionPattern(), forest, torch.zeros_like(forest.is_node))
    assert isinstance(attention, TreeAttention)
    mask = block_mask(attention)
    assert mask.shape == (2, 1, 152, 152)
    assert mask.kv_num_blocks.shape == (2, 1, 2)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' FlexAttention, traced as for a GPU, without kernels made of it."""
    compiled = torch.compile(flex_attention, backend="aot_eager")
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: compiled)
    torch._dynamo.reset()
    counters.clear()
    return counters


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"], indirect=True)
def test_models_read_packed_trees_by_flex_attention(tiny: Any, rows: Any, traced: Any) -> None:
    model, processor = tiny
    adapter = find_adapter(model)
    reading = read_rows(model, adapter, processor, varied_rows(PairDataset(rows)), ("flex_attention",))
    assert reading.layout == RowLayout(True, 128)
    assert model.config.get_text_config()._attn_implementation == "flex_attention"
    batches = [
        ForestCollator(processor, adapter.image_token_id, layout=layout)(normal(rows))["forest"]
        for layout in (reading.layout, RowLayout())
    ]
    traced.clear()
    with torch.no_grad(), forward.answering(model, adapter, reading):
        by_flex = model(forest=batches[0]).log_probs
        for count in (1, 2, 4, 7):
            model(
                forest=ForestCollator(processor, adapter.image_token_id, layout=reading.layout)(normal(rows[:count]))[
                    "forest"
                ]
            )
    # the check has seen one size; the second is compiled for any
    assert traced["stats"]["unique_graphs"] <= 2
    attend_by(model, "sdpa")
    with torch.no_grad(), forward.answering(model, adapter, forward.ForestReading(reading.patterns)):
        by_sdpa = model(forest=batches[1]).log_probs
    torch.testing.assert_close(by_flex, by_sdpa, rtol=1e-5, atol=1e-5)


def test_where_flex_attention_fails_runs_of_queries_stand_in(
    llava: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(WrappedFlexAttention, "__call__", fail)
    model, processor = llava
    with caplog.at_level(logging.INFO):
        reading = read_rows(
            model, find_adapter(model), processor, varied_rows(PairDataset(rows)), ("flex_attention", TREE_SDPA)
        )
    assert reading.layout == RowLayout(True)
    assert model.config.get_text_config()._attn_implementation == TREE_SDPA
    assert "several trees in a row by flex_attention: its forward pass stops in" in caplog.text
    assert "with RuntimeError: no compiler" in caplog.text
