"""Each distinct prompt is prefilled once, and its completions branch from what that leaves.

transformers' `generate` repeats prompts for `num_return_sequences` and then prefills every copy. While `SharedPrefill`
is in force, two of its methods are wrapped on the model:

    _expand_inputs_for_generation   the prompts are kept as they are before they are repeated
    _prefill                        prefills these; their logits are those before the first token of each completion

From there the completions go on in one of two layouts:

    TREE     the cache stays as it is. A step gives the model a row per prompt with a token of each of its completions,
             and a mask in which a completion sees the prompt and itself: the prompt is in memory once, and read once
    COPIES   each row of the cache is repeated, as a plain `generate` has it: for sliding windows, linear attention,
             static caches, and attention that takes no mask of one's own

All else is transformers' own: positions, logits processors, draws, when to stop. A row's logits do not depend on the
rows beside it, and the draws come from the same generator in the same order, so that the completions are those of a
plain `generate`. In half precision a tree sums in another order, as other batch sizes do: logits then differ by
rounding, and a draw between two tokens can fall the other way.

A model can keep something of its prompts outside of its cache. So each model is tried once, on the first prompts that
it is given: a few tokens in each layout, against plain ones. The first layout that gives the same is taken; a model
that has none answers by plain `generate`, and a line of the log says so.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import utils as generation_utils

from pivot_plugin.models.evaluating import undisturbed
from pivot_plugin.models.image_features import repeated_features

logger = logging.getLogger(__name__)

# tokens of the trial: the first is of the prefill, the second reads what it left, the others what that became
TRIED_TOKENS = 4
# how far logits may be apart, as a share of their spread: in float32, and in half precision, where sums round
EXACT, ROUNDED = 1e-4, 0.1
# what `generate` hands on to the prefill alone
OF_PREFILL = frozenset(generation_utils.MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)


class Layout(Enum):
    """How completions go on from their prompt, best first; PLAIN where each has a prefill of its own."""

    TREE = "tree"
    COPIES = "copies"
    PLAIN = "plain"


class _CannotBranch(Exception):
    """Completions cannot go on in a layout; its text says why, as a clause."""


@dataclass(frozen=True)
class PromptImages:
    """The images that some prompts show, each set of them once.

    Attributes:
        token_counts: image tokens of each set.
        shown: for each prompt that shows images the number of its set.
        inputs: processor outputs about the sets, one after the other.
    """

    token_counts: Sequence[int] = ()
    shown: Sequence[int] = ()
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def encoded_once(self, model: PreTrainedModel, repeats: int = 1) -> AbstractContextManager[None]:
        """Have the model encode each set once and hand its features on to every prompt that shows it.

        Args:
            model: whose `get_image_features` is wrapped meanwhile.
            repeats: rows of each prompt that the model is given.
        """
        # some families mix pictures into their layers otherwise
        if not hasattr(model.base_model, "get_image_features"):
            return nullcontext()
        shown = [number for number in self.shown for _ in range(repeats)]
        # the model is given each set once anyway
        as_given = shown == list(range(len(self.token_counts)))
        return repeated_features(model, self.token_counts, shown, None if as_given else self.inputs)


class SharedPrefill:
    """Has a model's `generate` prefill each distinct prompt once for all of its completions.

    Args:
        model: the MLLM, or a peft model around it.
        layout: to take without a trial; one that cannot be taken gives way to the next.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, layout: Layout | None = None) -> None:
        self.model: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self._layout = layout
        # in training mode dropout may draw for every row anew, and pictures may leave more than a cache
        self._agreed: dict[tuple[bool, bool], Layout] = {}

    @contextmanager
    def of(self, repeats: int, images: PromptImages) -> Iterator[None]:
        """Meanwhile `model.generate` is given distinct prompts, and `num_return_sequences`.

        Args:
            repeats: completions of each prompt, as in `num_return_sequences`.
            images: that the prompts show, in their order.
        """
        plain = self.model.generate

        def generate(*args: Any, **settings: Any) -> Any:
            first = Layout.PLAIN
            if repeats > 1:
                first = self._layout or self._agreed_on(plain, args, settings, images)
            for layout in list(Layout)[list(Layout).index(first) : -1]:
                drawn_before = _random_states()
                try:
                    with self._in_layout(layout, repeats, images):
                        return plain(*args, **settings)
                # prompts of another kind than those of the trial
                except _CannotBranch as error:
                    logger.info("%s: not as %s: %s.", type(self.model).__name__, layout.value, error)
                    _put_back(drawn_before)
            with self._in_layout(Layout.PLAIN, repeats, images):
                return plain(*args, **settings)

        with _replaced(self.model, generate=generate):
            yield

    def _agreed_on(
        self, plain: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any], images: PromptImages
    ) -> Layout:
        kind = self.model.training, bool(images.shown)
        if kind not in self._agreed:
            self._agreed[kind] = self._first_that_agrees(plain, args, settings, images)
        return self._agreed[kind]

    @contextmanager
    def _in_layout(self, layout: Layout, repeats: int, images: PromptImages) -> Iterator[None]:
        if layout is not Layout.PLAIN:
            with images.encoded_once(self.model), _Branches(self.model, as_tree=layout is Layout.TREE).taken():
                yield
        elif repeats > 1 and _encodes_before_it_repeats(self.model):
            # it repeats the features of the prompts' own images, in the form in which the tower gave them
            yield
        else:
            with images.encoded_once(self.model, repeats):
                yield

    def _first_that_agrees(
        self, plain: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any], images: PromptImages
    ) -> Layout:
        """The first layout in which a few completions of some prompts are those of a plain `generate`."""
        tried: dict[str, Any] = {
            # two completions of each prompt that soon differ
            "num_return_sequences": 2,
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": TRIED_TOKENS,
            "min_new_tokens": TRIED_TOKENS,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        if (config := settings.get("generation_config")) is not None:
            config = copy.deepcopy(config)
            config.update(**tried)
            tried = {"generation_config": config}

        def drawn(layout: Layout) -> Any:
            with undisturbed(0), self._in_layout(layout, 2, images):
                return plain(*args, **settings | tried)

        tolerance = EXACT if self.model.dtype == torch.float32 else ROUNDED
        reason = _without_cache(self.model, settings)
        expected = None
        for layout in () if reason else (Layout.TREE, Layout.COPIES):
            try:
                expected = expected or drawn(Layout.PLAIN)
                reason = _difference(expected, drawn(layout), tolerance)
            # what a foreign model or cache raises of rows that it did not prefill
            except Exception as error:
                reason = f"completions cannot branch from its prefill ({type(error).__name__}: {error})"
            if reason is None:
                return layout
            logger.info("%s: not as %s: %s.", type(self.model).__name__, layout.value, reason)
        logger.warning(
            "%s prefills every prompt once for each of its completions, as transformers does: %s.",
            type(self.model).__name__,
            reason,
        )
        return Layout.PLAIN


def _random_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _put_back(states: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])


def _difference(expected: Any, found: Any, tolerance: float) -> str | None:
    """In which way completions differ from those expected, as a clause; None for the same.

    Args:
        expected, found: outputs of `generate`, with logits.
        tolerance: how far logits may be apart, as a share of their spread.
    """
    start = expected.sequences.shape[1] - len(expected.logits)
    same_so_far = torch.ones(len(expected.sequences), dtype=torch.bool, device=expected.sequences.device)
    for position, (logits, others) in enumerate(zip(expected.logits, found.logits, strict=True)):
        spread = (logits - logits.mean(dim=-1, keepdim=True)).norm(dim=-1).clamp(min=1e-12)
        apart = ((others - logits).norm(dim=-1) / spread)[same_so_far]
        # what is not a number agrees with nothing
        if not bool((apart <= tolerance).all()):
            return (
                f"token {position + 1} behind a prompt that was prefilled once has logits {float(apart.max()):.2g} of "
                "their spread away from those behind a prompt of its own"
            )
        # rounding may choose the other of two tokens; what follows is then another text
        same_so_far &= found.sequences[:, start + position] == expected.sequences[:, start + position]
    return None


def _without_cache(model: PreTrainedModel, settings: Mapping[str, Any]) -> str | None:
    """Why `generate` with some settings leaves no cache of a prompt from which completions could branch."""
    config = settings.get("generation_config") or model.generation_config
    wanted = {
        name: settings.get(name, getattr(config, name, None))
        for name in ("use_cache", "num_beams", "output_attentions", "output_hidden_states")
    }
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model, which encodes a prompt once anyway"
    if wanted["use_cache"] is False:
        return "use_cache is False in its generation config"
    if (wanted["num_beams"] or 1) > 1 or wanted["output_attentions"] or wanted["output_hidden_states"]:
        return "its generation config asks for beams, attentions or hidden states"
    return None


def _encodes_before_it_repeats(model: PreTrainedModel) -> bool:
    """Whether `generate` encodes images before it repeats prompts, as it does for a growing number of families."""
    return model.config.is_encoder_decoder or bool(getattr(model, "_supports_mm_encoder_outputs", lambda: False)())


class _Branches:
    """Prompts of one `generate`, each prefilled once, and their completions.

    Args:
        model: that generates.
        as_tree: whether completions share the cache of their prompt, else each has a copy.
    """

    def __init__(self, model: PreTrainedModel, as_tree: bool) -> None:
        self.model = model
        self.as_tree = as_tree
        self._expand, self._prefill = model._expand_inputs_for_generation, model._prefill
        self._distinct: dict[str, Any] = {}
        self._repeats = 1
        # tokens of the prompt in the cache, padding included, as long as a tree grows behind them
        self._prompt_length: int | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Meanwhile the model generates this way."""
        hooks = (
            [
                self.model.register_forward_pre_hook(self._step_in_tree, with_kwargs=True),
                self.model.register_forward_hook(self._step_in_rows),
            ]
            if self.as_tree
            else []
        )
        try:
            with _replaced(self.model, _expand_inputs_for_generation=self._expand_inputs, _prefill=self._prefill_once):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _expand_inputs(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **inputs: Any
    ) -> Any:
        self._repeats = expand_size
        self._distinct = {"input_ids": input_ids, **inputs}
        # what the prefill alone reads need not be repeated
        followed = {name: value for name, value in inputs.items() if name not in OF_PREFILL}
        return self._expand(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **followed
        )

    def _prefill_once(
        self, input_ids: torch.Tensor, generation_config: Any, inputs: dict[str, Any], *args: Any, **settings: Any
    ) -> Any:
        # the cache, and what else `generate` adds once prompts are repeated
        added = {name: value for name, value in inputs.items() if name not in self._distinct}
        distinct = self._distinct | added
        outputs = self._prefill(distinct.pop("input_ids"), generation_config, distinct, *args, **settings)
        cache = _cache_of(outputs)
        if not isinstance(cache, Cache):
            raise _CannotBranch(f"its cache is of type {type(cache).__name__}")
        rows = torch.arange(len(outputs.logits), device=outputs.logits.device).repeat_interleave(self._repeats)
        if self.as_tree:
            self._prompt_length = self._length_of_trunk(cache)
        else:
            # what beam search does with a cache, so that every kind of layer has it, unlike `batch_repeat_interleave`
            cache.reorder_cache(rows)
        outputs.logits = outputs.logits[:, -1:].index_select(0, rows)
        return outputs

    def _length_of_trunk(self, cache: Cache) -> int:
        """Tokens of the prompts in a cache from which trees can grow."""
        model = self.model
        if not type(model).__module__.startswith("transformers."):
            raise _CannotBranch("who knows which masks a model takes that is not of transformers")
        if model.config.get_text_config()._attn_implementation not in ("sdpa", "eager"):
            raise _CannotBranch("its attention takes no mask of one's own")
        # all others forget, or sum up, what they are given
        if kinds := {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}:
            raise _CannotBranch(f"its cache has layers of type {', '.join(sorted(kinds))}")
        length = cache.get_seq_length()
        mask = self._distinct.get("attention_mask")
        if mask is not None and mask.shape[1] != length:
            raise _CannotBranch(f"its cache has {length} tokens of prompts of {mask.shape[1]}")
        return length

    def _step_in_tree(self, model: Any, args: Any, inputs: dict[str, Any]) -> Any:
        """A step of the decoding, a row per completion, as a row per prompt."""
        if self._prompt_length is None:
            return None
        completions = len(inputs["input_ids"])
        taken = {
            name: self._as_prompts(name, value, completions)
            for name, value in inputs.items()
            if name not in ("attention_mask", "logits_to_keep")
        }
        taken["attention_mask"] = self._tree_mask(_cache_of(inputs).get_seq_length(), inputs["input_ids"].device)
        return args, taken

    def _as_prompts(self, name: str, value: Any, completions: int) -> Any:
        """An input with a token per completion (..., B * G, 1) as one of (..., B, G)."""
        if not isinstance(value, torch.Tensor):
            return value
        if value.shape[-2:] != (completions, 1) or (value.ndim > 2 and name != "position_ids"):
            raise _CannotBranch(f"it is given {name} of shape {tuple(value.shape)} with each token")
        return value.reshape(*value.shape[:-2], -1, self._repeats)

    def _tree_mask(self, cached: int, device: torch.device) -> torch.Tensor:
        """(B, 1, G, K): whether the next token of each completion sees what is in the cache then."""
        assert self._prompt_length is not None
        repeats = self._repeats
        prompts = len(self._distinct["input_ids"])
        steps = (cached - self._prompt_length) // repeats + 1
        padding = self._distinct.get("attention_mask")
        trunk = (
            torch.ones(prompts, self._prompt_length, dtype=torch.bool, device=device)
            if padding is None
            else padding.to(device).bool()
        )
        # a step puts one token of each completion into the cache
        own = torch.eye(repeats, dtype=torch.bool, device=device).repeat(1, steps)
        sees = torch.cat([trunk[:, None, :].expand(-1, repeats, -1), own[None].expand(prompts, -1, -1)], dim=-1)[
            :, None
        ]
        if self.model.config.get_text_config()._attn_implementation == "sdpa":
            return sees
        lowest = torch.finfo(self.model.dtype).min
        return torch.zeros(sees.shape, dtype=self.model.dtype, device=device).masked_fill(~sees, lowest)

    def _step_in_rows(self, model: Any, args: Any, outputs: Any) -> Any:
        """What the model answers a row per prompt, a row per completion."""
        if self._prompt_length is not None:
            outputs.logits = outputs.logits.reshape(-1, 1, outputs.logits.shape[-1])
        return outputs


def _cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among a model's inputs or outputs, under its name of today or of releases before."""
    return values["cache"] if "cache" in values else values.get("past_key_values")


@contextmanager
def _replaced(model: PreTrainedModel, **methods: Callable[..., Any]) -> Iterator[None]:
    """Stand in for methods of a model, over whatever else stands in for them already."""
    before = {name: vars(model)[name] for name in methods if name in vars(model)}
    for name, method in methods.items():
        setattr(model, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(model, name)
        for name, method in before.items():
            setattr(model, name, method)
