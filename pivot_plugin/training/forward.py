"""One pass of a model over a forest, in the form in which TRL asks its models for log-probabilities.

TRL's losses call `model(..., labels=, fused_lm_head=True)` and use only the per-token fields that come back. Here that
call is answered from the forest: the backbone runs over the trees, the hidden states of the scored edges' parents are
picked out, and TRL's own fused head scores exactly those (scored_head.py).
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.models.evaluating import evaluating
from pivot_plugin.models.image_features import repeated_features

from .attention import FLEX, TAKE_MASKS, TREE_SDPA, AttentionPattern, NotATree, patterns_of, tree_attention
from .batch import ForestBatch, SharedPrefix
from .forest import ROW_PER_TREE, Forest, RowLayout, per_sequence
from .scored_head import ScoredHead
from .sharding import through_tower, whole_head
from .tree_flex import block_mask
from .tree_sdpa import tree_mask

# what a caller may ask of the model beside the forest; the rest of TRL's call the forest stands for
HANDED_ON = ("output_router_logits",)


@dataclass
class ForestOutput(FusedCausalLMOutput):  # type: ignore[misc]
    """What TRL's losses read of the two sequences of each pair, and the log-probabilities of all others.

    Attributes:
        beside_log_probs: (sequences beside the pairs' own, C), zero for padding; None where there are none.
    """

    beside_log_probs: torch.Tensor | None = None


@dataclass(frozen=True)
class TokenTypes:
    """What a processor says of each token beside its id, such as whether it stands for an image.

    Attributes:
        by_token: of a prompt's tokens, by their ids; those that are not named have 0.
        answer: of the tokens of an answer.
    """

    by_token: Mapping[int, int]
    answer: int = 0


@dataclass(frozen=True)
class ForestReading:
    """How a model reads a forest.

    Attributes:
        patterns: who sees whom, by kind of layer; empty where it takes no trees.
        no_trees: why it takes none, as a clause: each sequence then has a row of its own, and the model makes its own
            masks and positions.
        own_head: whether its own head scores the tokens, because TRL's computes something else.
        temperature: that logits are divided by.
        token_types: inputs by name that say something of each token, handed on where a sequence has its own row.
        first_position: of a sequence's first token, where positions count up.
        whole_prompts: whether the processor is given whole prompts, as for `ImageTokens`; found out where None.
        layout: how its trees stand in rows.
    """

    patterns: Mapping[str, AttentionPattern]
    no_trees: str | None = None
    own_head: bool = False
    temperature: float = 1.0
    token_types: Mapping[str, TokenTypes] = field(default_factory=dict)
    first_position: int = 0
    whole_prompts: bool | None = None
    layout: RowLayout = ROW_PER_TREE

    @property
    def shared(self) -> SharedPrefix:
        """What the sequences of a tree must have in common."""
        if self.no_trees is not None:
            return "all"
        blocks = {pattern.block for pattern in self.patterns.values()}
        return "prompt" if "prompt" in blocks else "images"

    def is_image(self, tokens: torch.Tensor, image_token_id: int) -> torch.Tensor:
        """Which tokens the model takes for part of an image: those its processor marks, else those of image features.

        Args:
            tokens: ids of any shape.
            image_token_id: the token that stands for one image feature.
        """
        marked = {token for types in self.token_types.values() for token in types.by_token}
        return torch.isin(tokens, torch.tensor(sorted(marked) or [image_token_id], device=tokens.device))


def reading_of(model: PreTrainedModel) -> ForestReading:
    """How a model reads a forest, as far as its configuration tells; what it does with images is seen when it runs.

    Args:
        model: the MLLM.
    """
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return ForestReading({}, "it is an encoder-decoder model")
    if config._attn_implementation not in TAKE_MASKS:
        return ForestReading({}, f"its attention implementation {config._attn_implementation!r} takes no tree mask")
    try:
        return ForestReading(patterns_of(config))
    except NotATree as reason:
        return ForestReading({}, str(reason))


def install(
    model: PreTrainedModel,
    adapter: VisionAdapter,
    reading: ForestReading | None = None,
    blank: Mapping[str, Any] | None = None,
) -> None:
    """Let a model that has TRL's fused head answer calls with `forest=`.

    Args:
        model: after `trl.trainer.utils.add_fused_lm_head`; its `forward` is replaced on the instance.
        adapter: of the model's family, for position ids.
        reading: how the model reads a forest, as it was shown on rows (`forest_check.read_rows`); as far as its
            configuration tells where None.
        blank: processor outputs of a blank image, which goes through the tower where a batch shows none; None for
            nothing, where no other process waits.
    """
    reading = reading or reading_of(model)
    fused_forward = model.forward

    # `generate` reads the signature to know what the model takes
    @functools.wraps(fused_forward)
    def forward(*args: Any, forest: ForestBatch | None = None, **kwargs: Any) -> Any:
        if forest is None:
            return fused_forward(*args, **kwargs)
        asked = {name: kwargs[name] for name in HANDED_ON if name in kwargs}
        reader = _Reader(model, adapter, reading, fused_forward)
        unseen = {} if forest.image_inputs else on_inputs(blank or {}, model)
        with whole_head(model), through_tower(model, unseen):
            return reader.read(forest.to(model.device), asked)

    model.forward = forward


@contextmanager
def answering(model: PreTrainedModel, adapter: VisionAdapter, reading: ForestReading | None = None) -> Iterator[None]:
    """Have a model answer calls with `forest=` meanwhile, in eval mode; one that a trainer holds does so already.

    Args:
        model: without a peft model around it; LoRA inside it is used as it is.
        adapter: of its family.
        reading: as for `install`.
    """
    answers = "forest" in inspect.signature(model.forward, follow_wrapped=False).parameters
    instance_forward = model.__dict__.get("forward")
    with evaluating(model):
        try:
            if not answers:
                add_fused_lm_head(model)
                install(model, adapter, reading)
            yield
        finally:
            if not answers:
                for name in ("forward", "_original_forward"):
                    model.__dict__.pop(name, None)
                if instance_forward is not None:
                    model.forward = instance_forward


@dataclass(frozen=True)
class _Reader:
    """A model with all it takes to answer from a forest."""

    model: PreTrainedModel
    adapter: VisionAdapter
    reading: ForestReading
    fused_forward: Callable[..., Any]

    def read(self, batch: ForestBatch, asked: Mapping[str, Any]) -> ForestOutput:
        """The fields TRL's losses read, (S, C) each of the pairs' sequences, zero for padding."""
        forest, model = batch.forest, self.model
        inputs = {name: as_model_takes(value, model) for name, value in batch.image_inputs.items()}
        shown = [image for images in batch.tree_images for image in images]
        distinct = None
        if self.reading.no_trees is not None:
            # a model that counts positions by itself looks up the size of every image of every row
            distinct, inputs = inputs, inputs | _per_shown_image(inputs, len(batch.image_tokens), shown)
        with (
            repeated_features(model, batch.image_tokens, shown, distinct),
            _routed(model, bool(asked.get("output_router_logits"))) as routed,
        ):
            scored = self._scored(forest, input_ids=forest.tokens, **self._order(batch), **inputs)
        per_token = {}
        for part in fields(scored):
            value = getattr(scored, part.name)
            if isinstance(value, torch.Tensor) and value.shape == (1, len(forest.edge_token)):
                per_token[part.name] = per_sequence(value[0], forest.edge_of)
        of_pairs = len(forest.edge_of) - batch.beside
        beside = per_token["log_probs"][of_pairs:] if batch.beside else None
        per_token = {name: values[:of_pairs] for name, values in per_token.items()}
        loss, aux_loss = scored.loss, None
        if routed:
            aux_loss = _load_balancing_loss(model, routed[-1], forest)
            loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        return ForestOutput(loss=loss, aux_loss=aux_loss, beside_log_probs=beside, **per_token)

    def _order(self, batch: ForestBatch) -> dict[str, Any]:
        """Masks and positions."""
        if self.reading.no_trees is not None:
            # padding stands behind each sequence, and the model finds masks and positions by itself
            return {"attention_mask": batch.forest.is_node.long(), **self._token_types(batch.forest)}
        return {
            "attention_mask": self._masks(batch.forest),
            **self._token_types(batch.forest),
            "position_ids": position_ids(batch.forest, self.adapter, batch, self.reading.first_position),
        }

    def _token_types(self, forest: Forest) -> dict[str, torch.Tensor]:
        """What the processor says of each token beside its id."""
        inputs = {}
        for name, types in self.reading.token_types.items():
            values = torch.zeros_like(forest.tokens)
            for token, value in types.by_token.items():
                values[forest.tokens == token] = value
            for (row, path), prompt in zip(forest.placed(), forest.prompt_lengths(), strict=True):
                values[row, path[prompt:]] = types.answer
            inputs[name] = values * forest.is_node
        return inputs

    def _masks(self, forest: Forest) -> object:
        """One mask for all layers, or one for each kind where they differ."""
        patterns = self.reading.patterns
        forms = {pattern: self._mask(pattern, forest) for pattern in set(patterns.values())}
        return next(iter(forms.values())) if len(forms) == 1 else {kind: forms[p] for kind, p in patterns.items()}

    def _mask(self, pattern: AttentionPattern, forest: Forest) -> object:
        attention = tree_attention(pattern, forest, self.reading.is_image(forest.tokens, self.adapter.image_token_id))
        kind = self.model.config.get_text_config()._attn_implementation
        if kind == FLEX:
            return block_mask(attention)
        if kind == TREE_SDPA and len(forest.tokens) == 1:
            return tree_mask(attention)
        mask = attention.mask()
        if kind == "eager":
            lowest = torch.finfo(self.model.dtype).min
            return torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device).masked_fill(~mask, lowest)
        return mask

    def _scored(self, forest: Forest, **inputs: Any) -> FusedCausalLMOutput:
        """Log-probabilities of the edges, (1, E)."""
        outputs = self.model.base_model(**inputs, use_cache=False)
        states = outputs.last_hidden_state[forest.edge_row, forest.edge_parent][None]
        head = ScoredHead(self.model, self.fused_forward, inputs, self.reading.own_head, self.reading.temperature)
        return head.scored(outputs, states, forest.edge_token[None])


def _per_shown_image(inputs: Mapping[str, Any], images: int, shown: list[int]) -> dict[str, torch.Tensor]:
    """Whole numbers that say something of each image, for every time one is shown."""
    return {
        name: value[shown]
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and len(value) == images
    }


@contextmanager
def _routed(model: PreTrainedModel, wanted: bool) -> Iterator[list[Any]]:
    """Router logits of a mixture of experts; asked of the backbone, because TRL's head would count a tree mask."""
    router_logits: list[Any] = []
    if not wanted:
        yield router_logits
        return

    def ask(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"output_router_logits": True}

    hooks = [
        model.base_model.register_forward_pre_hook(ask, with_kwargs=True),
        model.base_model.register_forward_hook(lambda _, args, output: router_logits.append(output.router_logits)),
    ]
    try:
        yield router_logits
    finally:
        for hook in hooks:
            hook.remove()


def _load_balancing_loss(model: PreTrainedModel, router_logits: Any, forest: Forest) -> torch.Tensor:
    """The auxiliary loss of all sequences: a node counts as often as there are sequences that it belongs to."""
    config = model.config.get_text_config()
    counts = torch.zeros(forest.tokens.shape, device=forest.tokens.device)
    for row, path in forest.placed():
        counts[row, path.to(counts.device)] += 1
    loss: torch.Tensor = load_balancing_loss_func(
        router_logits, number_of_experts(config), config.num_experts_per_tok, counts
    )
    return loss


def number_of_experts(config: PreTrainedConfig) -> int | None:
    """Among how many experts a layer of a mixture chooses, by whichever name its configuration has for it.

    Args:
        config: of the language model.

    Returns:
        None for what is no mixture.
    """
    numbers = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    return next((number for number in numbers if isinstance(number, int)), None)


@contextmanager
def experts_named(model: PreTrainedModel) -> Iterator[None]:
    """Have a mixture's configuration say `num_experts` meanwhile, the one name by which TRL's loss asks for it."""
    config = model.config.get_text_config()
    number = number_of_experts(config)
    if number is None or hasattr(config, "num_experts"):
        yield
        return
    config.num_experts = number
    try:
        yield
    finally:
        del config.num_experts


def as_model_takes(value: Any, model: PreTrainedModel) -> Any:
    """A processor's output, tensors or lists of them, in the precision of the model."""
    if isinstance(value, list | tuple):
        return type(value)(as_model_takes(item, model) for item in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(model.dtype)
    return value


def on_model(value: Any, model: PreTrainedModel) -> Any:
    """A processor's output, tensors or lists of them, where the model is and in its precision."""
    if isinstance(value, list | tuple):
        return type(value)(on_model(item, model) for item in value)
    return as_model_takes(value.to(model.device), model) if isinstance(value, torch.Tensor) else value


def on_inputs(inputs: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Processor outputs where the model is and in its precision."""
    return {name: on_model(value, model) for name, value in inputs.items()}


def position_ids(forest: Forest, adapter: VisionAdapter, batch: ForestBatch, first: int = 0) -> torch.Tensor:
    """The position every node has in its own sequence.

    Args:
        forest: the trees.
        adapter: of the model's family.
        batch: with the images.
        first: of the first token, where positions count up.

    Returns:
        (B, N) depths, or (axes, B, N) where the family's rotary embedding has several axes.
    """
    # families count positions in Python loops: on the host, a device is not waited for once per token
    tokens, found = forest.tokens.cpu(), forest.depth.cpu()
    inputs = {name: value if value.is_floating_point() else value.cpu() for name, value in batch.image_inputs.items()}
    for (row, path), tree in zip(forest.placed(), forest.sequence_tree.tolist(), strict=True):
        images = batch.tree_images[tree]
        share = adapter.select_images(inputs, images[0], images[-1] + 1) if images else {}
        positions = adapter.positions(tokens[row, path], share)
        if positions is None:
            return forest.depth + first
        if found.ndim < positions.ndim + 1:
            found = found.repeat(len(positions), 1, 1)
        found[..., row, path] = positions
    return found.to(forest.depth.device)
