"""Who sees whom in the layers of a decoder, and how that is said of token trees.

A sequence knows two relations beside plain causality: a window (a token sees itself and `window - 1` before it), and
a block in which all tokens see each other: each image, all images together, or the prompt. Layers of one model may
differ. Which relations a model has is read off the masks that its own forward pass makes (`observed`), never off its
name; a tree's masks are made of the same relations, with the depth of a node as its position (`tree_attention`).

Notation: L tokens of a sequence; B trees, N nodes of the largest tree.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .forest import Forest

FULL, SLIDING = "full_attention", "sliding_attention"
# as tree_sdpa.py registers it with transformers
TREE_SDPA, FLEX = "pivot_tree_sdpa", "flex_attention"
# nodes that FlexAttention looks at together
FLEX_BLOCK = 128
TAKE_MASKS = ("sdpa", "eager", FLEX, TREE_SDPA)


Block = Literal["image", "images", "prompt"]


@dataclass(frozen=True)
class AttentionPattern:
    """Who sees whom in one kind of layer.

    Attributes:
        window: tokens that a token sees at most, itself included; None for all before it.
        block: whose tokens see each other in both directions: those of an "image" (a run of image tokens), of all
            "images" together, or of the "prompt"; None for none.
        block_in_window: whether the window bounds what is seen in a block too.
    """

    window: int | None = None
    block: Block | None = None
    block_in_window: bool = True


def patterns_of(config: PreTrainedConfig) -> dict[str, AttentionPattern]:
    """The patterns of a decoder by kind of layer, as far as its configuration tells them.

    Args:
        config: of the language model.

    Raises:
        NotATree: for a kind of layer in which no tree can be computed, such as linear attention.
    """
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        slides = window is not None and getattr(config, "use_sliding_window", True)
        return {FULL: AttentionPattern(window if slides else None)}
    patterns = {}
    for kind in dict.fromkeys(kinds):
        if kind == FULL:
            patterns[kind] = AttentionPattern()
        elif kind == SLIDING and window is not None:
            patterns[kind] = AttentionPattern(window)
        else:
            raise NotATree(f"its layers use {kind}")
    return patterns


def take_masks(model: PreTrainedModel) -> str | None:
    """Have a model's decoder take masks of one's own: attention that takes none, such as flash attention, becomes SDPA.

    The tower keeps what it has. Whoever trains a model that belongs to somebody else puts it back afterwards
    (`snapshot`).

    Args:
        model: the MLLM, without a peft model around it.

    Returns:
        what the decoder had where it was switched, else None.
    """
    earlier = None
    for config in _decoder_configs(model):
        if config._attn_implementation in TAKE_MASKS:
            continue
        earlier = config._attn_implementation
        config._attn_implementation_internal = "sdpa" if model.get_decoder()._supports_sdpa else "eager"
    return earlier


def attend_by(model: PreTrainedModel, implementation: str) -> str:
    """Have a model's decoder compute attention in another way.

    Args:
        model: the MLLM, without a peft model around it.
        implementation: one of `TAKE_MASKS`.

    Returns:
        what it had.
    """
    configs = _decoder_configs(model)
    earlier: str = configs[0]._attn_implementation
    for config in configs:
        # not by set_attn_implementation, which would look for the package of flash attention on the way back
        config._attn_implementation_internal = implementation
    return earlier


@contextmanager
def attending_by(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """As `attend_by`, meanwhile."""
    earlier = attend_by(model, implementation)
    try:
        yield
    finally:
        attend_by(model, earlier)


def _decoder_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    inner = [module.config for module in model.get_decoder().modules() if isinstance(module, PreTrainedModel)]
    return [model.config.get_text_config(), *inner]


def packing_attention(model: PreTrainedModel) -> tuple[str, ...]:
    """In which ways a model's decoder may compute several trees of one row without a mask of the whole row, best first.

    Args:
        model: on the device that it trains on, after `take_masks`.

    Returns:
        attention implementations; none for a model that somebody has told to compute otherwise.
    """
    config = model.config.get_text_config()
    chosen = config._attn_implementation
    if chosen in (FLEX, TREE_SDPA):
        return (chosen,)
    if chosen != "sdpa":
        return ()
    # FlexAttention has no backward pass on the host, and no dropout anywhere
    flexes = model.device.type == "cuda" and getattr(model.get_decoder(), "_supports_flex_attn", False)
    drops = bool(getattr(config, "attention_dropout", 0.0))
    return (FLEX, TREE_SDPA) if flexes and not drops else (TREE_SDPA,)


class NotATree(Exception):
    """A model whose attention cannot follow a tree; its text says why, as a clause."""


def sequence_mask(pattern: AttentionPattern, is_image: torch.Tensor, prompt: int) -> torch.Tensor:
    """What a pattern says of one sequence.

    Args:
        pattern: of a layer.
        is_image: (L,) whether a token is part of an image.
        prompt: tokens of the prompt.

    Returns:
        (L, L) booleans: whether the token of the row sees that of the column.
    """
    position = torch.arange(len(is_image), device=is_image.device)
    block = None if pattern.block is None else blocks(pattern.block, is_image, prompt)
    return _sees(
        position[None] <= position[:, None],
        position[:, None] - position[None],
        None if block is None else (block[:, None] == block[None]) & (block[:, None] >= 0),
        pattern,
    )


def blocks(kind: Block, is_image: torch.Tensor, prompt: int) -> torch.Tensor:
    """The block that each token of a sequence belongs to.

    Args:
        kind: of block.
        is_image: (L,) whether a token is part of an image.
        prompt: tokens of the prompt.

    Returns:
        (L,) numbers, -1 for tokens in none.
    """
    if kind == "prompt":
        return torch.where(torch.arange(len(is_image), device=is_image.device) < prompt, 0, -1)
    if kind == "images":
        return torch.where(is_image, 0, -1)
    begins = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:-1]
    return torch.where(is_image, begins.long().cumsum(0) - 1, -1)


def _sees(
    before: torch.Tensor, distance: torch.Tensor | None, same_block: torch.Tensor | None, pattern: AttentionPattern
) -> torch.Tensor:
    """Whether a token sees another, given whether that stands before it, how far, and whether they share a block.

    How far matters in a window alone.
    """
    near = None if pattern.window is None or distance is None else distance < pattern.window
    if near is not None and not pattern.block_in_window:
        before = before & near
    allowed = before if same_block is None else before | same_block
    if near is not None and pattern.block_in_window:
        allowed = allowed & near
    return allowed


def observed(
    pattern: AttentionPattern, masks: Sequence[torch.Tensor], is_image: Sequence[torch.Tensor], prompts: Sequence[int]
) -> AttentionPattern:
    """The pattern that explains the masks which a model made for some sequences.

    Args:
        pattern: as the configuration tells it.
        masks: (L, L) booleans of each sequence, as a layer got them.
        is_image: (L,) of each sequence, whether a token is part of an image.
        prompts: tokens of each prompt.

    Raises:
        NotATree: if no pattern explains them.
    """
    candidates = [pattern] + [
        replace(pattern, block=block, block_in_window=block_in_window)
        for block in get_args(Block)
        for block_in_window in (True, False)
    ]
    for candidate in candidates:
        if all(
            torch.equal(mask, sequence_mask(candidate, images, prompt))
            for mask, images, prompt in zip(masks, is_image, prompts, strict=True)
        ):
            return candidate
    raise NotATree("its attention is neither causal, nor sliding, nor both with two-way attention inside a block")


@dataclass(frozen=True)
class TreeAttention:
    """Who sees whom in token trees under one pattern: a node sees of its own sequence what a token would.

    Attributes:
        end: (B, N) index after the last descendant of each node.
        depth: (B, N) position of each node in its sequence.
        block: (B, N) number of the block a node belongs to, in which all see each other, -1 for none; None where there
            are no blocks.
        pattern: of the layer.
    """

    end: torch.Tensor
    depth: torch.Tensor
    block: torch.Tensor | None
    pattern: AttentionPattern

    def in_int32(self) -> "TreeAttention":
        """The same in numbers of half the size."""
        block = None if self.block is None else self.block.int()
        return replace(self, end=self.end.int(), depth=self.depth.int(), block=block)

    def to(self, device: torch.device) -> "TreeAttention":
        """The same on another device."""
        block = None if self.block is None else self.block.to(device)
        return replace(self, end=self.end.to(device), depth=self.depth.to(device), block=block)

    def sees(self, tree: torch.Tensor, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether a node sees another, in the form FlexAttention asks it.

        Args:
            tree, query, key: indices that broadcast against each other.
            head: all are alike.
        """
        same_block = None
        if self.block is not None:
            same_block = (self.block[tree, query] == self.block[tree, key]) & (self.block[tree, query] >= 0)
        return _sees(
            (key <= query) & (query < self.end[tree, key]),
            None if self.pattern.window is None else self.depth[tree, query] - self.depth[tree, key],
            same_block,
            self.pattern,
        )

    def mask(self) -> torch.Tensor:
        """(B, 1, N, N) booleans, queries in the third dimension, keys in the last."""
        trees, nodes = self.end.shape
        node = torch.arange(nodes, device=self.end.device)
        tree = torch.arange(trees, device=self.end.device)
        return self.sees(tree[:, None, None], None, node[None, :, None], node[None, None])[:, None]


def tree_attention(pattern: AttentionPattern, forest: Forest, is_image: torch.Tensor) -> TreeAttention:
    """A pattern on the trees of a forest.

    Args:
        pattern: of a layer.
        forest: the trees, whose sequences must have in common what stands in a block: all image tokens, or the prompt.
        is_image: (B, N) whether a node is part of an image.
    """
    block = None
    if pattern.block is not None:
        block = torch.full_like(forest.depth, -1)
        of_trees = zip(forest.sequence_tree.tolist(), forest.placed(), forest.prompt_lengths(), strict=True)
        for tree, (row, path), prompt in of_trees:
            nodes = path.to(block.device)
            of_sequence = blocks(pattern.block, is_image[row, nodes], prompt)
            # no sequence has as many blocks as a row has nodes, so that trees of one row have none in common
            block[row, nodes] = torch.where(of_sequence < 0, -1, of_sequence + tree * forest.depth.shape[1])
    return TreeAttention(forest.end, forest.depth, block, pattern)
