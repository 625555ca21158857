"""What a picture tells without being looked at: a few numbers of its pixels, and what can be told apart by them.

A rejected picture that is made by a crop or a black patch differs from a true one in its size, its edges and its
evenness. A model then learns to tell natural pictures from unnatural ones, and not what they show (arXiv 2502.13928,
section 1). Pictures that a linear classifier of these numbers tells apart on rows it was not fitted on are such ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from PIL import Image

PixelStatistics = tuple[float, ...]
# the pixels of a picture's longer side that are looked at
LOOKED_AT = 128
FOLDS = 5
RIDGE = 1e-3
# of pairs, below which nothing is said
FEWEST = 40
LEVEL = 0.95


def pixel_statistics(image: Image.Image) -> PixelStatistics:
    """Numbers of a picture that say nothing of what it shows.

    Args:
        image: RGB.

    Returns:
        logarithms of width, height and their ratio; mean, spread and edge energy (mean absolute difference of
        neighbours) of its brightness, the latter also at the picture's own size; how far the strongest straight line
        across it stands out; the share of pixels in its most frequent grey, and the share of exact black.
    """
    width, height = image.size
    own = np.asarray(image.convert("L"), dtype=np.float32)
    scale = LOOKED_AT / max(width, height)
    small = image.resize((max(2, round(width * scale)), max(2, round(height * scale))), Image.Resampling.BILINEAR)
    grey = np.asarray(small.convert("L"), dtype=np.float32)
    across, down = np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=0))
    lines = [edges.mean(axis=axis) for edges, axis in ((across, 0), (down, 1))]
    strongest = max(float(line.max() / (line.mean() + 1.0)) for line in lines)
    counts = np.bincount(own.astype(np.int64).ravel(), minlength=256)
    return (
        float(np.log(width)),
        float(np.log(height)),
        float(np.log(width / height)),
        float(grey.mean()),
        float(grey.std()),
        float((across.mean() + down.mean()) / 2),
        float((np.abs(np.diff(own, axis=1)).mean() + np.abs(np.diff(own, axis=0)).mean()) / 2),
        strongest,
        float(counts.max() / own.size),
        float(counts[0] / own.size),
    )


@dataclass(frozen=True)
class ToldApart:
    """How well pictures are told from those rejected for them by their pixel statistics alone.

    Attributes:
        pairs: of pictures.
        share: of the pictures of held-out pairs that are called what they are; 0.5 by chance.
        low, high: its 95 % interval.
    """

    pairs: int
    share: float
    low: float
    high: float

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval lies above one half."""
        return self.low > 0.5


def told_apart(pairs: Sequence[tuple[PixelStatistics, PixelStatistics]], seed: int = 0) -> ToldApart | None:
    """Fit a linear classifier of single pictures, true or rejected, on four fifths of the pairs, and score the last.

    Each picture is judged by itself: that of the two one is larger is no help, as it is none to a model.

    Args:
        pairs: statistics of a picture and of the one rejected for it.
        seed: of the folds.

    Returns:
        the share over all folds, with Wilson's interval over pairs; None for fewer than 40 pairs.
    """
    if len(pairs) < FEWEST:
        return None
    values = np.asarray(pairs, dtype=np.float64)
    # numbers and their squares, so that unusual ones on either side show
    flat = values.reshape(-1, values.shape[-1])
    spread = flat.std(axis=0)
    scaled = (values - flat.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    features = np.concatenate([scaled, scaled**2, np.ones((*scaled.shape[:2], 1))], axis=-1)
    fold = np.random.default_rng(seed).permutation(len(pairs)) % FOLDS
    right = np.zeros((len(pairs), 2))
    sign = np.array([1.0, -1.0])
    for number in range(FOLDS):
        fitted, scored = features[fold != number], features[fold == number]
        rows = fitted.reshape(-1, features.shape[-1])
        weights = np.linalg.solve(
            rows.T @ rows + RIDGE * len(rows) * np.eye(rows.shape[1]), rows.T @ np.tile(sign, len(fitted))
        )
        right[fold == number] = (scored @ weights) * sign > 0
    # the two of a pair are not independent, so that pairs are counted
    share, count = float(right.mean()), len(pairs)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return ToldApart(count, share, middle - half, middle + half)
