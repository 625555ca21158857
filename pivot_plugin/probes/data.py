"""Images with a class each, or a class per pixel: from data sets, folders and the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np

from pivot_plugin.errors import DataError

from .splits import PRESETS, open_splits, per_class, stratified


@dataclass(frozen=True)
class Labelled:
    """Images with one class each.

    Attributes:
        images: in any form `features` takes.
        labels: (n,) integers from 0.
        names: of the classes.
    """

    images: Sequence[Any]
    labels: np.ndarray
    names: tuple[str, ...]

    def select(self, positions: np.ndarray) -> "Labelled":
        """The images at some positions."""
        return Labelled(_at(self.images, positions), self.labels[positions], self.names)


@dataclass(frozen=True)
class Masked:
    """Images with a class per pixel.

    Attributes:
        images: in any form `features` takes.
        masks: PIL images or arrays of integers, of the size of their image.
    """

    images: Sequence[Any]
    masks: Sequence[Any]

    def select(self, positions: np.ndarray) -> "Masked":
        """The images at some positions."""
        return Masked(_at(self.images, positions), _at(self.masks, positions))


def labelled_images(
    source: object, image: str | None = None, label: str | None = None, test_share: float = 0.2, seed: int = 0
) -> tuple[Labelled, Labelled]:
    """Images with labels to fit on, and others to score on.

    Args:
        source: a preset ("imagenet-1k"), a Hub id, a folder with a folder per class (below `train` and `test` where it
            is split already), a `datasets.Dataset` or `DatasetDict` with features Image and ClassLabel, or a pair of
            `Labelled`.
        image, label: columns; found by their features where None.
        test_share: to score on, of each class, where the source has one split.
        seed: of that draw, and of a preset's.

    Raises:
        DataError: if the source cannot be read, a label is out of range, or a class has too few images.
    """
    if isinstance(source, tuple) and len(source) == 2 and all(isinstance(part, Labelled) for part in source):
        return source
    preset = PRESETS.get(source) if isinstance(source, str) else None
    splits, name = open_splits(source, preset, "labelled images")
    image = image or (preset.image if preset else None) or _column(splits, datasets.Image, name, "image")
    label = label or (preset.target if preset else None) or _column(splits, datasets.ClassLabel, name, "label")
    parts = [_labelled(table, image, label, f"{name} ({split})") for split, table in splits.items()]
    if len(parts) == 2:
        fitting, scoring = parts
    else:
        chosen = stratified(parts[0].labels, test_share, seed, parts[0].names, name, smallest=3)
        fitting, scoring = parts[0].select(np.flatnonzero(~chosen)), parts[0].select(np.flatnonzero(chosen))
    if preset and preset.per_class:
        fitting = fitting.select(per_class(fitting.labels, preset.per_class, seed))
    return fitting, scoring


def masked_images(
    source: object, image: str | None = None, mask: str | None = None, test_share: float = 0.2, seed: int = 0
) -> tuple[Masked, Masked]:
    """Images with masks to fit on, and others to score on.

    Args:
        source: a preset ("ade20k"), a Hub id, a `datasets.Dataset` or `DatasetDict` with two image columns, or a pair
            of `Masked`.
        image, mask: columns; where None "image", and "mask", "annotation", "label" or "segmentation".
        test_share: to score on where the source has one split.
        seed: of that draw.

    Raises:
        DataError: if the source cannot be read, or has too few images.
    """
    if isinstance(source, tuple) and len(source) == 2 and all(isinstance(part, Masked) for part in source):
        return source
    preset = PRESETS.get(source) if isinstance(source, str) else None
    splits, name = open_splits(source, preset, "images with masks")
    columns = next(iter(splits.values())).column_names
    image = image or (preset.image if preset else None) or ("image" if "image" in columns else None)
    mask = mask or (preset.target if preset else None)
    mask = mask or next((c for c in ("mask", "annotation", "label", "segmentation") if c in columns), None)
    if image is None or mask is None or not {image, mask} <= set(columns):
        raise DataError(
            f"{name} has the columns {', '.join(columns)}; which hold images and masks is not known.",
            "Name them by image= and mask=.",
        )
    parts = [Masked(_encoded(table, image), table[mask]) for table in splits.values()]
    if len(parts) == 2:
        return parts[0], parts[1]
    count = len(parts[0].images)
    if count < 2:
        raise DataError(f"{name} has {count} image(s).", "Give at least two: one to fit on, one to score on.")
    order = np.random.default_rng(seed).permutation(count)
    cut = max(1, round(test_share * count))
    return parts[0].select(np.sort(order[cut:])), parts[0].select(np.sort(order[:cut]))


def _at(values: Sequence[Any], positions: np.ndarray) -> Sequence[Any]:
    """The values at some positions; a column of a data set stays one, read row by row."""
    if isinstance(values, datasets.Column):
        column: Sequence[Any] = values.source.select(positions)[values.column_name]
        return column
    return [values[int(position)] for position in positions]


def _encoded(table: datasets.Dataset, image: str) -> Sequence[Any]:
    """A column of images as they are stored, to be decoded in workers."""
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    column: Sequence[Any] = table[image]
    return column


def _column(splits: dict[str, datasets.Dataset], feature_cls: Any, name: str, option: Literal["image", "label"]) -> str:
    features = next(iter(splits.values())).features
    columns = [column for column, feature in features.items() if isinstance(feature, feature_cls)]
    if len(columns) != 1 and option in features:
        return option
    if len(columns) != 1:
        raise DataError(
            f"{name} has {len(columns)} columns of {feature_cls.__name__} among {', '.join(features)}.",
            f"Name the one to use by {option}=.",
        )
    return columns[0]


def _labelled(table: datasets.Dataset, image: str, label: str, where: str) -> Labelled:
    for column in (image, label):
        if column not in table.column_names:
            raise DataError(f"{where} has no column {column!r}.", f"It has {', '.join(table.column_names)}.")
    labels = np.asarray(table[label])
    feature = table.features[label]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
    if labels.dtype.kind in "US":
        raise DataError(f"{where}: labels are text.", "Cast them: dataset.class_encode_column(...).")
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: a label is missing or no integer.", "Give one integer per image.")
    highest = len(names) if names else int(labels.max()) + 1
    if bad := np.flatnonzero((labels < 0) | (labels >= highest)).tolist():
        raise DataError(
            f"Row {bad[0]} of {where}: label {labels[bad[0]]} is out of range, there are classes 0 to {highest - 1}; "
            f"so in {len(bad)} row(s).",
            "Mend the labels, or use a split that has them (the test split of many data sets has none).",
        )
    return Labelled(_encoded(table, image), labels, names or tuple(map(str, range(highest))))
