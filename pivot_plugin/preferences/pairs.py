"""Preference pairs and questions as data sets: with random access, or as streams that are checked as they pass."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from datasets import Dataset

from pivot_plugin.errors import DataError, PivotError, SettingsError
from pivot_plugin.types import Layout

from .images import KEY_LENGTH, MAX_PIXELS, ImageAccess
from .layout import normalise, normalise_question, recognise
from .records import look_at, look_at_all
from .sources import Source, open_source

logger = logging.getLogger(__name__)

OnBadRow = Literal["raise", "skip"]
SKIPPED_FILE = "skipped.jsonl"
Normal = Callable[[Mapping[str, Any], str], dict[str, Any]]


class RowDataset:
    """Rows in a normal form with random access. Images stay encoded until a row is read.

    Args:
        rows: in whatever layout, or an opened source.
        folder: what relative image paths start from.
        name: of the data, for errors.

    Raises:
        DataError: if there are none. Rows that cannot be used are found by `verify`, or when they are read.
    """

    def __init__(
        self,
        rows: Source | Sequence[Mapping[str, Any]] | Dataset,
        folder: Path | None = None,
        name: str = "prefs",
        columns: Mapping[str, str] | None = None,
    ) -> None:
        source = rows if isinstance(rows, Source) else open_source(rows, name)
        if source.is_stream or not isinstance(source.rows, Sequence):
            raise DataError(f"{name} is a stream.", "Give rows with random access: a list or a datasets.Dataset.")
        self.access = source.access if folder is None else ImageAccess(folder)
        self._rows = source.rows
        self._name = source.name
        self._indices = np.arange(len(source.rows))
        self._keys: np.ndarray | None = None
        self._layout = self._recognise(_mapping(self._rows[0], self.where(0)), columns)

    def _recognise(self, first: Mapping[str, Any], columns: Mapping[str, str] | None) -> Layout | None:
        raise NotImplementedError

    def _normal(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Of the data, for errors."""
        return self._name

    def where(self, position: int) -> str:
        """What a row is called in errors: its number in the source."""
        return f"row {self._indices[position]} of {self._name}"

    def plain(self, position: int) -> dict[str, Any]:
        """A row in the normal form, its images as they stand in the source.

        Raises:
            DataError: if the row cannot be used.
        """
        where = self.where(position)
        return _normalised(self._rows[int(self._indices[position])], self._layout, self._normal, where)

    def verify(self, on_bad_row: OnBadRow = "raise", skipped: str | Path | None = None) -> Self:
        """Look at every row once, decoding its images, so that training meets no bad one. Done once.

        Args:
            on_bad_row: "raise" stops at the first bad row; "skip" leaves bad rows out.
            skipped: file that gets a line of JSON for each row left out.

        Raises:
            DataError: for a bad row, or if all rows are bad.
        """
        if self._keys is not None:
            return self
        keys = np.zeros(len(self), dtype=f"S{KEY_LENGTH}")
        bad: list[int] = []
        with _SkippedRows(self._name, skipped if on_bad_row == "skip" else None) as left_out:
            for position, record in enumerate(look_at_all(self, self._name)):
                if record.error is None:
                    keys[position] = record.key.encode()
                elif on_bad_row == "raise":
                    raise DataError(*record.error)
                else:
                    bad.append(position)
                    left_out.add(int(self._indices[position]), DataError(*record.error))
        if len(bad) == len(self):
            raise DataError(
                f"All {len(bad)} rows of {self._name} are bad; the last: {left_out.last}", "Check the data's layout."
            )
        self._indices = np.delete(self._indices, bad)
        self._keys = np.delete(keys, bad)
        return self

    @property
    def image_keys(self) -> np.ndarray:
        """(rows,) for each row the key of its image set as bytes, empty for none; the first use verifies the rows."""
        keys = self.verify()._keys
        assert keys is not None
        return keys

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row, where = self.plain(position), self.where(position)
        if self._keys is None:
            row["image_key"] = look_at(row, self.access, where).key
        else:
            row["image_key"] = self._keys[position].decode()
        row["images"] = [self.access.open(source, where) for source in row["images"]]
        return row

    def select(self, positions: Sequence[int]) -> Self:
        """The rows at some positions, as a data set that shares the source."""
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__)
        wanted = np.asarray(positions, dtype=np.int64)
        chosen._indices = self._indices[wanted]
        chosen._keys = None if self._keys is None else self._keys[wanted]
        return chosen

    def content_key(self, position: int) -> str:
        """A key that is equal for rows with equal images and texts."""
        row = self.plain(position)
        texts = [row[name] for name in ("prompt", "chosen", "rejected", "messages") if name in row]
        return hashlib.sha256(json.dumps([self.image_keys[position].decode(), texts]).encode()).hexdigest()

    def fingerprint(self) -> str:
        """A key that is equal for data sets with equal rows in equal order."""
        digest = hashlib.sha256()
        for position in range(len(self)):
            digest.update(self.content_key(position).encode())
        return digest.hexdigest()


class PairDataset(RowDataset):
    """Preference pairs with random access. Images stay encoded until a pair is read.

    Args:
        rows: pairs in any known layout, or an opened source.
        folder: what relative image paths start from.
        name: of the data, for errors.
        columns: our column names to the data's own, for an unknown layout.

    Raises:
        DataError: if there are none, or their layout is unknown.
    """

    def _recognise(self, first: Mapping[str, Any], columns: Mapping[str, str] | None) -> Layout | None:
        return recognise(first, self._name, columns)

    def _normal(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        return normalise(row, where)


class QuestionDataset(RowDataset):
    """Questions about images, with whatever columns stand beside them, such as `answer`. As `PairDataset` otherwise."""

    def _recognise(self, first: Mapping[str, Any], columns: Mapping[str, str] | None) -> Layout | None:
        return None

    def _normal(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        taken = ("prompt", "question", "image", "images", "id")
        beside = {str(name): value for name, value in row.items() if name not in taken}
        return beside | normalise_question(row, where)


class PairStream:
    """Preference pairs that arrive one by one; each is checked when it arrives.

    Args:
        rows: as for `PairDataset`, in order.
        name: of the data, for errors.
        columns: as for `PairDataset`.
        access: to the images.
        on_bad_row, skipped: as for `PairDataset.verify`.

    Raises:
        DataError: when iterated: for a row that cannot be used, if there are no rows, or if an iterator that can be
            read only once is read again.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        name: str = "prefs",
        columns: Mapping[str, str] | None = None,
        access: ImageAccess | None = None,
        on_bad_row: OnBadRow = "raise",
        skipped: str | Path | None = None,
    ) -> None:
        self._rows = rows
        self._name = name
        self._columns = columns
        self._access = access or ImageAccess()
        self._skipped = skipped
        self._skips = on_bad_row == "skip"
        self._used_up = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._used_up:
            raise DataError(
                f"{self._name} is a generator that was read to its end already.",
                "Give a list, a data set, or datasets.IterableDataset.from_generator, which can be read again.",
            )
        # an iterator is its own iterator, and gives its rows once
        self._used_up = iter(self._rows) is self._rows
        index, layout = -1, None
        with _SkippedRows(self._name, self._skipped if self._skips else None) as left_out:
            for index, row in enumerate(self._rows):
                where = f"row {index} of {self._name}"
                try:
                    if index == 0:
                        layout = recognise(_mapping(row, where), self._name, self._columns)
                    pair = _normalised(row, layout, normalise, where)
                    pair["image_key"] = look_at(pair, self._access, where).key
                    pair["images"] = [self._access.open(source, where) for source in pair["images"]]
                except DataError as error:
                    if index == 0 or not self._skips:
                        raise
                    left_out.add(index, error)
                    continue
                yield pair
        if index < 0:
            raise DataError(f"{self._name} has no pairs.", "Give at least one pair.")


def load(
    source: object,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "raise",
    skipped: str | Path = SKIPPED_FILE,
    streaming: bool = False,
    allow_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
    name: str = "prefs",
) -> PairDataset | PairStream:
    """Preference pairs from what people bring, lazily: a row is read when it is needed, an image decoded when it is.

    Args:
        source: a list of dicts, a generator, a `datasets.Dataset`, `DatasetDict` or `IterableDataset`, a Hub id, the
            path of a .jsonl, .json, .parquet, .arrow or .zip file or of a folder with such files, or pairs that are
            loaded already. Rows in the layouts of TRL, RLAIF-V, RLHF-V, MMPR, VLFeedback and the like, scored
            completions or ranked candidates; others by `columns` or a plugin.
        split: of a data set that has several; "train" where not given.
        columns: our column names to the data's own: {"prompt": "instruction"}.
        on_bad_row: "raise" names a row that cannot be used when it is read (or all are verified, as training does);
            "skip" looks at all rows now and leaves bad ones out.
        skipped: file that lists what was left out and why, a line of JSON each.
        streaming: read a Hub data set as a stream.
        allow_urls: fetch images given by http(s) address.
        max_pixels: refuse larger images.
        name: of the data, for errors.

    Returns:
        pairs with `id`, `images` (RGB), `prompt`, `chosen`, `rejected` (messages), `image_key`, and where there are any
        `source`, `score_chosen`, `score_rejected`.

    Raises:
        DataError: if the source cannot be read or its layout is unknown.
        SettingsError: for an option that does not exist.
    """
    if on_bad_row not in ("raise", "skip"):
        raise SettingsError(f"on_bad_row is {on_bad_row!r}.", "Choose 'raise' or 'skip'.")
    if isinstance(source, PairDataset):
        return source.verify("skip", skipped) if on_bad_row == "skip" else source
    if isinstance(source, PairStream):
        return source
    opened = open_source(source, name, split, streaming, allow_urls, max_pixels)
    if opened.is_stream:
        return PairStream(opened.rows, opened.name, columns, opened.access, on_bad_row, skipped)
    pairs = PairDataset(opened, columns=columns)
    return pairs.verify("skip", skipped) if on_bad_row == "skip" else pairs


def load_questions(source: object, name: str = "questions", **options: Any) -> QuestionDataset:
    """Questions from what people bring, with the columns beside them.

    Args:
        source: as for `load`, with random access; rows with `prompt` or `question` and `images` or `image`.
        name: of the data, for errors.
        **options: `split`, `allow_urls`, `max_pixels` as for `load`.

    Raises:
        DataError: if the source cannot be read or is a stream.
    """
    if isinstance(source, QuestionDataset):
        return source
    return QuestionDataset(open_source(source, name, **options), name=name)


def _mapping(row: object, where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}.", "Give rows as dicts.", "wrong type")
    return row


def _normalised(row: object, layout: Layout | None, normal: Normal, where: str) -> dict[str, Any]:
    found = _mapping(row, where)
    if layout is not None:
        try:
            found = _mapping(layout(found), f"{where}, as its layout gives it,")
        except PivotError as error:
            raise DataError(f"{where}: {error.finding}", error.remedy) from error
        # layouts are foreign code that meets foreign rows
        except Exception as error:
            raise DataError(
                f"{where}: its layout raised {type(error).__name__}: {error}.", "Mend the row or the plugin."
            ) from error
    return normal(found, where)


class _SkippedRows:
    """The list of rows left out: a line of JSON each in a file, and one sentence when it is closed."""

    def __init__(self, name: str, path: str | Path | None) -> None:
        self._name = name
        self._path = None if path is None else Path(path)
        self._file: Any = None
        self._count = 0
        self.last = ""

    def add(self, index: int, error: DataError) -> None:
        self._count += 1
        self.last = error.finding
        if self._path is None:
            return
        if self._file is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w", encoding="utf-8")
            except OSError as failure:
                raise SettingsError(
                    f"The list of skipped rows cannot be written to {str(self._path)!r}: {failure.strerror}.",
                    "Give another file with skipped=.",
                ) from failure
        line = {"data": self._name, "row": index, "defect": error.kind, "finding": error.finding}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._count:
            listed = "" if self._path is None else f"; they are listed in {self._path}"
            logger.warning("%d rows of %s are left out%s.", self._count, self._name, listed)
