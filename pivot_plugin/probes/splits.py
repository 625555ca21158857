"""Splits to fit on and to score on: opened from where the data is, as a protocol names them, or drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
        repo="ILSVRC/imagenet-1k",
        train="train",
        test="validation",
        image="image",
        target="label",
        source="arXiv 2510.16333, appendix E.3: 50 images per class to fit on, the whole validation set to score on",
        per_class=50,
    ),
    "ade20k": Preset(
        repo="zhoubolei/scene_parse_150",
        train="train",
        test="validation",
        image="image",
        target="annotation",
        source="arXiv 2510.16333, appendix E.5, after Covert et al. 2025",
        classes=151,
        ignore=0,
    ),
}


def open_splits(source: object, preset: Preset | None, what: str) -> tuple[dict[str, datasets.Dataset], str]:
    """One split, or the one to fit on and the one to score on, by their names; and what the data is called in errors.

    Args:
        source: a Hub id, a folder, or loaded data.
        preset: how a protocol uses it.
        what: the data holds, for errors.

    Raises:
        DataError: if it cannot be read, or a split is missing or empty.
    """
    name = preset.repo if preset else str(source) if isinstance(source, str | Path) else what
    loaded = source
    if isinstance(source, str | Path):
        try:
            folder = Path(source)
            if not preset and folder.is_dir():
                builder = "parquet" if any(folder.glob("**/*.parquet")) else "imagefolder"
                saved = (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()
                loaded = (
                    datasets.load_from_disk(str(folder))
                    if saved
                    else datasets.load_dataset(builder, data_dir=str(folder))
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
    positions = [rng.permutation(np.flatnonzero(labels == value))[:count] for value in np.unique(labels)]
    return np.sort(np.concatenate(positions))


def check_share(share: float) -> None:
    """Refuse a share that leaves one side empty."""
    if not 0 < share < 1:
        raise SettingsError(f"A share is {share}.", "Give one above 0 and below 1.")
