"""The held-out share: pairs that training never sees, and no image on both sides, whatever was made of it."""

import random
from collections import defaultdict
from typing import TypeVar

from .rows import RowDataset

Rows = TypeVar("Rows", bound=RowDataset)
SMALLEST, LARGEST = 32, 1000
LARGEST_SHARE = 0.25


def hold_out(pairs: Rows, fraction: float, seed: int) -> tuple[Rows, Rows | None]:
    """Split pairs into those to train on and those held out, image by image.

    Args:
        pairs: all of them; questions and conversations are split in the same way.
        fraction: share to hold out; at least 32 and at most 1000 pairs are, but never more than a quarter of them.
            0 holds nothing out.
        seed: the same seed gives the same split.

    Returns:
        Pairs to train on, and pairs held out (None where fraction is 0 or there is but one image).
    """
    wanted = min(max(round(len(pairs) * fraction), SMALLEST), LARGEST, int(len(pairs) * LARGEST_SHARE))
    by_image: dict[str, list[int]] = defaultdict(list)
    for position, key in enumerate(pairs.picture_keys):
        # pairs without an image have nothing in common
        by_image[key.decode() or f"text-{position}"].append(position)
    if fraction <= 0 or wanted < 1 or len(by_image) < 2:
        return pairs, None
    images = sorted(by_image)
    random.Random(seed).shuffle(images)
    held: list[int] = []
    for image in images[:-1]:
        if len(held) >= wanted:
            break
        held += by_image[image]
    out = set(held)
    return pairs.select([i for i in range(len(pairs)) if i not in out]), pairs.select(sorted(out))  # type: ignore[return-value]
