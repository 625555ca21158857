"""Alignment: do an encoder and a text model find the same things alike?

The mutual k-nearest-neighbour metric of Huh et al. 2024 ("The Platonic Representation Hypothesis"): for each of n
paired images and captions, the overlap of its k nearest neighbours among the images, by the encoder, and among the
captions, by the text model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pivot_plugin.errors import DataError, ModelError, SettingsError

from . import subjects
from .extraction import features
from .linear import normalised
from .scores import ProbeResult, score_of

# Huh et al. 2024, the defaults of their published code
NEIGHBOURS = 10
OUTLIER_QUANTILE = 0.95


@dataclass(frozen=True)
class Captioned:
    """Images and their captions, with the text model to compare with.

    Attributes:
        images: in any form `features` takes.
        captions: one per image.
        text_model: a transformers language model, loaded, or its folder or Hub id.
        tokenizer: of a loaded one.
    """

    images: Sequence[Any]
    captions: Sequence[str]
    text_model: PreTrainedModel | str
    tokenizer: PreTrainedTokenizerBase | None = None


def alignment(
    examined: object,
    data: Captioned,
    *,
    k: int = NEIGHBOURS,
    projected: bool = False,
    batch_size: int = 32,
    **extraction: Any,
) -> ProbeResult:
    """Mutual k-nearest-neighbour alignment of an encoder with a text model.

    Vectors are means over patches and over tokens, outliers are clamped at the 0.95 quantile of magnitudes, then each
    vector is scaled to length one. Of the text model's layers the one with the highest overlap counts.

    Args:
        examined: as for `features`.
        data: images, captions and the text model.
        k: neighbours.
        projected: measure encoder and projector together.
        batch_size: captions at once.
        **extraction: options of `features`.

    Returns:
        "overlap", between 0 and 1; two unrelated models have k / (n - 1).

    Raises:
        DataError: if images and captions are not equally many, or not more than k.
    """
    check_captioned(data, k)
    subject = subjects.subject(examined)
    seen = features(subject, data.images, pool="mean", projected=projected, **extraction).pooled()
    overlaps = [mutual_knn(clamped(seen), clamped(layer), k) for layer in text_features(data, batch_size)]
    best = int(np.argmax([values.mean() for values in overlaps]))
    settings = {"pairs": len(data.images), "k": k, "text layer": best, "chance": k / (len(data.images) - 1)}
    return ProbeResult("alignment", {"overlap": score_of(overlaps[best])}, settings)


def check_captioned(data: Captioned, k: int) -> None:
    """Refuse images and captions that are not equally many, or not more than the neighbours asked for.

    Raises:
        DataError: saying so.
    """
    if len(data.images) != len(data.captions) or len(data.images) <= k:
        raise DataError(
            f"There are {len(data.images)} images and {len(data.captions)} captions for {k} neighbours.",
            "Give one caption per image, and more images than neighbours.",
        )


def mutual_knn(first: np.ndarray, second: np.ndarray, k: int) -> np.ndarray:
    """(n,) share of each row's k nearest neighbours, by cosine, that two sets of vectors have in common.

    Args:
        first, second: (n, D) vectors of the same n things; widths may differ.
        k: neighbours, fewer than n.

    Raises:
        SettingsError: for a k that cannot be.

    Source: Huh et al. 2024, section 2 and appendix A.
    """
    if len(first) != len(second) or not 1 <= k < len(first):
        raise SettingsError(f"k is {k} for {len(first)} and {len(second)} vectors.", "Give 1 <= k < n, equally many.")
    units = [torch.nn.functional.normalize(torch.from_numpy(values).float(), dim=1) for values in (first, second)]
    one, other = (nearest(unit @ unit.T, k) for unit in units)
    return np.array([len(set(a) & set(b)) / k for a, b in zip(one, other, strict=True)])


def clamped(vectors: np.ndarray) -> np.ndarray:
    """Vectors with magnitudes clamped at their 0.95 quantile, scaled to length one."""
    # the mean over rows of each row's quantile, as the published code has it
    limit = float(np.quantile(np.abs(vectors), OUTLIER_QUANTILE, axis=1).mean())
    return normalised(np.clip(vectors, -limit, limit))


def nearest(likeness: torch.Tensor, k: int) -> list[list[int]]:
    """For each row of (n, n) similarities the k most similar others, most similar first."""
    others = likeness.clone().fill_diagonal_(-torch.inf)
    found: list[list[int]] = others.topk(k, dim=1).indices.tolist()
    return found


@torch.no_grad()
def text_features(data: Captioned, batch_size: int) -> list[np.ndarray]:
    """Per layer of the text model, embeddings first, (n, D) mean token vectors of the captions.

    Args:
        data: captions and the text model.
        batch_size: captions at once.

    Raises:
        ModelError: if the text model cannot be loaded, or comes without its tokenizer.
    """
    model, tokenizer = data.text_model, data.tokenizer
    if isinstance(model, str):
        try:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            model = AutoModel.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"No text model could be loaded from {data.text_model!r}: {error}",
                "Give a folder or Hub id that transformers loads without code of its author, or a loaded model.",
            ) from error
    if tokenizer is None:
        raise ModelError("The text model comes without its tokenizer.", "Give tokenizer=.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    layers: list[list[np.ndarray]] = []
    for start in range(0, len(data.captions), batch_size):
        batch = list(data.captions[start : start + batch_size])
        inputs = tokenizer(batch, padding=True, return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        states = model(**inputs, output_hidden_states=True).hidden_states
        mask = inputs["attention_mask"][..., None].float()
        means = [((state.float() * mask).sum(dim=1) / mask.sum(dim=1)).cpu().numpy() for state in states]
        layers = layers or [[] for _ in means]
        for layer, values in zip(layers, means, strict=True):
            layer.append(values)
    return [np.concatenate(layer) for layer in layers]
