"""Each distinct prompt is prefilled once, and what that leaves is branched to its completions.

transformers' `generate` repeats prompts for `num_return_sequences` and then prefills every copy. While `SharedPrefill` is
in force, two of its methods are wrapped on the model:

    _expand_inputs_for_generation   the prompts are kept as they are before they are repeated
    _prefill                        prefills these; then each row of the cache and of the logits is repeated instead

All else is transformers' own: positions, masks, logits processors, draws, when to stop. A row's logits do not depend on
the rows beside it, and the draws come from the same generator in the same order, so that the completions are those of a
plain `generate`. The cache that is decoded from is no smaller than a plain one: a copy for each completion. What shrinks
is the computation of the prefill, and its activations.

A model can keep something of its prompts outside of its cache, and a cache can be of a kind that cannot be branched.
So each model is tried once, on the first prompts that it is given: a few tokens by itself, and branched in two. One that
differs, and one that has no cache, answers by plain `generate`, and a line of the log says so.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import utils as generation_utils

from pivot_plugin.models.evaluating import undisturbed
from pivot_plugin.models.image_features import repeated_features

logger = logging.getLogger(__name__)

# tokens of the trial: the first is of the prefill, the second reads the branched cache, the third what it became
TRIED_TOKENS = 3
# how far logits may be apart, as a share of their spread: in float32, and in half precision, where sums round
EXACT, ROUNDED = 1e-3, 0.1
# what `generate` hands on to the prefill alone
OF_PREFILL = frozenset(generation_utils.MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)


class _CannotBranch(Exception):
    """What a prefill left cannot be repeated."""


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
        model: the MLLM.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # by whether the model is in training mode, in which dropout may draw for every row anew
        self._shares: dict[bool, bool] = {}

    @contextmanager
    def of(self, repeats: int, images: PromptImages) -> Iterator[None]:
        """Meanwhile `model.generate` is given distinct prompts, and `num_return_sequences`.

        Args:
            repeats: completions of each prompt, as in `num_return_sequences`.
            images: that the prompts show, in their order.
        """
        plain = self.model.generate

        def generate(*args: Any, **settings: Any) -> Any:
            if self._can_share(plain, args, settings, repeats, images):
                with images.encoded_once(self.model), _branching(self.model):
                    return plain(*args, **settings)
            with images.encoded_once(self.model, 1 if _encodes_before_it_repeats(self.model) else repeats):
                return plain(*args, **settings)

        with _replaced(self.model, generate=generate):
            yield

    def _can_share(
        self, plain: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any], repeats: int, images: PromptImages
    ) -> bool:
        if repeats == 1:
            return False
        training = self.model.training
        if training not in self._shares:
            reason = _without_cache(self.model, settings) or self._difference(plain, args, settings, images)
            self._shares[training] = reason is None
            if reason is not None:
                logger.warning(
                    "%s prefills every prompt once for each of its %d completions, as transformers does: %s.",
                    type(self.model).__name__,
                    repeats,
                    reason,
                )
        return self._shares[training]

    def _difference(
        self, plain: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any], images: PromptImages
    ) -> str | None:
        """In which way the first prompts are answered differently when branched; None for the same answers."""
        tried = settings | {
            # of each distribution the most probable token; `generate` gives several completions only where it draws
            "do_sample": True,
            "top_k": 1,
            "top_p": 1.0,
            "temperature": 1.0,
            "max_new_tokens": TRIED_TOKENS,
            "min_new_tokens": TRIED_TOKENS,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        with undisturbed():
            with images.encoded_once(self.model):
                alone = plain(*args, **tried | {"num_return_sequences": 1})
            try:
                with images.encoded_once(self.model), _branching(self.model):
                    branched = plain(*args, **tried | {"num_return_sequences": 2})
            # what a foreign model or cache raises of rows that it did not prefill
            except Exception as error:
                return f"what its prefill leaves cannot be branched ({type(error).__name__}: {error})"
        tolerance = EXACT if self.model.dtype == torch.float32 else ROUNDED
        same_so_far = torch.ones(len(alone.sequences), dtype=torch.bool, device=alone.sequences.device)
        start = alone.sequences.shape[1] - len(alone.logits)
        for position, expected in enumerate(alone.logits):
            drawn = branched.logits[position].unflatten(0, (-1, 2))
            spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
            apart = (drawn - expected[:, None]).norm(dim=-1).amax(dim=1) / spread.clamp(min=1e-12)
            # a not a number is no agreement
            if not bool((apart[same_so_far] <= tolerance).all()):
                return (
                    f"token {position + 1} behind a branched prompt has logits {float(apart[same_so_far].max()):.2g} of "
                    "their spread away from those behind the prompt by itself"
                )
            # rounding may choose the other of two tokens; what follows is then another text
            tokens = branched.sequences[:, start + position].unflatten(0, (-1, 2))
            same_so_far &= (tokens == alone.sequences[:, start + position, None]).all(dim=1)
        return None


def _without_cache(model: PreTrainedModel, settings: Mapping[str, Any]) -> str | None:
    """Why `generate` with some settings has no cache of the prompt to branch."""
    config = settings.get("generation_config") or model.generation_config
    wanted = {
        name: settings.get(name, getattr(config, name, None))
        for name in ("use_cache", "num_beams", "output_attentions", "output_hidden_states")
    }
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model, whose prompt is encoded once anyway"
    if wanted["use_cache"] is False:
        return "use_cache is False in its generation config"
    if (wanted["num_beams"] or 1) > 1 or wanted["output_attentions"] or wanted["output_hidden_states"]:
        return "its generation config asks for beams, attentions or hidden states"
    return None


def _encodes_before_it_repeats(model: PreTrainedModel) -> bool:
    """Whether `generate` encodes images before it repeats prompts, as it does for a growing number of families."""
    return model.config.is_encoder_decoder or bool(getattr(model, "_supports_mm_encoder_outputs", lambda: False)())


@contextmanager
def _branching(model: PreTrainedModel) -> Iterator[None]:
    """Have `generate` prefill prompts before they are repeated, and repeat what that leaves."""
    expand, prefill = model._expand_inputs_for_generation, model._prefill
    distinct: dict[str, Any] = {}
    repeats = 1

    def expand_inputs(
        expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: torch.Tensor | None = None, **inputs: Any
    ) -> Any:
        nonlocal distinct, repeats
        repeats = expand_size
        distinct = {"input_ids": input_ids, **inputs}
        # read by the prefill alone, which is given them as they are here
        followed = {name: value for name, value in inputs.items() if name not in OF_PREFILL}
        return expand(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **followed
        )

    def prefill_once(
        input_ids: torch.Tensor, generation_config: Any, inputs: dict[str, Any], *args: Any, **settings: Any
    ) -> Any:
        # the cache, and what else `generate` adds once prompts are repeated
        added = {name: value for name, value in inputs.items() if name not in distinct}
        own = distinct | added
        outputs = prefill(own.pop("input_ids"), generation_config, own, *args, **settings)
        cache = outputs.get("cache", outputs.get("past_key_values"))
        if not isinstance(cache, Cache):
            raise _CannotBranch(f"its cache is of type {type(cache).__name__}")
        rows = torch.arange(len(outputs.logits), device=outputs.logits.device).repeat_interleave(repeats)
        # what beam search does with a cache, so that every kind of layer has it; `batch_repeat_interleave` they have not
        cache.reorder_cache(rows)
        outputs.logits = outputs.logits[:, -1:].index_select(0, rows)
        return outputs

    with _replaced(model, _expand_inputs_for_generation=expand_inputs, _prefill=prefill_once):
        yield


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
