"""Saliency: where in an image does the loss of one pair want the features to change?

The gradient of the SFT loss or the DPO loss of a pair with respect to the encoder's features, or to the projector's
output; its magnitude at each patch is a heat map over the image (arXiv 2510.16333, section 4.2 and figure 7). The
paper's text differentiates by the encoder's features, its published code by the projector's output: `at` says which.
Nothing is smoothed, clipped or overwritten; the published code does all three.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from pivot_plugin.adapters import ImageFeatures, VisionAdapter
from pivot_plugin.data.pairs import PairDataset, load
from pivot_plugin.errors import DataError, ModelError, SettingsError
from pivot_plugin.objectives import learning_rate as default_rate
from pivot_plugin.training.batch import ForestBatch, ForestCollator
from pivot_plugin.training.forest_check import read_rows
from pivot_plugin.training.forward import answering
from pivot_plugin.training.plan import plan

from .scores import ProbeResult, score_of
from .subjects import Subject, subject

Loss = Literal["sft", "dpo"]
Place = Literal["encoder", "projector"]
LOSSES: tuple[Loss, ...] = ("sft", "dpo")
BETA = 0.1
# arXiv 2510.16333, appendix E.4: maps are looked at after about so many steps on the one pair
PAPER_STEPS = 20


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
        ModelError: for an encoder by itself.
    """
    who = subject(examined)
    model, processor = who.mllm("Saliency")
    _check(losses, at, steps)
    rows = load(pairs)
    if not isinstance(rows, PairDataset):
        raise DataError("Pairs are given as a stream.", "Give rows with random access: a list, a data set or a file.")
    if masks is not None and len(masks) != len(rows):
        raise DataError(f"There are {len(masks)} masks for {len(rows)} pairs.", "Give one mask per pair.")
    shown = [position for position in range(len(rows)) if rows.plain(position)["images"]][:limit]
    if not shown:
        raise DataError(f"No pair of {rows.name} has an image.", "Give pairs about images.")
    reading = read_rows(model, who.adapter, processor, [rows[shown[0]]])
    collator = ForestCollator(
        processor, who.adapter.image_token_id, reading.shared, whole_prompts=reading.whole_prompts
    )
    found = []
    with answering(model, who.adapter, reading):
        for position in shown:
            found.append(_of_pair(who, collator, rows[position], losses, at, reference, beta, steps, learning_rate))
    scores = {}
    chosen_masks = None if masks is None else [masks[position] for position in shown]
    for loss in losses:
        maps = [pair.maps[loss] for pair in found]
        if chosen_masks is not None:
            inside = [mask_shares(mask, pair, loss) for mask, pair in zip(chosen_masks, found, strict=True)]
            scores[f"{loss}/energy"] = score_of(
                np.array([energy_inside(m, share) for m, share in zip(maps, inside, strict=True)])
            )
            scores[f"{loss}/area"] = score_of(np.array([share.mean() for share in inside]))
            scores[f"{loss}/pointing"] = score_of(
                np.array([points_inside(p.maps[loss], m, p.box) for p, m in zip(found, chosen_masks, strict=True)])
            )
        scores[f"{loss}/concentration"] = score_of(np.array([concentration(values) for values in maps]))
    settings = {
        "pairs": len(found),
        "gradient by": "encoder's features" if at == "encoder" else "projector's output",
        "magnitude": "sum of absolute values over channels",
        "steps on the pair": steps,
        "beta": beta,
    }
    return ProbeResult("saliency", scores, settings, found)


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
    found = saliency(examined, pairs, masks=masks, **options)
    ordered = sorted(found.scores, key=lambda name: not name.endswith("pointing"))
    return ProbeResult("pointing", {n: found.scores[n] for n in ordered}, found.settings, found.artefacts)


def concentration(values: np.ndarray) -> float:
    """1 - exp(entropy) / patches of a map's distribution: 0 where all are equal, near 1 where one has everything."""
    total = values.sum()
    if total <= 0:
        return 0.0
    share = values.ravel() / total
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    return float(1 - np.exp(entropy) / share.size)


def energy_inside(values: np.ndarray, inside: np.ndarray) -> float:
    """Share of a map that lies inside a mask; both (rows, columns), `inside` the covered share of each patch."""
    total = values.sum()
    return float((values * inside).sum() / total) if total > 0 else float(inside.mean())


def points_inside(
    values: np.ndarray, mask: Any, box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
) -> float:
    """1 where the centre of the patch with the largest value lies inside a mask, else 0.

    Source: Zhang et al. 2016 (excitation backprop), the pointing game.
    """
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    full = _boolean(mask)
    left, top, right, bottom = box
    across = left + (right - left) * (column + 0.5) / values.shape[1]
    down = top + (bottom - top) * (row + 0.5) / values.shape[0]
    height, width = full.shape
    return float(full[min(int(down * height), height - 1), min(int(across * width), width - 1)])


def mask_shares(mask: Any, pair: PairSaliency, loss: str) -> np.ndarray:
    """(rows, columns) which share of each patch a mask covers.

    Raises:
        DataError: if the mask has another size than the pair's image.
    """
    full = _boolean(mask)
    if (full.shape[1], full.shape[0]) != pair.image.size:
        raise DataError(
            f"The mask of pair {pair.pair!r} is {full.shape[1]} x {full.shape[0]}, its image "
            f"{pair.image.width} x {pair.image.height}.",
            "Scale the mask to its image.",
        )
    rows, columns = pair.maps[loss].shape
    left, top, right, bottom = pair.box
    width, height = pair.image.size
    box = (left * width, top * height, right * width, bottom * height)
    scaled = Image.fromarray(full.astype(np.float32)).resize((columns, rows), Image.Resampling.BOX, box=box)
    return np.asarray(scaled, dtype=np.float64)


def _boolean(mask: Any) -> np.ndarray:
    values = np.asarray(mask)
    if values.ndim != 2:
        raise DataError(f"A mask has shape {values.shape}.", "Give (height, width), not zero inside.")
    return values != 0


def _check(losses: Sequence[str], at: str, steps: int) -> None:
    if not losses or set(losses) - set(LOSSES):
        raise SettingsError(f"losses is {list(losses)}.", 'Choose "sft", "dpo" or both.')
    if at not in ("encoder", "projector"):
        raise SettingsError(f"at is {at!r}.", 'Choose "encoder" or "projector".')
    if steps < 0:
        raise SettingsError(f"steps is {steps}.", "Give 0 or more.")


def _of_pair(
    who: Subject,
    collator: ForestCollator,
    pair: dict[str, Any],
    losses: Sequence[Loss],
    at: Place,
    reference: Mapping[str, tuple[float, float]] | None,
    beta: float,
    steps: int,
    learning_rate: float | None,
) -> PairSaliency:
    batch: ForestBatch = collator([pair])["forest"]
    name = str(pair.get("id"))
    logps = _logps(who.model, batch)
    before = logps if reference is None else reference.get(name, logps)
    maps: dict[str, np.ndarray] = {}
    for loss in losses:
        rate = default_rate(loss, lora=False) if learning_rate is None else learning_rate
        with _trained_on(who.adapter, batch, loss, before, beta, steps, rate):
            maps[loss] = _map(who, batch, loss, before, beta, at)
    image = pair["images"][0]
    question, chosen, rejected = (_text(pair[part]) for part in ("prompt", "chosen", "rejected"))
    box = who.adapter.shown_box(who.processor, image.size)
    return PairSaliency(name, question, chosen, rejected, image, box, maps, logps)


def _text(messages: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for message in messages:
        content = message["content"]
        pieces = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
        parts += [piece for piece in pieces if piece]
    return " ".join(parts)


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


def _map(
    who: Subject, batch: ForestBatch, loss: Loss, reference: tuple[float, float], beta: float, at: Place
) -> np.ndarray:
    """(rows, columns) magnitude of the gradient at each patch of the pair's first image."""
    model, adapter = who.model, who.adapter
    pixels = {
        name: value.detach().clone().requires_grad_(True) if value.is_floating_point() else value
        for name, value in batch.image_inputs.items()
    }
    # a frozen tower's features have a gradient only if something before them asks for one
    asking = ForestBatch(batch.forest, pixels, batch.image_tokens, batch.tree_images, batch.pair_ids)
    with torch.enable_grad(), _seen(model, adapter, at) as seen:
        log_probs = model(forest=asking).log_probs
        lengths = (batch.forest.edge_of >= 0).sum(dim=1)
        value = pair_loss(log_probs, lengths.to(log_probs.device), loss, reference, beta)
        if not seen:
            raise ModelError(
                f"{type(model).__name__} did not ask its {at} while it looked at pair {batch.pair_ids[0]}.",
                "The adapter names another module than the model uses (`pivot inspect`).",
            )
        flat = [tensor for tensor in _tensors(seen[0]) if tensor.requires_grad]
        gradients = torch.autograd.grad(value, flat, allow_unused=True)
    of = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(flat, gradients, strict=True)}
    answer = _replaced(seen[0], of)
    inputs = {name: value.to(model.device) for name, value in batch.image_inputs.items()}
    if at == "projector":
        parts = torch.cat([part.flatten(0, -2) for part in _tensors(answer)]).split(batch.image_tokens)
        first = adapter.tokens_on_grid(parts[0], adapter.select_images(inputs, 0, 1))
    else:
        adapter.read_processor(who.processor)
        first = adapter.on_whole_views(adapter.hidden_state(answer), inputs, batch.image_tokens)[0]
    return first.values.abs().sum(dim=1).reshape(first.grid).float().cpu().numpy()


@contextmanager
def _seen(model: PreTrainedModel, adapter: VisionAdapter, at: Place) -> Iterator[list[Any]]:
    """What the tower, or the projector behind it, answers meanwhile."""
    seen: list[Any] = []
    if at == "encoder":
        hook = adapter.tower.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            yield seen
        finally:
            hook.remove()
        return
    backbone = model.base_model
    encode = backbone.get_image_features

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        outputs = encode(*args, **kwargs)
        seen.append(outputs.pooler_output)
        return outputs

    backbone.get_image_features = get_image_features
    try:
        yield seen
    finally:
        del backbone.get_image_features


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a model's answer, each once."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    found = [tensor for part in parts for tensor in _tensors(part)]
    return list({id(tensor): tensor for tensor in found}.values())


def _replaced(value: Any, of: Mapping[int, torch.Tensor]) -> Any:
    """A model's answer with each tensor replaced by its gradient."""
    if isinstance(value, torch.Tensor):
        return of.get(id(value), value)
    if isinstance(value, Mapping):
        return type(value)(**{name: _replaced(part, of) for name, part in value.items()})
    return tuple(_replaced(part, of) for part in value) if isinstance(value, tuple | list) else value


@contextmanager
def _trained_on(
    adapter: VisionAdapter,
    batch: ForestBatch,
    loss: Loss,
    reference: tuple[float, float],
    beta: float,
    steps: int,
    rate: float,
) -> Iterator[None]:
    """Train all weights on one pair for some steps; put weights and flags back afterwards."""
    if not steps:
        yield
        return
    names = set(plan(adapter, "all", None).parameters)
    parameters = {name: p for name, p in adapter.model.named_parameters() if name in names}
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    lengths = (batch.forest.edge_of >= 0).sum(dim=1).to(adapter.model.device)
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
        for _ in range(steps):
            with torch.enable_grad():
                pair_loss(adapter.model(forest=batch).log_probs, lengths, loss, reference, beta).backward()
            optimizer.step()
            optimizer.zero_grad()
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
                parameter.grad = None
                parameter.requires_grad_(flags[name])
