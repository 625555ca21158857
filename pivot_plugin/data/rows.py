"""Rows in a normal form with random access, whatever they are rows of."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from datasets import Dataset

from pivot_plugin.choices import OnBadRow as OnBadRow
from pivot_plugin.errors import DataError, PivotError, SettingsError, foreign_code
from pivot_plugin.files import cache_folder
from pivot_plugin.hooks.types import Layout

from .images import ImageAccess
from .launch import Launch
from .looking import Looking
from .looks import Looks, look_at
from .records import WORTH_PROCESSES, Judge
from .remembered import RememberedBlocks, code_of, digest_of
from .skipped import SkippedRows
from .sources import Digested, Source, open_source

Normal = Callable[[Mapping[str, Any], str], dict[str, Any]]
# among which the layout is looked for
LAYOUT_ROWS = 32


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
        self._looks: Looks | None = None
        self._judge: Judge | None = None
        self._layout = self._first_layout(columns)

    def _first_layout(self, columns: Mapping[str, str] | None) -> Layout | None:
        """The layout of the first row that has one; rows before it are bad rows."""
        first_error: PivotError | None = None
        for index in range(min(len(self._rows), LAYOUT_ROWS)):
            try:
                return self._recognise(self.unread(index), columns)
            except PivotError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _read(self, index: int, where: str) -> Mapping[str, Any]:
        """A row of the source as it is."""
        with foreign_code(f"{where} cannot be read", "Mend the data, or leave the row out."):
            return self._rows[index]

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

    def unread(self, position: int) -> Mapping[str, Any]:
        """A row as it stands in the source, before anything is made of it.

        Raises:
            DataError: if it cannot be read.
        """
        where = self.where(position)
        return as_mapping(self._read(int(self._indices[position]), where), where)

    def plain(self, position: int) -> dict[str, Any]:
        """A row in the normal form, its images as they stand in the source.

        Raises:
            DataError: if the row cannot be used.
        """
        where = self.where(position)
        return normalised(self._read(int(self._indices[position]), where), self._layout, self._normal, where)

    def verify(
        self,
        on_bad_row: OnBadRow = "raise",
        skipped: str | Path | None = None,
        judge: Judge | None = None,
        launch: Launch | None = None,
    ) -> Self:
        """Look at every row once, decoding its images, so that training meets no bad one. Done once, and once a judge.

        What is found is remembered: of rows and image files that have not changed, the next look takes it from there.

        Args:
            on_bad_row: "raise" stops at the first bad row; "skip" leaves bad rows out.
            skipped: file that gets a line of JSON for each row left out.
            judge: says which rows a model cannot take.
            launch: processes that look together, each at its share, and all call this alike; this one alone where
                None. The first of them writes the list of what is skipped.

        Raises:
            DataError: for a bad row, or if too many rows are bad to leave them out; the same in every process.
        """
        launch = launch or Launch()
        done = self._looks is not None and (judge is None or judge == self._judge)
        everywhere = launch.gather((done, len(self)))
        if len({rows for _, rows in everywhere}) > 1:
            raise DataError(
                f"{self._name} has {', '.join(f'{rows:,}' for _, rows in everywhere)} rows in the processes of this "
                "launch, in the order of their ranks.",
                "Give every process the same data, from a folder that all of them see.",
            )
        if all(done for done, _ in everywhere):
            return self
        looks = Looks.empty(len(self))
        bad: list[int] = []
        looking = Looking(self, judge, self._looks, launch, self._remembered(judge))
        listed = skipped if on_bad_row == "skip" and launch.rank == 0 else None
        with SkippedRows(self._name, listed, len(self)) as left_out:
            for start, block in looking.blocks():
                looks.put(start, block.looks)
                for offset, *error in block.errors:
                    if on_bad_row == "raise":
                        raise DataError(*error)
                    bad.append(start + offset)
                    left_out.add(int(self._indices[start + offset]), DataError(*error))
        self._indices = np.delete(self._indices, bad)
        self._looks = looks.at(np.delete(np.arange(len(looks)), bad)) if bad else looks
        self._judge = judge
        return self

    def _remembered(self, judge: Judge | None) -> RememberedBlocks | None:
        """What earlier looks have found, None for few rows, and where nothing tells whether it would hold."""
        code = code_of(self._layout)
        judged_by = "" if judge is None else getattr(judge, "fingerprint", None)
        if len(self) < WORTH_PROCESSES or code is None or judged_by is None:
            return None
        context = {
            "code": code,
            "rows": type(self).__name__,
            "name": self._name,
            "access": vars(self.access),
            "judge": judged_by,
            "known": self._looks is not None,
            "working_directory": Path.cwd() if self.access.folder is None else None,
        }
        return RememberedBlocks(cache_folder("checked"), context)

    def stored_digest(self, positions: range) -> str | None:
        """A key that is equal for equal rows as they are stored; None where that cannot be told without reading them.

        Args:
            positions: of the rows, consecutive.
        """
        indices = self._indices[positions.start : positions.stop]
        if isinstance(self._rows, Digested):
            return self._rows.digest(indices.tolist())
        try:
            return digest_of([self._rows[index] for index in indices])
        # rows of whatever kind, among them decoded images
        except Exception:
            return None

    @property
    def looks(self) -> Looks:
        """What is known of the rows; the first use verifies them."""
        looks = self.verify()._looks
        assert looks is not None
        return looks

    @property
    def image_keys(self) -> np.ndarray:
        """(rows,) for each row the key of its image set as bytes, empty for none; the first use verifies the rows."""
        return self.looks.keys

    @property
    def rejected_image_keys(self) -> np.ndarray:
        """(rows,) as `image_keys`, of the images that the chosen answer is not right of."""
        return self.looks.rejected_keys

    @property
    def picture_keys(self) -> np.ndarray:
        """(rows,) as `image_keys`, but of a row with edited images the key of the picture that they are made of."""
        looks = self.looks
        return np.where(looks.origins != b"", looks.origins, looks.keys)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row, where = self.plain(position), self.where(position)
        if self._looks is None:
            look, here = look_at(row, self.access, where), 0
        else:
            look, here = self._looks, position
        row["image_key"], rejected_key = look.keys[here].decode(), look.rejected_keys[here].decode()
        row["images"] = [self.access.open(source, where) for source in row["images"]]
        if rejected_key:
            row["rejected_image_key"] = rejected_key
            row["rejected_images"] = [self.access.open(source, where) for source in row["rejected_images"]]
        return row

    def select(self, positions: Sequence[int]) -> Self:
        """The rows at some positions, as a data set that shares the source."""
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__)
        wanted = np.asarray(positions, dtype=np.int64)
        chosen._indices = self._indices[wanted]
        chosen._looks = None if self._looks is None else self._looks.at(wanted)
        return chosen

    def content_key(self, position: int) -> str:
        """A key that is equal for rows with equal images and texts."""
        return self.looks.contents[position].tobytes().hex()

    def fingerprint(self) -> str:
        """A key that is equal for data sets with equal rows in equal order."""
        digest = hashlib.sha256()
        for content in self.looks.contents:
            digest.update(content.tobytes().hex().encode())
        return digest.hexdigest()


def refuse_late_options(what: str, **options: object) -> None:
    """Refuse options of reading for rows that are read already.

    Raises:
        SettingsError: naming the first that is given.
    """
    for name, value in options.items():
        if value is not None:
            raise SettingsError(
                f"{name} is given for {what} that are loaded already.", f"Give {name} where they are loaded."
            )


def as_mapping(row: object, where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}.", "Give rows as dicts.", "wrong type")
    if any(isinstance(value, np.ndarray) for value in row.values()):
        return {name: _without_arrays(value) if isinstance(value, np.ndarray) else value for name, value in row.items()}
    return row


def _without_arrays(value: Any) -> Any:
    """Lists in place of arrays of objects, as which pandas reads the lists of a parquet file; numbers stay arrays."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OU":
        value = value.tolist()
    if isinstance(value, list):
        return [_without_arrays(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _without_arrays(item) for name, item in value.items()}
    return value


def normalised(row: object, layout: Layout | None, normal: Normal, where: str) -> dict[str, Any]:
    mapping = as_mapping(row, where)
    if layout is not None:
        try:
            mapping = as_mapping(layout(mapping), f"{where}, as its layout gives it,")
        except PivotError as error:
            kind = error.kind if isinstance(error, DataError) else "unusable row"
            raise DataError(f"{where}: {error.finding}", error.remedy, kind) from error
        # layouts are foreign code that meets foreign rows
        except Exception as error:
            raise DataError(
                f"{where}: its layout raised {type(error).__name__}: {error}.", "Mend the row or the plugin."
            ) from error
    with foreign_code(f"{where} cannot be used", "Mend the row, or leave it out."):
        return normal(mapping, where)
