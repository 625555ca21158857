"""Pictures from what people bring: folders, files, lists, data sets with an image column, streams."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from PIL import Image

from pivot_plugin.data.conversations import normalise_conversation
from pivot_plugin.data.images import ImageAccess
from pivot_plugin.data.layout import text_of
from pivot_plugin.data.rows import as_mapping
from pivot_plugin.data.sources import open_source
from pivot_plugin.errors import DataError, SettingsError, foreign_code, unknown
from pivot_plugin.progress import Progress

from .pictures import Picture, Pictures

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
# of a data set, the first that is there; the last is Hugging Face's imagefolder
IMAGE_COLUMNS = ("image", "images", "img", "picture", "file_name")
CAPTIONS_COLUMNS = ("captions", "sentences")
CAPTION_COLUMNS = ("caption", "text", "conversations", "messages")
ROW_FILES = ("*.jsonl", "*.parquet", "*.arrow", "dataset_dict.json")
# of a stream, which is read once and kept as it comes, encoded
STREAMED = 10_000
WORTH_A_BAR = 1000
OPTIONS = ("split", "streaming", "allow_urls", "max_pixels", "image_folder")
FORMS = (
    "a folder with pictures, the path of one or a list of them, PIL images, a datasets.Dataset, stream, file or Hub id "
    "with a column image"
)


def pictures_of(source: object, name: str = "pictures", captions: bool = False, **options: Any) -> Pictures:
    """Pictures from what people bring, none of them opened.

    Args:
        source: what `FORMS` says, or pictures already. A folder is searched through all its folders; a file
            `metadata.jsonl` in it (Hugging Face's imagefolder: file_name, text) or a .txt file of a picture's name
            beside it holds the captions.
        name: of the data, for errors.
        captions: whether captions are wanted.
        **options: `split`, `streaming`, `allow_urls`, `max_pixels`, `image_folder` as for `load`.

    Raises:
        DataError: if there are none, or the source is none of these.
        SettingsError: for an option that does not exist.
    """
    if isinstance(source, Pictures):
        return source
    if absent := [option for option in options if option not in OPTIONS]:
        raise unknown("option", absent[0], OPTIONS)
    if isinstance(source, list | tuple) and not source:
        raise DataError(f"{name} holds no picture.", f"Give {FORMS}.", "no pictures")
    if isinstance(source, str | Path) and (found := _files(Path(source))) is not None:
        if options.get("split") is not None:
            raise SettingsError(f"split={options['split']!r} is given for files.", "Only Hub ids have splits.")
        return _of_files(found, Path(source), captions, options)
    if isinstance(source, str | bytes | Path | Image.Image):
        listed: list[Any] | None = None if isinstance(source, str | Path) else [source]
    else:
        listed = _listed(source)
    if listed is not None:
        return Pictures.of(listed, _access(options), name)
    opened = open_source(source, name, **options)
    rows = opened.rows if isinstance(opened.rows, Sequence) else _streamed(opened.rows, opened.name)
    return _of_rows(rows, opened.access, opened.name, captions)


def _access(options: Mapping[str, Any]) -> ImageAccess:
    known = {name: value for name, value in options.items() if name in ("allow_urls", "max_pixels", "image_folder")}
    if known.get("image_folder") is not None:
        known["image_folder"] = Path(known["image_folder"])
    return ImageAccess(**known)


def _files(path: Path) -> list[Path] | None:
    """The pictures at a path, None where it holds rows."""
    with foreign_code(f"{str(path)[:200]!r} cannot be read", "Check the path and its permissions."):
        if path.is_file():
            return [path] if path.suffix.lower() in SUFFIXES else None
        if not path.is_dir() or any(next(path.glob(form), None) for form in ROW_FILES):
            return None
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise DataError(
            f"Folder {str(path)!r} holds no picture.",
            f"Give {FORMS}. Pictures end in {', '.join(SUFFIXES)}.",
            "no pictures",
        )
    return found


def _of_files(files: list[Path], source: Path, captions: bool, options: Mapping[str, Any]) -> Pictures:
    access = _access(options)
    paths = [str(file) for file in files]
    return Pictures(
        [
            Picture(paths, at, f"picture {file.name!r}", access, _captions_beside(file) if captions else ())
            for at, file in enumerate(files)
        ],
        source.name or str(source),
    )


def _captions_beside(file: Path) -> tuple[str, ...]:
    text = file.with_suffix(".txt")
    if not text.is_file():
        return ()
    with foreign_code(f"{str(text)!r} cannot be read", "Write captions in UTF-8, one a line."):
        return tuple(line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip())


def _listed(source: object) -> list[Any] | None:
    """Pictures that stand in a list themselves, None for rows."""
    if not isinstance(source, list | tuple) or not source or isinstance(source[0], Mapping):
        return None
    return list(source)


def _streamed(rows: Iterable[Any], name: str) -> list[Any]:
    with foreign_code(f"{name} cannot be read", "Mend the data; a stream ends where it breaks."):
        kept = list(itertools.islice(iter(rows), STREAMED + 1))
    if len(kept) > STREAMED:
        logger.warning(
            "%s is a stream: its first %d rows are kept and made something of. Give a data set with random access for "
            "all of them.",
            *(name, STREAMED),
        )
    return kept[:STREAMED]


def _of_rows(rows: Sequence[Any], access: ImageAccess, name: str, captions: bool) -> Pictures:
    if len(rows) == 0:
        raise DataError(f"{name} holds no picture.", f"Give {FORMS}.", "no pictures")
    if not isinstance(rows[0], Mapping):
        return Pictures.of(rows, access, name)
    columns = [column for column in IMAGE_COLUMNS if rows[0].get(column) is not None]
    if not columns:
        raise DataError(
            f"row 0 of {name} has no picture; it has {', '.join(sorted(map(str, rows[0]))) or 'nothing'}.",
            f"Give {FORMS}.",
            "no pictures",
        )
    sources = RowPictures(rows, columns[0])
    with Progress(len(rows) if captions else 0, f"captions of {name}", "picture", quiet_below=WORTH_A_BAR) as bar:
        made = []
        for at in range(len(rows)):
            where = f"row {at} of {name}"
            said = _captions(as_mapping(rows[at], where), where) if captions else ()
            made.append(Picture(sources, at, where, access, said))
            bar.update()
    return Pictures(made, name)


def _captions(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """What is said of the picture of a row."""
    for column in CAPTIONS_COLUMNS:
        if isinstance(row.get(column), list | tuple):
            return tuple(str(text).strip() for text in row[column] if isinstance(text, str) and text.strip())
    if not any(row.get(column) is not None for column in CAPTION_COLUMNS):
        return ()
    try:
        messages = normalise_conversation({"images": [], **_without_images(row)}, where)["messages"]
    except DataError:
        # a caption that cannot be read is none; it is counted as such
        return ()
    answers = [text_of([message]).strip() for message in messages if message["role"] == "assistant"]
    return (answers[0],) if len(answers) == 1 else ()


def _without_images(row: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of a row in which images are no matter."""

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("<image>", "").strip()
        if isinstance(value, Mapping):
            return {name: plain(inner) for name, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    return {column: plain(row[column]) for column in CAPTION_COLUMNS if row.get(column) is not None}


class RowPictures(Sequence[Any]):
    """The pictures of rows: each row is read when its picture is needed.

    Args:
        rows: with random access.
        column: that holds the picture, or a list of which it is the first.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], column: str) -> None:
        self._rows = rows
        self._column = column

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Any: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        value = self._rows[index].get(self._column)
        return (value[0] if value else None) if isinstance(value, list | tuple) else value

    def __iter__(self) -> Iterator[Any]:
        return (self[at] for at in range(len(self)))
