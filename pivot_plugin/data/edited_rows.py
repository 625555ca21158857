"""Rows with edited images as a file of JSON lines: the edits are written, and the pictures stay where they are."""

import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from pivot_plugin.errors import DataError
from pivot_plugin.progress import Progress

from .edits import EDITS, is_edited, unedited
from .images import ImageAccess

PICTURES_FOLDER = "pictures"
WORTH_A_BAR = 500


def write_rows(rows: Iterable[Mapping[str, Any]], file: Path, folder: Path, access: ImageAccess, total: int) -> None:
    """Write rows as JSON lines; a picture that is no file is written once, however many rows are made of it.

    Args:
        rows: with `images`, edited ones among them.
        file: of JSON lines, in a folder that exists.
        folder: where the file will lie in the end, for paths of pictures from there.
        access: to the images.
        total: of rows, for the bar.

    Raises:
        DataError: for an image that cannot be read.
        OSError: if the file cannot be written.
    """
    with (
        file.open("w", encoding="utf-8") as lines,
        Progress(total, f"writing {file.name}", quiet_below=WORTH_A_BAR) as bar,
    ):
        for number, row in enumerate(rows):
            where = f"row {number}"
            images = [_portable(source, file.parent, folder, access, where) for source in row["images"]]
            lines.write(json.dumps({**row, "images": images}, ensure_ascii=False) + "\n")
            bar.update()


def _portable(source: Any, aside: Path, folder: Path, access: ImageAccess, where: str) -> Any:
    """An image as JSON can keep it, whatever it is made of."""
    base = _kept(unedited(source), aside, folder, access, where)
    if not is_edited(source):
        return base
    edits = [
        {
            name: _portable(value, aside, folder, access, where) if name == "picture" else value
            for name, value in step.items()
        }
        for step in source[EDITS]
    ]
    return {"path": base, EDITS: edits}


def _kept(source: object, aside: Path, folder: Path, access: ImageAccess, where: str) -> str:
    """The path of a picture from the folder of its rows; one that is no file is written there under its key."""
    path = source.get("path") if isinstance(source, Mapping) and not source.get("bytes") else source
    if isinstance(path, str | Path):
        if "://" in str(path):
            return str(path)
        found = access.found(path)
        if found is not None:
            return _from(folder, found)
    key = access.stored_key(source, where)
    encoded = access.encoded(source, where)
    suffix = "png" if isinstance(encoded, Image.Image) else _suffix(encoded, where)
    written = aside / PICTURES_FOLDER / f"{key}.{suffix}"
    if not written.exists():
        written.parent.mkdir(exist_ok=True)
        if isinstance(encoded, Image.Image):
            encoded.save(written)
        else:
            written.write_bytes(encoded)
    return f"{PICTURES_FOLDER}/{written.name}"


def _from(folder: Path, path: Path) -> str:
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    # on another drive
    except ValueError:
        return str(path.resolve())


def _suffix(encoded: bytes, where: str) -> str:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return (image.format or "png").lower()
    except OSError as error:
        raise DataError(f"{where}: an image is unreadable.", "Replace it, or leave the row out.") from error
