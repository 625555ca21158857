"""Rows without their pictures: the control that tells whether an answer was seen or said.

Pictures are replaced and not left out, by others of the same size, so that a model reads as many tokens in the same
places and only what they show is gone.
"""

import random
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from pivot_plugin.errors import DataError, SettingsError

from .rows import RowDataset

# another row's picture, or the picture's own mean colour
Without = Literal["other", "mean"]


class WithoutPicture:
    """Rows whose pictures are replaced. Rows without pictures are as they were; rejected pictures are left out.

    Args:
        rows: with their pictures.
        how: "other" takes the pictures of another row, drawn once; "mean" the mean colour of each.
        seed: of the drawing.

    Raises:
        DataError: for "other", where all rows show the same.
        SettingsError: for another word.
    """

    def __init__(self, rows: RowDataset, how: Without, seed: int = 0) -> None:
        if how not in get_args(Without):
            raise SettingsError(f"A picture cannot be replaced by {how!r}.", "Choose 'other' or 'mean'.")
        self._rows = rows
        self._how = how
        self._other = _others(rows, seed) if how == "other" else {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = without_rejected(self._rows[position])
        if not row["images"]:
            return row
        # rows that show the same images go on doing so, and may go on sharing them
        key = f"{row['image_key']} without"
        if self._how == "mean":
            return row | {"images": [_mean_colour(image) for image in row["images"]], "image_key": key}
        taken = self._rows[self._other[row["image_key"].encode()]]["images"]
        shown = [taken[number % len(taken)].resize(image.size) for number, image in enumerate(row["images"])]
        return row | {"images": shown, "image_key": key}


def without_rejected(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose rejected answer is about its images too."""
    return {name: value for name, value in row.items() if not name.startswith("rejected_image")}


def _mean_colour(image: Image.Image) -> Image.Image:
    mean = np.asarray(image, dtype=np.float64).reshape(-1, 3).mean(axis=0)
    red, green, blue = (round(float(value)) for value in mean)
    return Image.new("RGB", image.size, (red, green, blue))


def _others(rows: RowDataset, seed: int) -> dict[bytes, int]:
    """For each set of images a row that shows another: the next one of a shuffled circle."""
    first: dict[bytes, int] = {}
    for position, key in enumerate(rows.image_keys.tolist()):
        if key:
            first.setdefault(key, position)
    if len(first) < 2:
        raise DataError(
            f"The rows of {rows.name} show no two different pictures, so that none can be taken for another.",
            "Give rows about several pictures, or replace pictures by their mean colour alone.",
        )
    circle = sorted(first)
    random.Random(seed).shuffle(circle)
    return {key: first[following] for key, following in zip(circle, circle[1:] + circle[:1], strict=True)}
