"""Images whose classes and masks are known: a coloured half plane."""

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

COLOURS = ((230, 30, 30), (30, 200, 40), (40, 60, 230))


def coloured(label: int, seed: int, size: int = 56) -> Image.Image:
    """A noisy picture of one colour."""
    noise = np.random.default_rng(seed).normal(0, 12, (size, size, 3))
    return Image.fromarray((np.array(COLOURS[label]) + noise).clip(0, 255).astype(np.uint8))


def halves(first: int, second: int, seed: int, size: int = 56) -> tuple[Image.Image, Image.Image]:
    """A picture whose left and right half have two colours, and the mask that says so."""
    image, mask = coloured(first, seed, size), Image.new("L", (size, size), first)
    box = (size // 2, 0, size, size)
    image.paste(coloured(second, seed + 1, size).crop(box), box)
    mask.paste(second, box)
    return image, mask


@pytest.fixture
def labelled() -> Callable[..., datasets.Dataset]:
    """A data set with features Image and ClassLabel."""

    def build(per_class: int = 10, classes: int = 3, shuffled: bool = False, seed: int = 0) -> datasets.Dataset:
        labels = [label for label in range(classes) for _ in range(per_class)]
        images = [coloured(label, seed + index) for index, label in enumerate(labels)]
        given = np.random.default_rng(seed).permutation(labels).tolist() if shuffled else labels
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green", "blue"][:classes])}
        )
        return datasets.Dataset.from_dict({"image": images, "label": given}, features=features)

    return build


@pytest.fixture
def masked() -> Callable[..., datasets.Dataset]:
    """A data set with images and masks of two classes each."""

    def build(count: int = 12, seed: int = 0) -> datasets.Dataset:
        rng = np.random.default_rng(seed)
        rows: list[Any] = [halves(*rng.permutation(3)[:2].tolist(), seed=seed + 2 * i) for i in range(count)]
        features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
        columns = {"image": [image for image, _ in rows], "annotation": [mask for _, mask in rows]}
        return datasets.Dataset.from_dict(columns, features=features)

    return build
