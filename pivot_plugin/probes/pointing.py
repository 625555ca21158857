"""Maps over patches, held against masks over pixels: how much of a map lies on the object, and where it points."""

import math
from typing import Any

import numpy as np
from PIL import Image

from pivot_plugin.errors import DataError


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
    if not (0 <= across <= 1 and 0 <= down <= 1):
        # on the border that the image processor put around the image
        return 0.0
    return float(full[min(int(down * height), height - 1), min(int(across * width), width - 1)])


def mask_shares(
    mask: Any,
    grid: tuple[int, int],
    box: tuple[float, float, float, float],
    image_size: tuple[int, int],
    where: str,
) -> np.ndarray:
    """(rows, columns) which share of each patch a mask covers.

    Args:
        mask: (height, width), not zero inside.
        grid: rows and columns of patches.
        box: the part of the image that they cover, as shares of width and height; it may reach beyond the image.
        image_size: (width, height) of the image.
        where: names the pair in errors.

    Raises:
        DataError: if the mask has another size than the image.
    """
    full = _boolean(mask)
    width, height = image_size
    if (full.shape[1], full.shape[0]) != image_size:
        raise DataError(
            f"The mask of {where} is {full.shape[1]} x {full.shape[0]}, its image {width} x {height}.",
            "Scale the mask to its image.",
        )
    left, top, right, bottom = box
    pixels = (left * width, top * height, right * width, bottom * height)
    # nothing of a mask lies on the border that an image processor may put around the image
    before = [max(0, math.ceil(-edge)) for edge in pixels[:2]]
    after = [max(0, math.ceil(edge - count)) for edge, count in zip(pixels[2:], image_size, strict=True)]
    canvas = np.pad(full.astype(np.float32), ((before[1], after[1]), (before[0], after[0])))
    shifted = (pixels[0] + before[0], pixels[1] + before[1], pixels[2] + before[0], pixels[3] + before[1])
    scaled = Image.fromarray(canvas).resize(grid[::-1], Image.Resampling.BOX, box=shifted)
    return np.asarray(scaled, dtype=np.float64)


def _boolean(mask: Any) -> np.ndarray:
    values = np.asarray(mask)
    if values.ndim != 2:
        raise DataError(f"A mask has shape {values.shape}.", "Give (height, width), not zero inside.")
    return values != 0
