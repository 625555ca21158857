"""One pass of a model over a forest, in the form in which TRL asks its models for log-probabilities.

TRL's losses call `model(..., labels=, fused_lm_head=True)` and use only the per-token fields that come back. Here that
call is answered from the forest: the backbone runs over the trees, the hidden states of the scored edges' parents are
picked out, and TRL's own fused head scores exactly those.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.models.image_features import repeated_features

from .batch import ForestBatch
from .forest import Forest, attention_mask, block_mask, per_sequence

# what a caller may ask of the model beside the forest; the rest of TRL's call the forest stands for
HANDED_ON = ("output_router_logits",)


def takes_trees(model: PreTrainedModel) -> str | None:
    """Whether a model's attention can follow a tree.

    Returns:
        None where it can, else the reason why not, as a clause.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"its layers use {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"its attention looks back only {config.sliding_window} tokens"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
        return f"its attention implementation {config._attn_implementation!r} takes no tree mask"
    return None


def install(model: PreTrainedModel, adapter: VisionAdapter) -> None:
    """Let a model that has TRL's fused head answer calls with `forest=`.

    Args:
        model: after `trl.trainer.utils.add_fused_lm_head`; its `forward` is replaced on the instance.
        adapter: of the model's family, for position ids.
    """
    fused_forward = model.forward

    # `generate` reads the signature to know what the model takes
    @functools.wraps(fused_forward)
    def forward(*args: Any, forest: ForestBatch | None = None, **kwargs: Any) -> Any:
        if forest is None:
            return fused_forward(*args, **kwargs)
        asked = {name: kwargs[name] for name in HANDED_ON if name in kwargs}
        return _forest_forward(model, adapter, fused_forward, forest.to(model.device), asked)

    model.forward = forward


@contextmanager
def answering(model: PreTrainedModel, adapter: VisionAdapter) -> Iterator[None]:
    """Have a model answer calls with `forest=` meanwhile, in eval mode; one that a trainer holds does so already.

    Args:
        model: without a peft model around it; LoRA inside it is used as it is.
        adapter: of its family.
    """
    answers = "forest" in inspect.signature(model.forward, follow_wrapped=False).parameters
    own = model.__dict__.get("forward")
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        if not answers:
            add_fused_lm_head(model)
            install(model, adapter)
        yield
    finally:
        if not answers:
            for name in ("forward", "_original_forward"):
                model.__dict__.pop(name, None)
            if own is not None:
                model.forward = own
        for name, module in model.named_modules():
            module.training = training.get(name, False)


def _forest_forward(
    model: PreTrainedModel, adapter: VisionAdapter, fused_forward: Any, batch: ForestBatch, asked: dict[str, Any]
) -> FusedCausalLMOutput:
    """The fields TRL's losses read, (S, C) each, zero for padding."""
    forest = batch.forest
    inputs = {name: as_model_takes(value, model) for name, value in batch.image_inputs.items()}
    wanted = [image for images in batch.tree_images for image in images]
    with repeated_features(model, batch.image_tokens, wanted), _scored_states_only(model, forest):
        scored = fused_forward(
            input_ids=forest.tokens,
            attention_mask=_mask(model, forest),
            position_ids=position_ids(forest, adapter, batch),
            shift_labels=forest.edge_token[None],
            fused_lm_head=True,
            **inputs,
            **asked,
        )
    per_token = {}
    for field in fields(scored):
        value = getattr(scored, field.name)
        if isinstance(value, torch.Tensor) and value.shape == (1, len(forest.edge_token)):
            per_token[field.name] = per_sequence(value[0], forest.edge_of)
    return FusedCausalLMOutput(loss=scored.loss, aux_loss=scored.aux_loss, **per_token)


def as_model_takes(value: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """A processor's output in the precision of the model."""
    return value.to(model.dtype) if value.is_floating_point() else value


def _mask(model: PreTrainedModel, forest: Forest) -> object:
    kind = model.config.get_text_config()._attn_implementation
    if kind == "flex_attention":
        return block_mask(forest.end)
    mask = attention_mask(forest.end)
    if kind == "eager":
        lowest = torch.finfo(model.dtype).min
        return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask


def position_ids(forest: Forest, adapter: VisionAdapter, batch: ForestBatch) -> torch.Tensor:
    """The position every node has in its own sequence.

    Returns:
        (B, N) depths, or (axes, B, N) where the family's rotary embedding has several axes.
    """
    # families count positions in Python loops: on the host, a device is not waited for once per token
    tokens, found = forest.tokens.cpu(), forest.depth.cpu()
    inputs = {name: value if value.is_floating_point() else value.cpu() for name, value in batch.image_inputs.items()}
    for tree, path in zip(forest.sequence_tree.tolist(), forest.paths, strict=True):
        images = batch.tree_images[tree]
        share = adapter.select_images(inputs, images[0], images[-1] + 1) if images else {}
        positions = adapter.positions(tokens[tree, path], share)
        if positions is None:
            return forest.depth
        if found.ndim < positions.ndim + 1:
            found = found.repeat(len(positions), 1, 1)
        found[..., tree, path] = positions
    return found.to(forest.depth.device)


@contextmanager
def _scored_states_only(model: PreTrainedModel, forest: Forest) -> Iterator[None]:
    """Have the backbone return only the (1, E, D) states that predict a scored token, for the head to run on."""

    def pick(module: torch.nn.Module, args: object, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[forest.edge_tree, forest.edge_parent][None]
        return output

    hook = model.base_model.register_forward_hook(pick)
    try:
        yield
    finally:
        hook.remove()
