"""Where rows come from: lists, data sets, streams, files, folders, archives and Hub ids, opened but not yet read."""

import hashlib
import json
import logging
import re
import shutil
import stat
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from filelock import FileLock
from pyarrow.dataset import ParquetFragmentScanOptions

from pivot_plugin.errors import DataError, SettingsError, foreign_code, said
from pivot_plugin.files import cache_folder, whole_folder

from .images import MAX_PIXELS, ImageAccess
from .jsonlines import JsonLines, parsed
from .remembered import state_of

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FORMS = (
    "a list of dicts, a generator, a datasets.Dataset, DatasetDict or IterableDataset, a Hub id, or the path of a "
    ".jsonl, .json, .parquet, .arrow or .zip file or of a folder with such files"
)
ARCHIVE_MEMBERS = 5_000_000
# by default the reader keeps whole files in memory while they are converted
_ONE_GROUP_AT_A_TIME = ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True)
# an archive of pictures hardly shrinks, one of text to a tenth; one that unpacks to more than this is a bomb
LARGEST_EXPANSION, ALWAYS_UNPACKED = 100, 1_000_000_000
LONGEST_META = 100_000_000


@runtime_checkable
class Digested(Protocol):
    """Rows that can tell whether they are the same without being read."""

    def digest(self, indices: Sequence[int]) -> str:
        """A key that is equal for equal rows.

        Args:
            indices: of the rows.
        """


@dataclass(frozen=True)
class Source:
    """Rows, opened.

    Attributes:
        rows: with random access, or a stream.
        name: of the data, for errors.
        access: to its images.
    """

    rows: Sequence[Mapping[str, Any]] | Iterable[Mapping[str, Any]]
    name: str
    access: ImageAccess

    @property
    def is_stream(self) -> bool:
        """Whether rows can only be read in order."""
        return not isinstance(self.rows, Sequence)


def open_source(
    source: object,
    name: str = "prefs",
    split: str | None = None,
    streaming: bool = False,
    allow_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
    image_folder: str | Path | None = None,
) -> Source:
    """Open a source of rows.

    Args:
        source: what `FORMS` says.
        name: of the data, for errors.
        split: of a DatasetDict or Hub id; may be left out where there is one, or a "train".
        streaming: read a Hub id as a stream.
        allow_urls, max_pixels: as for `ImageAccess`.
        image_folder: where relative image paths are looked up first, and then in the data's own folder.

    Raises:
        DataError: if the source is none of these, cannot be read, or is empty.
    """
    image_folder = None if image_folder is None else Path(image_folder)
    with foreign_code("image_folder cannot be read", "Give the folder that holds the images."):
        if image_folder is not None and not image_folder.is_dir():
            raise DataError(
                f"image_folder {str(image_folder)!r} is no folder.", "Give the folder that holds the images."
            )
    access = ImageAccess(allow_urls=allow_urls, max_pixels=max_pixels, image_folder=image_folder)
    with foreign_code(f"{name} cannot be opened", f"Give {FORMS}."):
        opened = _open(source, name, split, streaming, access)
    if isinstance(opened.rows, Sequence) and len(opened.rows) == 0:
        raise DataError(f"{opened.name} has no rows.", "Give at least one pair or question.")
    return opened


def _open(source: object, name: str, split: str | None, streaming: bool, access: ImageAccess) -> Source:
    if isinstance(source, DatasetDict | IterableDatasetDict):
        source = _one_split(source, split, name)
    elif split is not None and not isinstance(source, str):
        raise SettingsError(f"split={split!r} is given for a {type(source).__name__}.", "Only Hub ids have splits.")
    if isinstance(source, str | Path):
        return _from_text(source, split, streaming, access)
    if isinstance(source, Dataset | IterableDataset):
        return Source(_rows_of(source), name, access)
    if isinstance(source, list | tuple):
        return Source(source, name, access)
    if isinstance(source, Iterable) and not isinstance(source, Mapping | bytes | bytearray | set | frozenset):
        return Source(source, name, access)
    raise DataError(f"{name} is a {type(source).__name__}.", f"Give {FORMS}.")


def _one_split(
    splits: "DatasetDict | IterableDatasetDict", split: str | None, name: str
) -> "Dataset | IterableDataset":
    if split is None and (len(splits) == 1 or "train" in splits):
        split = next(iter(splits)) if len(splits) == 1 else "train"
        logger.info("%s has the splits %s; %s is used.", name, ", ".join(map(str, splits)), split)
    if split not in splits:
        problem = "none was chosen" if split is None else f"there is no {split!r}"
        raise DataError(
            f"{name} has the splits {', '.join(map(str, splits)) or 'none'}, and {problem}.", "Choose one with split=."
        )
    return splits[split]


class TableRows(Sequence[Mapping[str, Any]]):
    """The rows of a Dataset with images as they are stored, encoded bytes or paths; neither decoded nor copied.

    Args:
        table: any Dataset.
    """

    def __init__(self, table: Dataset) -> None:
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = self._table[
            slice(index, index + 1) if isinstance(index, int) else index
        ].to_pylist()
        return rows[0] if isinstance(index, int) else rows

    def digest(self, indices: Sequence[int]) -> str:
        """A key that is equal for the same rows of the same table: its fingerprint, and the state of its files."""
        files = [(file["filename"], state_of(file["filename"])) for file in self._table.cache_files]
        described = f"{self._table._fingerprint} {sorted(files)} "
        return hashlib.sha256(described.encode() + np.asarray(indices, dtype=np.int64).tobytes()).hexdigest()


def _rows_of(table: "Dataset | IterableDataset") -> "TableRows | IterableDataset":
    if isinstance(table, Dataset):
        return TableRows(table)
    # a stream of rows without known features decodes nothing
    return table if table.features is None else table.decode(False)


# Paths and Hub ids


def check_is_there(source: object, name: str) -> None:
    """Refuse the path of data at which nothing is, before anything is loaded.

    Args:
        source: as users give it; what is no text and no path is not looked at.
        name: of the data, for the error.

    Raises:
        DataError: naming the path.
    """
    if not isinstance(source, str | Path) or Path(source).exists():
        return
    if isinstance(source, Path) or Path(source).suffix in _READERS or not HUB_ID.fullmatch(source):
        raise DataError(f"{name}: {str(source)!r} cannot be read: no such file or folder.", f"Give {FORMS}.")


def _from_text(source: str | Path, split: str | None, streaming: bool, access: ImageAccess) -> Source:
    path = Path(source)
    if path.exists():
        return _from_path(path, access, split)
    builders = datasets.packaged_modules._PACKAGED_DATASETS_MODULES
    if isinstance(source, Path) or path.suffix in _READERS or not HUB_ID.fullmatch(source) or source in builders:
        # "json" and the like are readers of `datasets`, which would take the files of the working directory
        raise DataError(f"{str(source)!r} cannot be read: no such file or folder.", f"Give {FORMS}.")
    try:
        loaded = datasets.load_dataset(source, split=split, streaming=streaming)
    # the Hub's client, readers of every format, and the network: each with errors of its own
    except Exception as error:
        raise DataError(
            f"{source!r} is no file or folder here, and no data set could be loaded from the Hub by that name: "
            f"{said(error)}",
            "Check the name and the split, your network, and whether the data set is gated (`hf auth login`).",
        ) from error
    if isinstance(loaded, DatasetDict | IterableDatasetDict):
        loaded = _one_split(loaded, None, source)
    return Source(_rows_of(loaded), source, access)


def _from_path(path: Path, access: ImageAccess, split: str | None = None) -> Source:
    if path.is_dir():
        return _from_folder(path, access, split)
    _check_file(path, access)
    if path.suffix not in _READERS:
        raise DataError(f"{str(path)!r} is a {path.suffix or 'file without suffix'}.", f"Give {FORMS}.")
    return _READERS[path.suffix](path, access)


def _from_folder(path: Path, access: ImageAccess, split: str | None) -> Source:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        with foreign_code(f"The data set saved in {str(path)!r} cannot be read", "Save it anew."):
            _check_saved(path, access)
            loaded = datasets.load_from_disk(str(path))
        rows = _one_split(loaded, split, path.name) if isinstance(loaded, DatasetDict) else loaded
        return Source(_rows_of(rows), path.name, access)
    kinds = {
        suffix: [*sorted(path.glob(f"*{suffix}")), *sorted(path.glob(f"data/*{suffix}"))]
        for suffix in (".jsonl", ".json", ".parquet", ".arrow")
    }
    found_kinds = {suffix: files for suffix, files in kinds.items() if files}
    if not found_kinds and (below := sorted(path.rglob("*.parquet"))):
        # a data set of many subsets, a folder each
        found_kinds[".parquet"] = below
    if list(found_kinds) == [".parquet"]:
        return _parquet(found_kinds[".parquet"], path.name, access)
    # a .json beside one .jsonl is its metadata
    if len(kinds[".jsonl"]) == 1 and set(found_kinds) <= {".jsonl", ".json"}:
        return _from_path(kinds[".jsonl"][0], access)
    if len(found_kinds) == 1 and len(files := next(iter(found_kinds.values()))) == 1:
        return _from_path(files[0], access)
    listed = ", ".join(file.name for files in found_kinds.values() for file in files[:5]) or "none"
    raise DataError(
        f"Folder {str(path)!r} does not hold one file with rows; it holds: {listed}.",
        "Give the path of one file, or a folder with one .jsonl, .json or .arrow file, or with .parquet files.",
    )


def _jsonl(path: Path, access: ImageAccess) -> Source:
    return Source(JsonLines([(path, None)]), path.name, _in(access, path.parent))


def _json(path: Path, access: ImageAccess) -> Source:
    try:
        content = parsed(path.read_bytes())
    # numbers of thousands of digits, brackets in brackets: not every broken text is a JSONDecodeError
    except Exception as error:
        where = f"line {error.lineno}, column {error.colno}: " if isinstance(error, json.JSONDecodeError) else ""
        detail = error.msg if isinstance(error, json.JSONDecodeError) else said(error)
        raise DataError(
            f"{path.name} is not JSON: {where}{detail} (it has {path.stat().st_size:,} bytes, and may have been cut).",
            "Give a list of rows as one JSON array, or one object a line in a .jsonl file.",
            "not JSON",
        ) from error
    if isinstance(content, Mapping) and content and all(_is_subset(value) for value in content.values()):
        return _mmpr(path, content, access)
    if isinstance(content, Mapping):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise DataError(
            f"{path.name} holds a {type(content).__name__} of {', '.join(map(str, list(content)[:5]))}."
            if isinstance(content, Mapping)
            else f"{path.name} holds a {type(content).__name__}.",
            "Give a list of rows, or MMPR's form: names with 'annotation' (a .jsonl file) and 'root' (of the images).",
        )
    return Source(content, path.name, _in(access, path.parent))


def _is_subset(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("annotation"), str)


def _mmpr(path: Path, subsets: Mapping[str, Any], access: ImageAccess) -> Source:
    """MMPR's meta file: subsets by name, each with its .jsonl file and the folder of its images."""
    parts = []
    for name, subset in subsets.items():
        annotation = _resolve(path.parent, subset["annotation"], access)
        if annotation is None:
            raise DataError(
                f"{path.name}: the file {subset['annotation']!r} of subset {name!r} is neither below "
                f"{str(path.parent)!r} nor beside it.",
                "Keep the folders as they were published, or correct the path.",
            )
        _check_file(annotation, access)
        root = str(subset.get("root") or ".")
        parts.append((annotation, _resolve(path.parent, root, access) or path.parent / root))
    return Source(JsonLines(parts), path.name, access)


def _resolve(folder: Path, name: str, access: ImageAccess) -> Path | None:
    """A path written from the meta file's folder, from the one above it, or, outside of archives, from here."""
    starts = (folder, folder.parent) if access.confined else (folder, folder.parent, Path())
    path = next((start / name for start in starts if (start / name).exists()), None)
    return None if path is None else path.resolve()


def _check_file(path: Path, access: ImageAccess) -> None:
    """Make sure that rows are read from a file, and in an archive from one of its own.

    Raises:
        DataError: for pipes and devices, which may never end, and for what lies outside.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{str(path)!r} is neither a file nor a folder.", f"Give {FORMS}.")
    if access.confined and access.folder is not None and not path.resolve().is_relative_to(access.folder.resolve()):
        raise DataError(
            f"{str(path)!r} lies outside of the archive.", "Do not trust this archive.", "path outside its folder"
        )


def _check_saved(folder: Path, access: ImageAccess) -> None:
    """Make sure that a saved data set consists of whole files in its own folder, whatever its records name.

    Raises:
        DataError: for names that leave the folder, and for damaged files.
    """
    parts = [folder]
    if (folder / "dataset_dict.json").exists():
        parts = [folder / _inside(folder, name) for name in _record(folder / "dataset_dict.json", access)["splits"]]
    for part in parts:
        for file in _record(part / "state.json", access)["_data_files"]:
            arrow = part / _inside(part, file["filename"])
            _check_file(arrow, access)
            _check_arrow(arrow)
        _record(part / "dataset_info.json", access)


def _record(path: Path, access: ImageAccess) -> Any:
    _check_file(path, access)
    if path.stat().st_size > LONGEST_META:
        raise DataError(f"{str(path)!r} has {path.stat().st_size:,} bytes.", "Save the data set anew.")
    return parsed(path.read_bytes())


def _inside(folder: Path, name: object) -> str:
    """A name that a record gives, if it is one."""
    if not isinstance(name, str) or not name or name in (".", "..") or re.search(r"[\\/\0]", name):
        raise DataError(
            f"The record in {str(folder)!r} names {str(name)[:80]!r}, which is no name of a file in it.",
            "Save the data set anew.",
            "path outside its folder",
        )
    return name


def _check_arrow(path: Path) -> None:
    """Read an arrow file to its end and look at every offset in it.

    Unchecked, a damaged one makes the library read memory that it does not have, which ends the process.

    Raises:
        pyarrow.ArrowException: if it is damaged.
    """
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            batch.validate(full=True)


def _parquet(files: Sequence[Path], name: str, access: ImageAccess) -> Source:
    for file in files:
        _check_file(file, access)
    with foreign_code(f"{name} cannot be read as parquet", "Check that the files are whole and have the same columns."):
        rows = Dataset.from_parquet([str(file) for file in files], fragment_scan_options=_ONE_GROUP_AT_A_TIME)
    # what the conversion needed would stay with this process, and be copied by the ones it forks
    pa.default_memory_pool().release_unused()
    return Source(_rows_of(rows), name, _in(access, files[0].parent))


def _arrow(path: Path, access: ImageAccess) -> Source:
    with foreign_code(f"{path.name} cannot be read as arrow", "Check that the file is whole."):
        _check_arrow(path)
        rows = Dataset.from_file(str(path))
    return Source(_rows_of(rows), path.name, _in(access, path.parent))


def _zip(path: Path, access: ImageAccess) -> Source:
    """A folder in an archive, unpacked once into the cache; nothing in it may lie outside of it."""
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = cache_folder("archives")
    target = cache / key
    if not target.exists():
        with foreign_code(f"{path.name} cannot be unpacked", "Check that the archive is whole."):
            locks = cache_folder("locks")
            locks.mkdir(parents=True, exist_ok=True)
            # of the processes that share a disk one unpacks, and the others wait for it
            with FileLock(locks / f"archive-{key}.lock"):
                if not target.exists():
                    _unpack(path, target)
    inner = target
    entries = [entry for entry in inner.iterdir() if entry.name != "__MACOSX"]
    if len(entries) == 1 and entries[0].is_dir():
        inner = entries[0]
    opened = _from_path(inner, replace(access, folder=inner, confined=True))
    return Source(opened.rows, path.name, opened.access)


def _unpack(path: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive, whole_folder(target) as unfinished:
            _check_archive(archive, path, target.parent)
            archive.extractall(unfinished)
    except OSError:
        # another process may have been faster, and its folder stands there as a whole
        if not target.is_dir() or not any(target.iterdir()):
            raise


def _check_archive(archive: zipfile.ZipFile, path: Path, cache: Path) -> None:
    members = archive.infolist()
    for member in members:
        parts = re.split(r"[\\/]", member.filename)
        if ".." in parts or member.filename.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", member.filename):
            raise DataError(
                f"{path.name} holds {member.filename!r}, a path that leaves the archive's folder.",
                "Do not trust this archive; unpack what you need yourself.",
                "path outside its folder",
            )
    cache.mkdir(parents=True, exist_ok=True)
    if strange := next((member for member in members if _is_special(member)), None):
        raise DataError(
            f"{path.name} holds {strange.filename!r}, which is neither a file nor a folder.",
            "Do not trust this archive; unpack what you need yourself.",
            "path outside its folder",
        )
    size, free = sum(member.file_size for member in members), shutil.disk_usage(cache).free
    packed = max(path.stat().st_size, 1)
    if size > max(ALWAYS_UNPACKED, LARGEST_EXPANSION * packed):
        raise DataError(
            f"{path.name} has {packed:,} bytes and unpacks to {size:,}.",
            "Unpack it yourself, if you trust it, and give the folder.",
            "archive bomb",
        )
    if size > free or len(members) > ARCHIVE_MEMBERS:
        raise DataError(
            f"{path.name} unpacks to {size:,} bytes in {len(members):,} files; {free:,} bytes are free in {cache}.",
            "Make room, or set PIVOT_CACHE to another disk.",
        )


def _is_special(member: zipfile.ZipInfo) -> bool:
    """Whether a member is a link, pipe or device where it was packed."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    return kind not in (0, stat.S_IFREG, stat.S_IFDIR)


def _in(access: ImageAccess, folder: Path) -> ImageAccess:
    """Access to images from the folder of their rows; an archive is one folder for all."""
    return access if access.confined else replace(access, folder=folder)


_READERS = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": lambda path, access: _parquet([path], path.name, access),
    ".arrow": _arrow,
    ".zip": _zip,
}
