"""Preference pairs as data sets: a checked one with random access, and a stream that is checked as it passes."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Image, IterableDataset, List
from tqdm.auto import tqdm

from pivot_plugin.errors import DataError

from .images import image_key, open_image
from .layout import find_layout, normalise


class PairDataset:
    """Preference pairs with random access. Images stay encoded until a pair is read.

    Args:
        rows: pairs in one of TRL's layouts, or in a layout that a plugin knows.
        folder: what relative image paths start from.
        name: of the data, for errors.

    Raises:
        DataError: naming the first row that cannot be used, before anything expensive.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]] | Dataset, folder: Path | None = None, name: str = "prefs"
    ) -> None:
        if len(rows) == 0:
            raise DataError(f"{name} has no pairs.", "Give at least one pair with images, prompt, chosen, rejected.")
        self._rows = _undecoded(rows) if isinstance(rows, Dataset) else rows
        self._folder = folder
        self._name = name
        first = self._rows[0]
        if not isinstance(first, Mapping):
            raise DataError(f"row 0 of {name} is a {type(first).__name__}.", "Give rows as dicts.")
        self._layout = find_layout(list(first), first)
        self.image_keys: list[str] = []
        self._indices = list(range(len(rows)))
        for index in tqdm(self._indices, desc="checking pairs", disable=len(rows) < 1000, leave=False):
            pair = self._pair(index)
            # decoding once here is what finds a truncated file before training does
            for source in pair["images"]:
                open_image(source, folder, self._where(index))
            self.image_keys.append(image_key(pair["images"], folder, self._where(index)))

    def _where(self, index: int) -> str:
        return f"row {index} of {self._name}"

    def _pair(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        where = self._where(index)
        if not isinstance(row, Mapping):
            raise DataError(f"{where} is a {type(row).__name__}.", "Give rows as dicts.")
        return normalise(self._layout(row) if self._layout else row, where)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self._indices[position]
        pair = self._pair(index)
        pair["images"] = [open_image(source, self._folder, self._where(index)) for source in pair["images"]]
        pair["image_key"] = self.image_keys[position]
        return pair

    def select(self, positions: Sequence[int]) -> "PairDataset":
        """The pairs at some positions, as a data set that shares the rows."""
        chosen = object.__new__(PairDataset)
        chosen.__dict__.update(self.__dict__)
        chosen._indices = [self._indices[position] for position in positions]
        chosen.image_keys = [self.image_keys[position] for position in positions]
        return chosen

    def content_key(self, position: int) -> str:
        """A key that is equal for pairs with equal images and texts."""
        pair = self._pair(self._indices[position])
        texts = [pair["prompt"], pair["chosen"], pair["rejected"]]
        return hashlib.sha256(json.dumps([self.image_keys[position], texts]).encode()).hexdigest()

    def fingerprint(self) -> str:
        """A key that is equal for data sets with equal pairs in equal order."""
        digest = hashlib.sha256()
        for position in range(len(self)):
            digest.update(self.content_key(position).encode())
        return digest.hexdigest()


class PairStream:
    """Preference pairs that arrive one by one; each is checked when it arrives.

    Args:
        rows: as for `PairDataset`.
        name: of the data, for errors.

    Raises:
        DataError: when iterated, naming the row that cannot be used, or if there are no rows.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], name: str = "prefs") -> None:
        self._rows = rows
        self._name = name

    def __iter__(self) -> Iterator[dict[str, Any]]:
        layout = None
        index = -1
        for index, row in enumerate(self._rows):
            where = f"row {index} of {self._name}"
            if index == 0:
                layout = find_layout(list(row), row)
            pair = normalise(layout(row) if layout else row, where)
            pair["image_key"] = image_key(pair["images"], None, where)
            pair["images"] = [open_image(source, None, where) for source in pair["images"]]
            yield pair
        if index < 0:
            raise DataError(f"{self._name} has no pairs.", "Give at least one pair.")


def load_pairs(prefs: object, name: str = "prefs") -> PairDataset | PairStream:
    """Preference pairs from what people bring.

    Args:
        prefs: a list of dicts, a `datasets.Dataset` or `IterableDataset`, a `PairDataset`, or the path of a folder
            that holds one .jsonl file and the images it names, or of such a .jsonl file.
        name: of the data, for errors.

    Raises:
        DataError: if the source is none of these or holds no usable pairs.
    """
    if isinstance(prefs, PairDataset | PairStream):
        return prefs
    if isinstance(prefs, IterableDataset):
        return PairStream(prefs, name)
    if isinstance(prefs, Dataset | list | tuple):
        return PairDataset(prefs, name=name)
    if isinstance(prefs, str | Path):
        return _from_folder(Path(prefs))
    raise DataError(
        f"{name} is a {type(prefs).__name__}.",
        "Give a list of dicts, a datasets.Dataset or IterableDataset, or the path of a folder with a .jsonl file.",
    )


def _from_folder(path: Path) -> PairDataset:
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if len(files) != 1:
            raise DataError(
                f"Folder {str(path)!r} holds {len(files)} .jsonl files: {', '.join(f.name for f in files) or 'none'}.",
                "Give the path of one .jsonl file, or a folder with exactly one.",
            )
        path = files[0]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}.", "Give a folder or a UTF-8 .jsonl file.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(
                f"Line {number} of {path.name} is not JSON: {error.msg} at column {error.colno}.",
                "Each line holds one pair as a JSON object.",
            ) from error
    return PairDataset(rows, folder=path.parent, name=path.name)


def _undecoded(rows: Dataset) -> Dataset:
    """The data set with images as encoded bytes or paths, so that reading a row decodes nothing."""
    features: dict[str, Any] = dict(rows.features)
    for name, feature in features.items():
        if isinstance(feature, Image):
            features[name] = Image(decode=False)
        elif isinstance(feature, List | datasets.Sequence) and isinstance(feature.feature, Image):
            features[name] = List(Image(decode=False))
    return rows.with_format(None).cast(datasets.Features(features))
