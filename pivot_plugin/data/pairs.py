"""Preference pairs as data sets: with random access, or as streams that are checked as they pass."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pivot_plugin.choices import OnBadRow
from pivot_plugin.errors import DataError, SettingsError, foreign_code
from pivot_plugin.hooks.types import Layout

from .images import MAX_PIXELS, ImageAccess, image_set_key, pixel_key
from .layout import normalise, recognise
from .records import Judge, refuse_equal
from .rows import LAYOUT_ROWS, RowDataset, as_mapping, normalised, refuse_late_options
from .skipped import SKIPPED_FILE, SkippedRows
from .sources import open_source

Rejecting = Callable[[list[Any], str, ImageAccess, str], list[Any]]


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

    _rejecting: Rejecting | None = None

    def _recognise(self, first: Mapping[str, Any], columns: Mapping[str, str] | None) -> Layout | None:
        return recognise(first, self._name, columns)

    def _normal(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        return normalise(row, where)

    def plain(self, position: int) -> dict[str, Any]:
        """As the parent's; with rejected images that are made, where they are."""
        row = super().plain(position)
        if self._rejecting is not None and row["images"] and not row.get("rejected_images"):
            where = self.where(position)
            if self._looks is None:
                key = image_set_key([self.access.key(source, where) for source in row["images"]])
            else:
                key = self._looks.keys[position].decode()
            row["rejected_images"] = self._rejecting(row["images"], key, self.access, where)
        return row

    def rejecting(self, make: Rejecting) -> Self:
        """The same pairs, with rejected images made for rows that have images and no rejected ones.

        Args:
            make: of a row's images, the key of their set, access to them and the row's name in errors; it gives an
                image for each.
        """
        pairs = self.select(range(len(self)))
        pairs._rejecting = make
        # what was looked at had none of them
        pairs._looks = None
        return pairs

    def stored_digest(self, positions: range) -> str | None:
        """As the parent's; None where what is made stands in no row."""
        return None if self._rejecting is not None else super().stored_digest(positions)


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
        self._judge: Judge | None = None
        self._used_up = False

    def judged(self, judge: Judge, on_bad_row: OnBadRow = "raise", skipped: str | Path | None = None) -> Self:
        """The same stream, of which rows that a model cannot take are bad rows.

        Args:
            judge: says which these are.
            on_bad_row, skipped: as for `PairDataset.verify`; what was asked for where it was loaded stays.
        """
        self._judge = judge
        if on_bad_row == "skip" and not self._skips:
            self._skips, self._skipped = True, skipped
        return self

    @property
    def once(self) -> bool:
        """Whether its rows can be read only once."""
        # an iterator is its own iterator
        return iter(self._rows) is self._rows

    def peek(self, count: int) -> list[dict[str, Any]]:
        """The first pairs, which the stream gives again when it is iterated; bad ones that are skipped are left out.

        Args:
            count: of rows to look at.

        Raises:
            DataError: as when iterated.
        """
        iterator = iter(self._rows)
        first = list(itertools.islice(_guarded(iterator, self._name), count))
        if iterator is self._rows:
            # it gives its rows once: those that were taken stand in front of it again
            self._rows = itertools.chain(first, iterator)
        again = PairStream(first, self._name, self._columns, self._access, "skip" if self._skips else "raise", None)
        again._judge = self._judge
        return list(again)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._used_up:
            raise DataError(
                f"{self._name} is a generator that was read to its end already.",
                "Give a list, a data set, or datasets.IterableDataset.from_generator, which can be read again.",
            )
        self._used_up = self.once
        index, layout, recognised = -1, None, False
        with SkippedRows(self._name, self._skipped if self._skips else None) as left_out:
            for index, row in enumerate(_guarded(self._rows, self._name)):
                where = f"row {index} of {self._name}"
                try:
                    if not recognised:
                        layout = recognise(as_mapping(row, where), self._name, self._columns)
                        recognised = True
                    pair = normalised(row, layout, normalise, where)
                    if self._judge is not None:
                        self._judge(pair, self._access, where)
                    for name in ("images", "rejected_images"):
                        if name in pair:
                            pair[name] = [self._access.open(source, where) for source in pair[name]]
                            key = image_set_key([pixel_key(image) for image in pair[name]])
                            pair["image_key" if name == "images" else "rejected_image_key"] = key
                    refuse_equal(pair, pair["image_key"], pair.get("rejected_image_key", ""), where)
                except DataError as error:
                    if not self._skips or (not recognised and index >= LAYOUT_ROWS):
                        raise
                    left_out.add(index, error)
                    continue
                yield pair
        if index < 0:
            raise DataError(f"{self._name} has no pairs.", "Give at least one pair.")


def _guarded(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a stream, whose own errors say which row they came from."""
    iterator = iter(rows)
    for index in itertools.count():
        with foreign_code(f"row {index} of {name} cannot be read", "Mend the data; a stream ends where it breaks."):
            try:
                row = next(iterator)
            except StopIteration:
                return
        yield row


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
    image_folder: str | Path | None = None,
    name: str = "prefs",
) -> PairDataset | PairStream:
    """Preference pairs from what people bring, lazily: a row is read when it is needed, an image decoded when it is.

    Args:
        source: a list of dicts, a generator, a `datasets.Dataset`, `DatasetDict` or `IterableDataset`, a Hub id, the
            path of a .jsonl, .json, .parquet, .arrow or .zip file or of a folder with such files, or pairs that are
            loaded already. Rows in the layouts of TRL, RLAIF-V, RLHF-V, MMPR, VLFeedback and the like, scored
            completions or ranked candidates, of ms-swift and LLaMA-Factory; others by `columns` or a plugin.
        split: of a data set that has several; "train" where not given.
        columns: our column names to the data's own: {"prompt": "instruction"}.
        on_bad_row: "raise" names a row that cannot be used when it is read (or all are verified, as training does);
            "skip" looks at all rows now and leaves bad ones out, up to half of them.
        skipped: file that lists what was left out and why, a line of JSON each.
        streaming: read a Hub data set as a stream.
        allow_urls: fetch images given by http(s) address.
        max_pixels: refuse larger images.
        image_folder: where relative image paths are looked up first, and then in the data's own folder.
        name: of the data, for errors.

    Returns:
        pairs with `id`, `images` (RGB), `prompt`, `chosen`, `rejected` (messages), `image_key`, and where there are any
        `rejected_images` with `rejected_image_key`, `source`, `score_chosen`, `score_rejected`.

    Raises:
        DataError: if the source cannot be read or its layout is unknown.
        SettingsError: for an option that does not exist.
    """
    if on_bad_row not in ("raise", "skip"):
        raise SettingsError(f"on_bad_row is {on_bad_row!r}.", "Choose 'raise' or 'skip'.")
    if isinstance(source, PairDataset | PairStream):
        refuse_late_options("pairs", image_folder=image_folder)
    if isinstance(source, PairDataset):
        return source.verify("skip", skipped) if on_bad_row == "skip" else source
    if isinstance(source, PairStream):
        return source
    opened = open_source(source, name, split, streaming, allow_urls, max_pixels, image_folder)
    if opened.is_stream:
        return PairStream(opened.rows, opened.name, columns, opened.access, on_bad_row, skipped)
    pairs = PairDataset(opened, columns=columns)
    return pairs.verify("skip", skipped) if on_bad_row == "skip" else pairs


def load_pairs(
    source: object,
    name: str = "prefs",
    remedy: str = "Give rows with random access: a list, a data set or a file.",
    **options: Any,
) -> PairDataset:
    """Preference pairs that can be read in any order and more than once: `load` for work that no stream can serve.

    Args:
        source: as for `load`, with random access.
        name: of the data, for errors.
        remedy: what to do about a stream, with the reason where the caller has one.
        **options: of `load`.

    Raises:
        DataError: as `load`, and for a stream.
    """
    pairs = load(source, name=name, **options)
    if isinstance(pairs, PairStream):
        raise DataError(f"{name} is a stream.", remedy)
    return pairs
