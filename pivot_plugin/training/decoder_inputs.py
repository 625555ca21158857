"""What the layers of a decoder are given in one pass: hidden states, positions and masks, recorded as they come.

Two passes that give the layers the same inputs compute the same, up to rounding, whatever the precision; so a forest
is compared with a plain pass here first, and by its log-probabilities only then.

Notation: B rows, L tokens of a row, D width of the hidden states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .tree_sdpa import TreeMaskTensor


@dataclass
class DecoderInputs:
    """What the layers of a decoder were given.

    Attributes:
        kinds: of each layer, as the configuration calls it.
        length: L.
        embeddings: (B, L, D) hidden states that the first layer was given.
        per_token: by name, other tensors that count tokens, as the first layer of a kind was given them: whole numbers
            (..., B, L), others (..., B, L, D). Positions, rotary embeddings and the like.
        masks: by kind, (B, L, L) whether the token of the row sees that of the column.
    """

    kinds: list[str]
    length: int
    embeddings: torch.Tensor | None = None
    per_token: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    def of_row(self, name: str, row: int) -> torch.Tensor:
        """(L, ...) what stands for each token of a row.

        Args:
            name: in `per_token`.
            row: of the pass; a tensor that is alike for all rows has one.
        """
        tensor = self.per_token[name]
        token, batch = (-2, -3) if tensor.is_floating_point() else (-1, -2)
        if tensor.ndim >= -batch:
            tensor = tensor.select(batch, row if tensor.shape[batch] > 1 else 0)
        return tensor.movedim(token, 0)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model's decoder: its longest list of modules."""
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """What the configuration calls each layer of a model's decoder."""
    layers = decoder_layers(model)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"] * len(layers)
    return list(kinds)


@contextmanager
def recorded(model: PreTrainedModel, length: int) -> Iterator[DecoderInputs]:
    """Record what the decoder's layers are given meanwhile, in one forward pass.

    Args:
        model: the MLLM, without a peft model around it.
        length: tokens of a row.
    """
    inputs = DecoderInputs(layer_kinds(model), length)
    handles = []
    for index, layer in enumerate(decoder_layers(model)):
        kind = inputs.kinds[index] if index < len(inputs.kinds) else inputs.kinds[-1]
        handles.append(layer.register_forward_pre_hook(_recorder(inputs, kind, index == 0), with_kwargs=True))
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _recorder(inputs: DecoderInputs, kind: str, first: bool) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature(layer.forward).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        # every decoder layer is given hidden states, by name or first
        hidden: torch.Tensor = given["hidden_states"] if "hidden_states" in given else args[0]
        if hidden.ndim == 4:
            # a few decoders carry several streams of hidden states along, in front of the rows or behind the tokens
            hidden = hidden[0] if hidden.shape[2] == inputs.length else hidden[:, :, 0]
        rows, length = hidden.shape[:2]
        if first:
            inputs.embeddings = hidden.detach()
        if kind in inputs.masks:
            return
        inputs.masks[kind] = seen(given.get("attention_mask"), rows, length, hidden.device)
        for name, tensor in _tensors(given):
            if name.partition(".")[0] in ("hidden_states", "attention_mask"):
                continue
            if _counts_tokens(tensor, length):
                inputs.per_token[f"{name} of {kind}"] = tensor.detach()

    return hook


def _tensors(given: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, list | tuple):
            yield from _tensors({str(index): item for index, item in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, dict):
            yield from _tensors({str(key): item for key, item in value.items()}, f"{prefix}{name}.")


def _counts_tokens(tensor: torch.Tensor, length: int) -> bool:
    axis = 2 if tensor.is_floating_point() else 1
    return tensor.ndim >= axis and tensor.shape[-axis] == length


def seen(mask: Any, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """A layer's mask, in whatever form its attention takes it, as who sees whom.

    Args:
        mask: None for plain causality; (B, 1 or heads, L, L) booleans, or numbers to be added to the scores; (B, L) for
            padding; a FlexAttention block mask; or a mask of trees.
        rows: B.
        length: L.
        device: of the answer.

    Returns:
        (B, L, L) booleans.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril().expand(rows, length, length)
    if mask is None:
        return causal
    if isinstance(mask, TreeMaskTensor):
        return mask.tree_mask.dense()
    if not isinstance(mask, torch.Tensor):
        from torch.nn.attention.flex_attention import create_mask

        return create_mask(mask.mask_mod, rows, 1, length, length, device=device)[:, 0]
    if mask.ndim == 2:
        return causal & mask[:, None, :].bool()
    allowed = mask if mask.dtype == torch.bool else mask >= 0
    return allowed[:, 0, :, :length].expand(rows, length, length)
