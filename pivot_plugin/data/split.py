"""The held-out share: pairs that training never sees, and no image on both sides, whatever was made of it."""

import logging
import random
from collections import defaultdict
from typing import TypeVar

from .rows import RowDataset

logger = logging.getLogger(__name__)

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
        Pairs to train on, and pairs held out (None where fraction is 0, there is but one image, or all hang together by
        their images and rejected images).
    """
    wanted = min(max(round(len(pairs) * fraction), SMALLEST), LARGEST, int(len(pairs) * LARGEST_SHARE))
    by_image: dict[str, list[int]] = defaultdict(list)
    linked = _linked(pairs)
    for position, key in enumerate(pairs.picture_keys.tolist()):
        # pairs without an image have nothing in common
        by_image[linked.get(key, key).decode() or f"text-{position}"].append(position)
    if fraction <= 0 or wanted < 1 or (len(by_image) < 2 and not linked):
        return pairs, None
    images = sorted(by_image)
    random.Random(seed).shuffle(images)
    held: list[int] = []
    for image in images[:-1]:
        if len(held) >= wanted:
            break
        # of many that hang together none can be held out
        if not linked or len(by_image[image]) <= LARGEST_SHARE * len(pairs):
            held += by_image[image]
    if not held:
        logger.warning(
            "Nothing is held out: the pairs of %s share pictures, as images or as rejected images, so that no few of "
            "them can be parted from the others. Give eval_prefs.",
            pairs.name,
        )
        return pairs, None
    out = set(held)
    return pairs.select([i for i in range(len(pairs)) if i not in out]), pairs.select(sorted(out))  # type: ignore[return-value]


def _linked(pairs: RowDataset) -> dict[bytes, bytes]:
    """For each image set one that stands for all that hang together by pairs, as images and as rejected images.

    Empty where no row has rejected images.
    """
    rejected_keys = pairs.rejected_image_keys
    if not any(rejected_keys):
        return {}
    parent: dict[bytes, bytes] = {}

    def root(key: bytes) -> bytes:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for key, rejected in zip(pairs.picture_keys.tolist(), rejected_keys.tolist(), strict=True):
        if key and rejected:
            first, second = sorted((root(key), root(rejected)))
            parent[second] = first
    return {key: root(key) for key in list(parent)}
