"""Images with labels and images with masks: from datasets, folders and the Hub, in splits that do not overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from pivot_plugin.errors import DataError, SettingsError

TEST_SPLITS = ("test", "validation", "val", "eval")


@dataclass(frozen=True)
class Preset:
    """A published data set and how a protocol uses it.

    Attributes:
        repo: Hub id.
        train, test: splits to fit on and to score on.
        image: column with the images.
        target: column with labels or masks.
        per_class: images of each class to fit on, drawn at random; None takes all.
        classes: of masks.
        ignore: value of a mask that is no class.
        source: of the protocol.
    """

    repo: str
    train: str
    test: str
    image: str
    target: str
    source: str
    per_class: int | None = None
    classes: int | None = None
    ignore: int | None = None


PRESETS = {
    "imagenet-1k": Preset(
        *("ILSVRC/imagenet-1k", "train", "validation", "image", "label"),
        source="arXiv 2510.16333, appendix E.3: 50 images per class to fit on, the whole validation set to score on",
        per_class=50,
    ),
    "ade20k": Preset(
        *("zhoubolei/scene_parse_150", "train", "validation", "image", "annotation"),
        source="arXiv 2510.16333, appendix E.5, after Covert et al. 2025",
        classes=151,
        ignore=0,
    ),
}


class Column(Sequence[Any]):
    """A column of a data set, read row by row; images stay encoded."""

    def __init__(self, table: datasets.Dataset, name: str, rows: np.ndarray) -> None:
        self._table, self._name, self._rows = table, name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return Column(self._table, self._name, self._rows[position])
        return self._table[int(self._rows[position])][self._name]


@dataclass(frozen=True)
class Labelled:
    """Images with one class each.

    Attributes:
        images: in any form `features` takes.
        labels: (images,) integers from 0.
        names: of the classes.
    """

    images: Sequence[Any]
    labels: np.ndarray
    names: tuple[str, ...]

    def select(self, positions: np.ndarray) -> "Labelled":
        """The images at some positions."""
        return Labelled(_picked(self.images, positions), self.labels[positions], self.names)


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
        return Masked(_picked(self.images, positions), _picked(self.masks, positions))


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
    splits, name = _splits(source, preset, "labelled images")
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
    splits, name = _splits(source, preset, "images with masks")
    columns = next(iter(splits.values())).column_names
    image = image or (preset.image if preset else None) or ("image" if "image" in columns else None)
    mask = mask or (preset.target if preset else None)
    mask = mask or next((c for c in ("mask", "annotation", "label", "segmentation") if c in columns), None)
    if image is None or mask is None or not {image, mask} <= set(columns):
        raise DataError(
            f"{name} has the columns {', '.join(columns)}; which hold images and masks is not known.",
            "Name them by image= and mask=.",
        )
    parts = []
    for table in splits.values():
        rows = np.arange(len(table))
        raw = table.cast_column(image, datasets.Image(decode=False)) if _is_image(table, image) else table
        images = Column(raw.select_columns([image]), image, rows)
        parts.append(Masked(images, Column(table.select_columns([mask]), mask, rows)))
    if len(parts) == 2:
        return parts[0], parts[1]
    count = len(parts[0].images)
    if count < 2:
        raise DataError(f"{name} has {count} image(s).", "Give at least two: one to fit on, one to score on.")
    order = np.random.default_rng(seed).permutation(count)
    cut = max(1, round(test_share * count))
    return parts[0].select(np.sort(order[cut:])), parts[0].select(np.sort(order[:cut]))


def stratified(
    labels: np.ndarray, share: float, seed: int, names: Sequence[str], where: str, smallest: int = 2
) -> np.ndarray:
    """(n,) which rows go to the smaller of two sets, the same share of every class and at least one of each.

    Args:
        labels: (n,) classes.
        share: of the smaller set.
        seed: of the draw.
        names: of the classes.
        where: names the data in errors.
        smallest: images a class needs.

    Raises:
        DataError: naming a class with fewer.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for value in np.unique(labels):
        rows = np.flatnonzero(labels == value)
        if len(rows) < smallest:
            raise DataError(
                f"Class {names[value]!r} of {where} has {len(rows)} image(s); at least {smallest} are needed to fit, "
                "to choose the regularisation and to score.",
                "Add images of it, leave the class out, or give splits of your own.",
            )
        chosen[rng.permutation(rows)[: max(1, round(share * len(rows)))]] = True
    return chosen


def per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of up to `count` rows of every class, drawn at random, in order."""
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(labels == value))[:count] for value in np.unique(labels)]
    return np.sort(np.concatenate(drawn))


def _picked(values: Sequence[Any], positions: np.ndarray) -> Sequence[Any]:
    if isinstance(values, Column):
        return Column(values._table, values._name, values._rows[positions])
    return [values[int(position)] for position in positions]


def _splits(source: object, preset: Preset | None, what: str) -> tuple[dict[str, datasets.Dataset], str]:
    """One split, or the one to fit on and the one to score on."""
    name = preset.repo if preset else str(source) if isinstance(source, str | Path) else what
    loaded = source
    if isinstance(source, str | Path):
        try:
            folder = Path(source)
            if not preset and folder.is_dir():
                kind = any(folder.glob("*.parquet")) or any(folder.glob("**/*.parquet"))
                saved = (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()
                loaded = (
                    datasets.load_from_disk(str(folder))
                    if saved
                    else datasets.load_dataset("parquet" if kind else "imagefolder", data_dir=str(folder))
                )
            else:
                loaded = datasets.load_dataset(name)
        # what a hub and a file system can answer is not one family of errors
        except Exception as error:
            raise DataError(
                f"{name!r} cannot be read as {what}: {type(error).__name__}: {error}",
                "Give a folder per class, a datasets.Dataset, or a Hub id (gated ones need `hf auth login`).",
            ) from error
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    if not isinstance(loaded, dict) or not loaded:
        raise DataError(
            f"{what} are given as a {type(source).__name__}.",
            "Give a datasets.Dataset or DatasetDict, a folder, a Hub id or a preset: " + ", ".join(PRESETS) + ".",
        )
    first = preset.train if preset else "train" if "train" in loaded else next(iter(loaded))
    second = preset.test if preset else next((s for s in TEST_SPLITS if s in loaded and s != first), None)
    if first not in loaded or (preset and second not in loaded):
        raise DataError(f"{name} has the splits {', '.join(loaded)}, not {first} and {second}.", "Give another source.")
    chosen = {first: loaded[first]} | ({second: loaded[second]} if second else {})
    if empty := [split for split, table in chosen.items() if not len(table)]:
        raise DataError(f"Split {empty[0]!r} of {name} is empty.", "Give at least one image.")
    return chosen, name


def _is_image(table: datasets.Dataset, column: str) -> bool:
    return isinstance(table.features[column], datasets.Image)


def _column(splits: dict[str, datasets.Dataset], kind: Any, name: str, option: Literal["image", "label"]) -> str:
    features = next(iter(splits.values())).features
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1 and option in features:
        return option
    if len(found) != 1:
        raise DataError(
            f"{name} has {len(found)} columns of {kind.__name__} among {', '.join(features)}.",
            f"Name the one to use by {option}=.",
        )
    return found[0]


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
    raw = table.cast_column(image, datasets.Image(decode=False)) if _is_image(table, image) else table
    images = Column(raw.select_columns([image]), image, np.arange(len(table)))
    return Labelled(images, labels, names or tuple(map(str, range(highest))))


def check_share(share: float) -> None:
    """Refuse a share that leaves one side empty."""
    if not 0 < share < 1:
        raise SettingsError(f"A share is {share}.", "Give one above 0 and below 1.")
