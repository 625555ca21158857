"""Who sees whom: patterns by plain enumeration, trees by their sequences, and what a model's own masks say."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM, PretrainedConfig

from pivot_plugin.training.attention import (
    AttentionPattern,
    NotATree,
    blocks,
    observed,
    patterns_of,
    sequence_mask,
    take_masks,
    tree_attention,
)
from pivot_plugin.training.decoder_inputs import recorded, seen
from pivot_plugin.training.forest import build_forest
from pivot_plugin.training.tree_flex import block_mask

IMAGE = 9
PATTERNS = [
    AttentionPattern(window, block, block_in_window)
    for window in (None, 1, 2, 4)
    for block in (None, "image", "images", "prompt")
    for block_in_window in (True, False)
    # without a block, or without a window, there is nothing to bound
    if block_in_window or (block and window)
]


def enumerated(pattern: AttentionPattern, tokens: list[int], prompt: int) -> list[list[bool]]:
    """The definition, token by token."""

    def same_image(query: int, key: int) -> bool:
        low, high = sorted((query, key))
        return all(token == IMAGE for token in tokens[low : high + 1])

    def in_block(query: int, key: int) -> bool:
        if pattern.block == "image":
            return same_image(query, key)
        if pattern.block == "images":
            return tokens[query] == tokens[key] == IMAGE
        return pattern.block == "prompt" and query < prompt and key < prompt

    def sees(query: int, key: int) -> bool:
        near = pattern.window is None or query - key < pattern.window
        if pattern.block_in_window:
            return near and (key <= query or in_block(query, key))
        return (near and key <= query) or in_block(query, key)

    return [[sees(query, key) for key in range(len(tokens))] for query in range(len(tokens))]


@given(st.lists(st.sampled_from([1, 2, IMAGE]), min_size=1, max_size=8), st.integers(0, 8), st.sampled_from(PATTERNS))
def test_a_sequence_s_mask_is_the_definition(tokens: list[int], prompt: int, pattern: AttentionPattern) -> None:
    mask = sequence_mask(pattern, torch.tensor(tokens) == IMAGE, prompt)
    assert mask.tolist() == enumerated(pattern, tokens, prompt)


def test_blocks_are_runs_of_image_tokens_all_of_them_or_the_prompt() -> None:
    is_image = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1]).bool()
    assert blocks("image", is_image, 5).tolist() == [0, 0, -1, 1, -1, -1, 2, 2]
    assert blocks("images", is_image, 5).tolist() == [0, 0, -1, 0, -1, -1, 0, 0]
    assert blocks("prompt", is_image, 5).tolist() == [0, 0, 0, 0, 0, -1, -1, -1]


@given(
    st.lists(st.sampled_from([1, 2, IMAGE]), min_size=1, max_size=5),
    st.lists(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from(PATTERNS),
)
def test_a_node_sees_of_its_sequence_what_a_token_sees_and_nothing_else(
    prompt: list[int], answers: list[list[int]], pattern: AttentionPattern
) -> None:
    sequences = [prompt + answer for answer in answers]
    forest = build_forest([list(range(len(sequences)))], sequences, [len(prompt)] * len(sequences))
    mask = tree_attention(pattern, forest, forest.tokens == IMAGE).mask()[0, 0]
    for sequence, path in zip(sequences, forest.paths, strict=True):
        assert mask[path][:, path].tolist() == enumerated(pattern, sequence, len(prompt))
        outside = [node for node in range(mask.shape[1]) if node not in path]
        assert not mask[path][:, outside].any()


@pytest.mark.parametrize("pattern", PATTERNS[:6], ids=str)
def test_a_flex_attention_mask_says_the_same(pattern: AttentionPattern) -> None:
    sequences = [[1, IMAGE, IMAGE, 2, 5, 6], [1, IMAGE, IMAGE, 2, 5, 7, 8], [1, IMAGE, IMAGE, 2, 4]]
    forest = build_forest([[0, 1, 2]], sequences, [4, 4, 4])
    attention = tree_attention(pattern, forest, forest.tokens == IMAGE)
    sparse = block_mask(attention)
    shown = seen(sparse, 1, forest.tokens.shape[1], torch.device("cpu"))
    assert torch.equal(shown, attention.mask()[:, 0])


def test_a_pattern_is_found_by_the_masks_it_makes() -> None:
    tokens = torch.tensor([1, IMAGE, IMAGE, 2, IMAGE, 3, 4, 5])
    for pattern in PATTERNS:
        mask = sequence_mask(pattern, tokens == IMAGE, 6)
        start = AttentionPattern(pattern.window)
        found = observed(start, [mask], [tokens == IMAGE], [6])
        # small windows hide what else there is
        assert found == pattern or torch.equal(sequence_mask(found, tokens == IMAGE, 6), mask)


def test_masks_that_no_pattern_explains_are_no_tree() -> None:
    tokens = torch.tensor([1, IMAGE, IMAGE, 2, 3])
    chunked = torch.ones(5, 5).tril().bool()
    chunked[3:, :3] = False
    with pytest.raises(NotATree, match="neither causal, nor sliding"):
        observed(AttentionPattern(), [chunked], [tokens == IMAGE], [3])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"full_attention": AttentionPattern()}),
        ({"sliding_window": 4}, {"full_attention": AttentionPattern(4)}),
        ({"sliding_window": 4, "use_sliding_window": False}, {"full_attention": AttentionPattern()}),
        (
            {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
            {"sliding_attention": AttentionPattern(4), "full_attention": AttentionPattern()},
        ),
    ],
)
def test_a_configuration_tells_windows(settings: dict[str, object], expected: dict[str, AttentionPattern]) -> None:
    assert patterns_of(PretrainedConfig(**settings)) == expected


@pytest.mark.parametrize("kind", ["linear_attention", "conv", "chunked_attention"])
def test_layers_that_are_no_attention_are_no_tree(kind: str) -> None:
    with pytest.raises(NotATree, match=kind):
        patterns_of(PretrainedConfig(layer_types=["full_attention", kind]))


LAYERS = ["sliding_attention", "full_attention"]
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_what_layers_are_given_is_recorded_in_every_form_of_mask(family: str, attention: str) -> None:
    if family == "mistral":
        model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=3, attn_implementation=attention))
    else:
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**SMALL, sliding_window=3, layer_types=LAYERS, attn_implementation=attention)
        )
    ids = torch.arange(1, 8)[None]
    with torch.no_grad(), recorded(model, 7) as inputs:
        model(ids)
    assert inputs.embeddings is not None
    assert inputs.embeddings.shape == (1, 7, 16)
    nothing = torch.zeros(7).bool()
    for kind, pattern in patterns_of(model.config).items():
        assert torch.equal(inputs.masks[kind][0], sequence_mask(pattern, nothing, 7)), kind
    windows = {pattern.window for pattern in patterns_of(model.config).values()}
    assert windows == ({3} if family == "mistral" else {3, None})
    rotary = [name for name in inputs.per_token if name.startswith("position_embeddings")]
    assert rotary
    for name in rotary:
        assert inputs.of_row(name, 0).shape[0] == 7


def test_attention_that_takes_no_masks_is_switched_in_the_decoder_alone(llava: object) -> None:
    model = llava[0]  # type: ignore[index]
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation_internal = "flash_attention_2"
    assert take_masks(model) == "flash_attention_2"
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "flash_attention_2"
    assert take_masks(model) is None


def test_patterns_without_a_window_differ_from_each_other() -> None:
    tokens = torch.tensor([1, IMAGE, IMAGE, 2, IMAGE, 3, 4, 5])
    masks = [sequence_mask(pattern, tokens == IMAGE, 6) for pattern in PATTERNS if pattern.window is None]
    assert all(not torch.equal(one, other) for one, other in combinations(masks, 2))
