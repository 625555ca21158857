"""What a vision-language model does, found by running it: what training code has to know, never typed by hand."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

QUESTION = "What is shown here?"
# of a prompt that are looked at, which an image is wider than the gaps between
PLACES = 64


@dataclass(frozen=True)
class Traits:
    """What a model does with a picture and a question.

    Attributes:
        image_tokens: how many tokens of the prompt hold an image feature, for each token id that does.
        inputs: shapes of what the processor makes beside ids and mask.
        two_images: whether one prompt may have two images.
        no_image: whether a prompt may have none.
        tower: class and path of what `get_encoder(modality="image")` answers; a path of None for the model itself.
        image_features: shapes of what `get_image_features` calls pooled, or why it cannot be called.
        other_towers: paths of further pretrained models that read pictures.
        layer_types: kinds of attention in the language model, in the order of its layers.
        window: how many tokens back a sliding layer looks.
        experts: whether the language model is a mixture of experts.
        rope_index: whether the model counts positions itself, in `get_rope_index`.
        position_axes: axes of the position ids the language model is given, 0 where it is given none.
        looks_ahead: whether a token sees later ones: "no", "inside images", or "everywhere in the prompt".
        head: how logits come from the last hidden states: "plain" where it is the output embedding alone, "scaled"
            where a factor is put on it, "other" else.
    """

    image_tokens: dict[int, int]
    inputs: dict[str, tuple[int, ...]]
    two_images: bool
    no_image: bool
    tower: tuple[str, str | None]
    image_features: str
    other_towers: tuple[str, ...]
    layer_types: tuple[str, ...]
    window: int | None
    experts: bool
    rope_index: bool
    position_axes: int
    looks_ahead: str
    head: str


def prompt_inputs(
    model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image], question: str = QUESTION
) -> BatchFeature:
    """What a model is given for some pictures and a question, by its own processor and chat template.

    Args:
        model: takes the inputs; numbers come in its precision.
        processor: the model's own.
        images: in the order in which they come before the question.
        question: text of the user's turn.

    Returns:
        Inputs for one row, with the start of an answer for an encoder-decoder model.
    """
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=list(images) or None, text=[text], return_tensors="pt").to(model.dtype)
    # written for training on a suffix; a question has none
    inputs.pop("labels", None)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, -4:]
    return inputs


def traits(model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image) -> Traits:
    """Run a model and say what it does.

    Args:
        model: in eval mode.
        processor: its own.
        image: any picture.
    """
    inputs = prompt_inputs(model, processor, [image])
    image_tokens = _image_tokens(model, inputs)
    seen, logits = _decoder_inputs(model, inputs)
    text_config = model.config.get_text_config(decoder=True)
    positions = seen.get("position_ids")
    return Traits(
        image_tokens=image_tokens,
        inputs={
            name: tuple(value.shape) if isinstance(value, torch.Tensor) else ()
            for name, value in inputs.items()
            if name not in ("input_ids", "attention_mask")
        },
        two_images=_runs(model, processor, [image, image]),
        no_image=_runs(model, processor, []),
        tower=_tower(model),
        image_features=_image_features(model, inputs),
        other_towers=_other_towers(model, inputs),
        layer_types=tuple(getattr(text_config, "layer_types", None) or ()),
        window=getattr(text_config, "sliding_window", None),
        experts=any(
            getattr(text_config, name, None)
            for name in ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
        ),
        rope_index=hasattr(model.base_model, "get_rope_index") or hasattr(model, "get_rope_index"),
        position_axes=0 if positions is None else positions.shape[0] if positions.ndim == 3 else 1,
        looks_ahead=_looks_ahead(seen, logits),
        head=_head(model, seen, logits),
    )


@contextmanager
def _watched(model: PreTrainedModel, seen: dict[str, Any]) -> Iterator[None]:
    """Keep what the language model is given and what it answers, meanwhile."""

    def before(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        if isinstance(embeddings := kwargs.get("inputs_embeds"), torch.Tensor) and embeddings.requires_grad:
            embeddings.retain_grad()

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        seen["output"] = output

    decoder = model.get_decoder()
    hooks = [decoder.register_forward_pre_hook(before, with_kwargs=True), decoder.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _decoder_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    seen: dict[str, Any] = {}
    with _watched(model, seen), torch.enable_grad():
        logits = model(**inputs).logits
    return seen, logits


def _runs(model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image]) -> bool:
    try:
        with torch.no_grad():
            model(**prompt_inputs(model, processor, images))
    except Exception:
        return False
    return True


def _image_tokens(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[int, int]:
    """Tokens that are only a place for an image feature: nothing that comes out depends on their own embedding."""
    ids = inputs["input_ids"]
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if embedded or output.shape[:2] != ids.shape:
            return output
        # on its own, so that it has a gradient where the model's weights have none
        embedded.append(output.detach().requires_grad_())
        # models write features into what they are given
        return embedded[0].clone()

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            model(**inputs).logits.square().sum().backward()
    finally:
        hook.remove()
        model.zero_grad(set_to_none=True)
    if not embedded or embedded[0].grad is None:
        return {}
    unused = (embedded[0].grad[0] == 0).all(dim=-1)
    tokens, counts = ids[0, unused].unique(return_counts=True)
    return dict(zip(tokens.tolist(), counts.tolist(), strict=True))


def _path(model: PreTrainedModel, module: object) -> str | None:
    return next((path for path, inner in model.named_modules() if path and inner is module), None)


def _tower(model: PreTrainedModel) -> tuple[str, str | None]:
    tower = model.get_encoder(modality="image")
    return type(tower).__name__, _path(model, tower)


def _image_features(model: PreTrainedModel, inputs: Mapping[str, Any]) -> str:
    owner = next((part for part in (model, model.base_model) if hasattr(part, "get_image_features")), None)
    if owner is None:
        return "has none"
    named = inspect.signature(owner.get_image_features).parameters
    about_images = {name: value for name, value in inputs.items() if not name.endswith(("_ids", "attention_mask"))}
    # some hand on, as keyword arguments, what they do not name
    for given in ({name: value for name, value in inputs.items() if name in named}, about_images):
        try:
            with torch.no_grad():
                output = owner.get_image_features(**given, return_dict=True)
            break
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    else:
        return failure
    pooled = getattr(output, "pooler_output", output)
    parts = list(pooled) if isinstance(pooled, (list, tuple)) else [pooled]
    return ", ".join(
        str(tuple(part.shape)) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts
    )


def _other_towers(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Pretrained models that run before the language model and stand neither in the tower nor around it."""
    _, tower = _tower(model)
    decoder = _path(model, model.get_decoder())
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
        for path, module in model.named_modules()
        if path and isinstance(module, PreTrainedModel)
    ]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    known = [path for path in (tower, decoder) if path]
    related = [
        path for path in dict.fromkeys(ran) if not any(_within(path, other) or _within(other, path) for other in known)
    ]
    return tuple(path for path in related if not any(_within(path, other) and path != other for other in related))


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _looks_ahead(seen: Mapping[str, Any], logits: torch.Tensor) -> str:
    embeddings = seen.get("inputs_embeds")
    if not isinstance(embeddings, torch.Tensor) or not embeddings.requires_grad:
        return "unknown: the language model is given no embeddings"
    length = logits.shape[1]
    if embeddings.shape[1] != length:
        return "unknown: logits and prompt are of different lengths"
    ahead = []
    # the last place has none ahead
    for place in torch.linspace(0, length - 2, min(length - 1, PLACES)).long().tolist():
        (gradient,) = torch.autograd.grad(logits[0, place].square().sum(), embeddings, retain_graph=True)
        ahead.append(bool(gradient[0, place + 1 :].abs().max() > 0))
    if not any(ahead):
        return "no"
    # a prompt begins with text
    return "everywhere in the prompt" if ahead[0] else "inside images"


@torch.no_grad()
def _head(model: PreTrainedModel, seen: Mapping[str, Any], logits: torch.Tensor) -> str:
    head, output = model.get_output_embeddings(), seen.get("output")
    hidden = getattr(output, "last_hidden_state", None)
    if head is None or hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
        return "other"
    plain = head(hidden)
    if plain.shape != logits.shape:
        return "other"
    if torch.allclose(plain, logits, atol=1e-4):
        return "plain"
    factor = (plain * logits).sum() / plain.square().sum()
    return f"scaled by {factor:.4g}" if torch.allclose(plain * factor, logits, atol=1e-4) else "other"
