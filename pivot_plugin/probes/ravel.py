"""RAVEL: do images that an encoder finds alike have captions that a language model finds alike, patch by patch?

A relative of `alignment` that ranks encoders for a language model without training one (arXiv 2610.05413): both sides
are whitened, so that no few directions decide what is near, and images are compared as sets of patches, so that nothing
is lost in a mean.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pivot_plugin.errors import DataError, SettingsError

from . import subjects
from .extraction import features
from .neighbours import Captioned, check_captioned, nearest, text_features
from .scores import ProbeResult, score_of

logger = logging.getLogger(__name__)

# arXiv 2610.05413
NEIGHBOURS = 100
STABILISER, SMALLEST_VARIANCE = 1e-4, 1e-10
# images compared with one image at a time, which bounds memory
IMAGES_AT_ONCE = 32


def ravel(
    examined: object,
    data: Captioned,
    *,
    k: int = NEIGHBOURS,
    projected: bool = False,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    **extraction: Any,
) -> ProbeResult:
    """Overlap of nearest neighbours between images, as whitened sets of patches, and their captions.

    Captions are means over the tokens of the language model's last layer. The paper has 1,000 pairs of LLaVA-558K, 100
    neighbours, and the language model that the encoder is meant for.

    Args:
        examined: as for `features`.
        data: images, captions and the language model.
        k: neighbours.
        projected: measure encoder and projector together.
        batch_size: captions at once.
        device: to compare patches on; by default a GPU where there is one.
        **extraction: options of `features`.

    Returns:
        "overlap", between 0 and 1; two unrelated models have k / (n - 1).

    Raises:
        DataError: if images and captions are not equally many, or not more than k.

    Source:
        arXiv 2610.05413, the score; written from its formulas.
    """
    check_captioned(data, k)
    subject = subjects.subject(examined)
    seen = features(subject, data.images, projected=projected, **extraction)
    # the layers of a text model come first to last
    texts = text_features(data, batch_size)[-1]
    if len(texts) <= texts.shape[1]:
        logger.warning(
            "%d captions of %d dimensions: whitened, all are nearly equally far from each other, and their neighbours "
            "say little. Give more pairs than the language model is wide.",
            *texts.shape,
        )
    patches = [seen.patches(image).float().numpy() for image in range(len(seen))]
    overlaps, ranks = patch_overlap(patches, texts, k, device)
    settings = {
        "pairs": len(data.images),
        "k": k,
        "chance": k / (len(data.images) - 1),
        "rank of patches": ranks[0],
        "rank of captions": ranks[1],
    }
    return ProbeResult("ravel", {"overlap": score_of(overlaps)}, settings)


def patch_overlap(
    patches: Sequence[np.ndarray], texts: np.ndarray, k: int, device: str | torch.device | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """(n,) share of the k nearest neighbours that images and texts have in common, and the ranks of both.

    Args:
        patches: per image (P, D) features; images may differ in P.
        texts: (n, E), a vector for each image.
        k: neighbours, fewer than n.
        device: to compare patches on.

    Raises:
        SettingsError: for a k that cannot be.
        DataError: for features without any variance.
    """
    if len(patches) != len(texts) or not 1 <= k < len(texts):
        raise SettingsError(
            f"k is {k} for {len(patches)} images and {len(texts)} texts.", "Give 1 <= k < n, equally many."
        )
    white_texts = Whitening(texts)
    whitening = Whitening(np.concatenate(patches))
    run_on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sets = [torch.from_numpy(whitening(one)).float().to(run_on) for one in patches]
    vectors = torch.from_numpy(white_texts(texts)).float()
    of_images, of_texts = nearest(chamfer(sets).cpu(), k), nearest(vectors @ vectors.T, k)
    shares = [len(set(a) & set(b)) / k for a, b in zip(of_images, of_texts, strict=True)]
    return np.array(shares), (whitening.rank, white_texts.rank)


class Whitening:
    """Principal components of full rank, each divided by its spread; vectors then have length one.

    Args:
        vectors: (m, D) to learn it from.

    Attributes:
        rank: components with variance.

    Raises:
        DataError: if there are none.
    """

    def __init__(self, vectors: np.ndarray) -> None:
        self._mean = vectors.mean(axis=0, dtype=np.float64)
        centred = vectors - self._mean
        variances, components = np.linalg.eigh(centred.T @ centred / max(len(vectors) - 1, 1))
        # of m vectors no more than m - 1 directions are known, whatever rounding leaves in the others
        known = np.argsort(variances)[::-1][: min(len(vectors) - 1, vectors.shape[1])]
        known = known[variances[known] > SMALLEST_VARIANCE]
        if not len(known):
            raise DataError("All features are equal, so that nothing is nearer than anything else.", "Check the data.")
        self.rank = len(known)
        # without the stabiliser directions of hardly any variance, which are noise, would weigh like all others
        self._components = components[:, known] / np.sqrt(variances[known] + STABILISER)

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(m, rank) whitened vectors of length one; one that lies at the mean stays zero."""
        white = (vectors - self._mean) @ self._components
        return white / np.maximum(np.linalg.norm(white, axis=1, keepdims=True), 1e-12)


def chamfer(sets: Sequence[torch.Tensor]) -> torch.Tensor:
    """(n, n) symmetric Chamfer similarity: of each patch that of its best counterpart, averaged over both images.

    Args:
        sets: per image (P, D) vectors of length one.
    """
    one_way = torch.zeros(len(sets), len(sets), device=sets[0].device)
    for start in range(0, len(sets), IMAGES_AT_ONCE):
        others = sets[start : start + IMAGES_AT_ONCE]
        together, lengths = torch.cat(list(others)), [len(other) for other in others]
        for index, patches in enumerate(sets):
            best = [of_image.amax(dim=1).mean() for of_image in (patches @ together.T).split(lengths, dim=1)]
            one_way[index, start : start + len(others)] = torch.stack(best)
    return (one_way + one_way.T) / 2
