"""Log-probabilities of scored edges, so many at a time that no tensor of all edges by all words exists.

The backbone runs once. Then the head scores its states a slice at a time, each time as if the backbone had returned
these alone: TRL's fused head, which computes logits anew in its backward pass, or the model's own, whatever that does
to them, which computes them anew by checkpointing.

Notation: E scored edges, D width of the hidden states, V words.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

# what the logits of a slice, and all that is made of them on the way, may take
SLICE_BYTES = 128 * 2**20
# tensors of the size of the logits that exist together: in TRL's fused head with Triton and without, in a plain head
FUSED, UNFUSED, OWN = 1, 6, 6
# words that TRL's fused head looks at together
FUSED_WORDS = 32_768


def slice_of(model: PreTrainedModel, own_head: bool) -> int | None:
    """How many edges the head scores at a time; None for all of them.

    Args:
        model: with an output embedding.
        own_head: whether the model's own head scores them.
    """
    head = model.get_output_embeddings()
    weights = [weight for weight in head._parameters.values() if weight is not None]
    # a divided head is gathered once, by all processes together
    if any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights):
        return None
    # TRL's head makes a gradient of the size of its weights in every call
    if not own_head and any(weight.requires_grad for weight in weights):
        return None
    weight = head.weight
    on_triton = weight.device.type in ("cuda", "xpu")
    copies, words = (OWN, weight.shape[0]) if own_head else (FUSED if on_triton else UNFUSED, FUSED_WORDS)
    bytes_per_edge = copies * min(words, weight.shape[0]) * (4 if own_head else weight.element_size())
    return max(1, SLICE_BYTES // bytes_per_edge)


@dataclass(frozen=True)
class ScoredHead:
    """The head of a model, on states that its backbone has computed.

    Attributes:
        model: the MLLM.
        fused_forward: its forward pass with TRL's fused head.
        inputs: of the forward pass, which the model's own head is handed again.
        own_head: whether the model's own head scores the edges, instead of TRL's.
        temperature: that the model's own logits are divided by.
    """

    model: PreTrainedModel
    fused_forward: Callable[..., Any]
    inputs: Mapping[str, Any]
    own_head: bool = False
    temperature: float = 1.0

    def scored(self, outputs: Any, states: torch.Tensor, tokens: torch.Tensor) -> FusedCausalLMOutput:
        """What TRL's losses read of each edge, (1, E) each.

        Args:
            outputs: of the backbone.
            states: (1, E, D) of the edges' parents.
            tokens: (1, E) that they predict.
        """
        edges = tokens.shape[1]
        size = slice_of(self.model, self.own_head) or max(1, edges)
        # split once, so that the backward pass puts gradients together once, too
        parts = zip(states.split(size, dim=1), tokens.split(size, dim=1), strict=True)
        score = self._by_own_head if self.own_head else self._by_fused_head
        return _joined([score(outputs, of_states, of_tokens) for of_states, of_tokens in parts])

    def _by_fused_head(self, outputs: Any, states: torch.Tensor, tokens: torch.Tensor) -> Mapping[str, Any]:
        with _returning(self.model, outputs, states):
            # it would ask for router logits, and take a tree's mask for one of padding
            unasked = {"output_router_logits": False} if self._routes else {}
            fused = self.fused_forward(shift_labels=tokens, fused_lm_head=True, **unasked)
        return _per_edge(fused, tokens)

    def _by_own_head(self, outputs: Any, states: torch.Tensor, tokens: torch.Tensor) -> Mapping[str, Any]:
        def score(of_slice: torch.Tensor) -> dict[str, torch.Tensor]:
            with _returning(self.model, outputs, of_slice):
                logits = self.fused_forward(**self.inputs, use_cache=False).logits.float() / self.temperature
            every = logits.log_softmax(-1)
            return {
                "log_probs": every.gather(-1, tokens[..., None])[..., 0],
                "entropy": -(every.exp() * every).sum(-1),
                "log_sum_sq_probs": (2 * every).logsumexp(-1),
                "mean_logits": logits.mean(-1),
                "is_top1": logits.argmax(-1) == tokens,
            }

        if not torch.is_grad_enabled():
            return score(states)
        scored: dict[str, torch.Tensor] = checkpoint(score, states, use_reentrant=False)
        return scored

    @property
    def _routes(self) -> bool:
        return bool(getattr(self.model.config.get_text_config(), "output_router_logits", False))


@contextmanager
def _returning(model: PreTrainedModel, outputs: Any, states: torch.Tensor) -> Iterator[None]:
    """Have the backbone return some of its states meanwhile, without computing anything."""
    backbone = model.base_model
    own = backbone.__dict__.get("forward")

    def forward(*args: object, **kwargs: object) -> Any:
        return type(outputs)(**{**outputs, "last_hidden_state": states})

    backbone.forward = forward
    try:
        yield
    finally:
        if own is None:
            del backbone.forward
        else:
            backbone.forward = own


def _per_edge(output: FusedCausalLMOutput, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    values = {part.name: getattr(output, part.name) for part in fields(output) if part.name != "label_mask"}
    return {
        name: value for name, value in values.items() if isinstance(value, torch.Tensor) and value.shape == tokens.shape
    }


def _joined(slices: list[Mapping[str, torch.Tensor]]) -> FusedCausalLMOutput:
    if len(slices) == 1:
        per_edge = dict(slices[0])
    else:
        per_edge = {name: torch.cat([one[name] for one in slices], dim=1) for name in slices[0]}
    log_probs = per_edge["log_probs"]
    return FusedCausalLMOutput(loss=-log_probs.sum() / max(1, log_probs.numel()), **per_edge)
