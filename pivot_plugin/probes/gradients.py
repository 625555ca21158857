"""Saliency: where in an image does the loss of one pair want the features to change?

The gradient of the SFT loss or the DPO loss of a pair with respect to the encoder's features, or to the projector's
output; its magnitude at each patch is a heat map over the image (arXiv 2510.16333, section 4.2 and figure 7). The
paper's text differentiates by the encoder's features, its published code by the projector's output: `at` says which.
Nothing is smoothed, clipped or overwritten; the published code does all three.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.adapters import ImageFeatures, VisionAdapter
from pivot_plugin.data.layout import text_of
from pivot_plugin.data.pairs import load_pairs
from pivot_plugin.errors import DataError, ModelError, SettingsError
from pivot_plugin.objectives import learning_rate as default_rate
from pivot_plugin.training.batch import ForestBatch, ForestCollator
from pivot_plugin.training.forest_check import read_rows
from pivot_plugin.training.forward import answering
from pivot_plugin.training.plan import plan

from . import subjects
from .patch_grid import WIDE, prompted, said_of_grid, seen_view
from .pointing import concentration, energy_inside, mask_shares, points_inside
from .scores import ProbeResult, Score, score_of
from .subjects import Subject

Loss = Literal["sft", "dpo"]
Place = Literal["encoder", "projector"]
LOSSES: tuple[Loss, ...] = ("sft", "dpo")
BETA = 0.1
# (2, C) log-probabilities and (2,) lengths of chosen and rejected to the loss of their pair
LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PairSaliency:
    """Heat maps of one pair.

    Attributes:
        pair: its id.
        question, chosen, rejected: its texts.
        image: the first image, as it was given.
        box: the part of the image that the maps cover: left, top, right, bottom as shares of width and height.
        maps: by loss, (rows, columns) magnitudes of the gradient at each patch of the first image, the sum of absolute
            values over channels.
        logps: log-probabilities of chosen and rejected.
    """

    pair: str
    question: str
    chosen: str
    rejected: str
    image: Image.Image = field(repr=False)
    box: tuple[float, float, float, float]
    maps: dict[str, np.ndarray] = field(repr=False)
    logps: tuple[float, float]


@dataclass(frozen=True)
class _Question:
    """What is asked of each pair; the fields as `saliency` documents them."""

    losses: Sequence[Loss]
    at: Place
    reference: Mapping[str, tuple[float, float]] | None
    beta: float
    steps: int
    learning_rate: float | None

    def __post_init__(self) -> None:
        if not self.losses or set(self.losses) - set(LOSSES):
            raise SettingsError(f"losses is {list(self.losses)}.", 'Choose "sft", "dpo" or both.')
        if self.at not in ("encoder", "projector"):
            raise SettingsError(f"at is {self.at!r}.", 'Choose "encoder" or "projector".')
        if self.steps < 0:
            raise SettingsError(f"steps is {self.steps}.", "Give 0 or more.")


def saliency(
    examined: object,
    pairs: object,
    *,
    masks: Sequence[Any] | None = None,
    losses: Sequence[Loss] = LOSSES,
    at: Place = "encoder",
    reference: Mapping[str, tuple[float, float]] | None = None,
    beta: float = BETA,
    steps: int = 0,
    learning_rate: float | None = None,
    limit: int | None = None,
) -> ProbeResult:
    """Heat maps of pairs, and how much of the gradient lies where it should.

    Args:
        examined: an MLLM, as for `features`.
        pairs: preference pairs, as for `preferences.load`; those without images are left out.
        masks: for each pair an array or image, not zero where the question's object is; of the size of its image.
        losses: "sft" (of the chosen answer), "dpo", or both.
        at: differentiate by the encoder's features or the projector's output.
        reference: log-probabilities of chosen and rejected under the model before training, by pair id, as an earlier
            result's artefacts hold them; the model is its own reference where None. It scales the maps of the DPO loss
            and, without `steps`, changes them in no other way.
        beta: of the DPO loss.
        steps: first train all weights on the one pair for so many steps, by each loss, as the paper does (20); the
            weights are put back.
        learning_rate: of these steps; the objective's own for weights where None.
        limit: pairs to look at.

    Returns:
        by loss "concentration", 1 - exp(entropy) / patches: 0 for a gradient that is equal everywhere. With masks also
        "energy", the share of the gradient inside, "area", the share a blind map would have, and "pointing", whether
        the patch with the largest gradient has its centre inside. `artefacts` are a `PairSaliency` per pair.

    Raises:
        DataError: if no pair has an image, or masks do not fit.
        ModelError: for an encoder by itself, or if its patches do not lie where the adapter says; where that cannot be
            told, the settings say so.
    """
    subject = subjects.subject(examined)
    model, processor = subject.mllm("Saliency")
    question = _Question(losses, at, reference, beta, steps, learning_rate)
    rows = load_pairs(pairs)
    if masks is not None and len(masks) != len(rows):
        raise DataError(f"There are {len(masks)} masks for {len(rows)} pairs.", "Give one mask per pair.")
    with_images = [position for position in range(len(rows)) if rows.plain(position)["images"]][:limit]
    if not with_images:
        raise DataError(f"No pair of {rows.name} has an image.", "Give pairs about images.")
    seen = seen_view if at == "encoder" else _seen_tokens
    grid = said_of_grid(subject, partial(seen, subject.adapter, processor), WIDE)
    reading = read_rows(model, subject.adapter, processor, [rows[with_images[0]]])
    collator = ForestCollator(
        processor, subject.adapter.image_token_id, reading.shared, whole_prompts=reading.whole_prompts
    )
    with answering(model, subject.adapter, reading):
        maps_of_pairs = [_of_pair(subject, collator, rows[position], question) for position in with_images]
    masks_of_pairs = None if masks is None else [masks[position] for position in with_images]
    scores: dict[str, Score] = {}
    for loss in losses:
        scores |= _scores(loss, maps_of_pairs, masks_of_pairs)
    settings = {
        "pairs": len(maps_of_pairs),
        "gradient by": "encoder's features" if at == "encoder" else "projector's output",
        "magnitude": "sum of absolute values over channels",
        "steps on the pair": steps,
        "beta": beta,
        "patch grid": grid,
    }
    return ProbeResult("saliency", scores, settings, maps_of_pairs)


def _scores(loss: Loss, pairs: Sequence[PairSaliency], masks: Sequence[Any] | None) -> dict[str, Score]:
    """The scores of one loss's maps."""
    samples: dict[str, list[float]] = {}
    if masks is not None:
        covered = [
            mask_shares(mask, pair.maps[loss].shape, pair.box, pair.image.size, f"pair {pair.pair!r}")
            for mask, pair in zip(masks, pairs, strict=True)
        ]
        samples["energy"] = [energy_inside(p.maps[loss], share) for p, share in zip(pairs, covered, strict=True)]
        samples["area"] = [float(share.mean()) for share in covered]
        samples["pointing"] = [points_inside(p.maps[loss], m, p.box) for p, m in zip(pairs, masks, strict=True)]
    samples["concentration"] = [concentration(pair.maps[loss]) for pair in pairs]
    return {f"{loss}/{name}": score_of(np.array(values)) for name, values in samples.items()}


def pointing_game(examined: object, pairs: object, masks: Sequence[Any] | None = None, **options: Any) -> ProbeResult:
    """`saliency` for pairs that have masks, the pointing game first.

    Args:
        examined, pairs, **options: as for `saliency`.
        masks: for each pair.

    Raises:
        DataError: without masks.
    """
    if masks is None:
        raise DataError("The pointing game needs masks, and the pairs come without.", "Pass masks=, one per pair.")
    result = saliency(examined, pairs, masks=masks, **options)
    ordered = sorted(result.scores, key=lambda name: not name.endswith("pointing"))
    return ProbeResult("pointing", {n: result.scores[n] for n in ordered}, result.settings, result.artefacts)


def _of_pair(subject: Subject, collator: ForestCollator, pair: dict[str, Any], question: _Question) -> PairSaliency:
    batch: ForestBatch = collator([pair])["forest"]
    name = str(pair.get("id"))
    logps = _logps(subject.model, batch)
    reference = (question.reference or {}).get(name, logps)
    maps: dict[str, np.ndarray] = {}
    for loss in question.losses:
        rate = default_rate(loss, lora=False) if question.learning_rate is None else question.learning_rate
        loss_of = partial(pair_loss, loss=loss, reference=reference, beta=question.beta)
        with _trained_on(subject.adapter, batch, loss_of, question.steps, rate):
            maps[loss] = _map(subject, batch, loss_of, question.at)
    image = pair["images"][0]
    texts = [text_of(pair[part]) for part in ("prompt", "chosen", "rejected")]
    box = subject.adapter.shown_box(subject.processor, image.size)
    return PairSaliency(name, texts[0], texts[1], texts[2], image, box, maps, logps)


@torch.no_grad()
def _logps(model: PreTrainedModel, batch: ForestBatch) -> tuple[float, float]:
    chosen, rejected = model(forest=batch).log_probs.sum(dim=1).tolist()
    return chosen, rejected


def pair_loss(
    log_probs: torch.Tensor, lengths: torch.Tensor, loss: Loss, reference: tuple[float, float], beta: float
) -> torch.Tensor:
    """The loss of one pair.

    Args:
        log_probs: (2, C) of the tokens of chosen and rejected, zero for padding.
        lengths: (2,) tokens of each.
        loss: "sft", the chosen answer's mean negative log-likelihood per token, or "dpo".
        reference: summed log-probabilities of both under the reference.
        beta: of the DPO loss.
    """
    chosen, rejected = log_probs.sum(dim=1)
    if loss == "sft":
        return -chosen / lengths[0].clamp(min=1)
    return -logsigmoid(beta * ((chosen - reference[0]) - (rejected - reference[1])))


def _map(subject: Subject, batch: ForestBatch, loss_of: LossOf, at: Place) -> np.ndarray:
    """(rows, columns) magnitude of the gradient at each patch of the pair's first image."""
    model, adapter = subject.model, subject.adapter
    pixels = {
        name: value.detach().clone().requires_grad_(True) if value.is_floating_point() else value
        for name, value in batch.image_inputs.items()
    }
    # a frozen tower's features have a gradient only if something before them asks for one
    differentiable = ForestBatch(batch.forest, pixels, batch.image_tokens, batch.tree_images, batch.pair_ids)
    with torch.enable_grad(), _recorded(model, adapter, at) as outputs:
        log_probs = model(forest=differentiable).log_probs
        lengths = (batch.forest.edge_of >= 0).sum(dim=1)
        value = loss_of(log_probs, lengths.to(log_probs.device))
        if not outputs:
            raise ModelError(
                f"{type(model).__name__} did not ask its {at} while it looked at pair {batch.pair_ids[0]}.",
                "The adapter names another module than the model uses (`pivot inspect`).",
            )
        flat = [tensor for tensor in _tensors(outputs[0]) if tensor.requires_grad]
        gradients = torch.autograd.grad(value, flat, allow_unused=True)
    gradient_of = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(flat, gradients, strict=True)}
    by_output = _replaced(outputs[0], gradient_of)
    inputs = {name: value.to(model.device) for name, value in batch.image_inputs.items()}
    if at == "projector":
        parts = torch.cat([part.flatten(0, -2) for part in _tensors(by_output)]).split(batch.image_tokens)
        first = adapter.tokens_on_grid(parts[0], adapter.select_images(inputs, 0, 1))
    else:
        adapter.read_processor(subject.processor)
        first = adapter.on_whole_views(adapter.hidden_state(by_output), inputs, batch.image_tokens)[0]
    return first.values.abs().sum(dim=1).reshape(first.grid).float().cpu().numpy()


def _seen_tokens(adapter: VisionAdapter, processor: ProcessorMixin, picture: Image.Image) -> ImageFeatures:
    """What the language model gets of a picture, on the grid of its image tokens."""
    inputs, images, count = prompted(adapter, processor, picture)
    with _recorded(adapter.model, adapter, "projector") as outputs, torch.no_grad():
        adapter.model(**inputs, use_cache=False)
    tokens = torch.cat([part.flatten(0, -2) for part in _tensors(outputs[0])])
    return adapter.tokens_on_grid(tokens[:count], adapter.select_images(images, 0, 1))


@contextmanager
def _recorded(model: PreTrainedModel, adapter: VisionAdapter, at: Place) -> Iterator[list[Any]]:
    """What the tower, or the projector behind it, returns meanwhile."""
    recorded: list[Any] = []
    if at == "encoder":
        hook = adapter.tower.register_forward_hook(lambda module, args, output: recorded.append(output))
        try:
            yield recorded
        finally:
            hook.remove()
        return
    backbone = model.base_model
    encode = backbone.get_image_features

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        outputs = encode(*args, **kwargs)
        recorded.append(outputs.pooler_output)
        return outputs

    backbone.get_image_features = get_image_features
    try:
        yield recorded
    finally:
        del backbone.get_image_features


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a model's answer, each once."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return list({id(tensor): tensor for part in parts for tensor in _tensors(part)}.values())


def _replaced(value: Any, of: Mapping[int, torch.Tensor]) -> Any:
    """A model's answer with each tensor replaced by its gradient."""
    if isinstance(value, torch.Tensor):
        return of.get(id(value), value)
    if isinstance(value, Mapping):
        return type(value)(**{name: _replaced(part, of) for name, part in value.items()})
    return tuple(_replaced(part, of) for part in value) if isinstance(value, tuple | list) else value


@contextmanager
def _trained_on(adapter: VisionAdapter, batch: ForestBatch, loss_of: LossOf, steps: int, rate: float) -> Iterator[None]:
    """Train all weights on one pair for some steps; put weights and flags back afterwards."""
    if not steps:
        yield
        return
    names = set(plan(adapter, "all", None).parameters)
    parameters = {name: p for name, p in adapter.model.named_parameters() if name in names}
    values = {name: p.detach().clone() for name, p in parameters.items()}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    lengths = (batch.forest.edge_of >= 0).sum(dim=1).to(adapter.model.device)
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
        for _ in range(steps):
            with torch.enable_grad():
                loss_of(adapter.model(forest=batch).log_probs, lengths).backward()
            optimizer.step()
            optimizer.zero_grad()
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
                parameter.grad = None
                parameter.requires_grad_(flags[name])
