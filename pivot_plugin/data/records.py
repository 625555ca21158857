"""One look at every row: can it be used, and the few numbers from which a whole data set is judged.

A record is small and holds no text and no image, so that a million of them pass through in little memory; looking is
spread over processes, because reading and decoding images is what it costs.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from pivot_plugin.errors import DataError, foreign_code
from pivot_plugin.progress import Progress

from .edits import is_edited, unedited
from .images import ImageAccess, image_set_key
from .layout import text_of
from .pixels import PixelStatistics, pixel_statistics

SPECIAL = re.compile(r"</?(?:think|answer|tool_call|image|img|video|box|ref|s|pad|unk|bos|eos)>|<\|[^|<>]{1,40}\|>")
ROWS_PER_TASK = 64
WORTH_PROCESSES = 1000
LARGEST_POOL = 16


class RowRecord(NamedTuple):
    """What one look at a row tells.

    Attributes:
        key: of its image set, "" for none.
        error: (finding, remedy, kind) where the row cannot be used, else None.
        images: how many it shows.
        rejected_key: of the image set that its chosen answer is not right of, "" for none.
        chosen, rejected: lengths of the answers in characters; for a question both are 0.
        pair: hash of images, prompt and both answers, whichever way round they stand.
        turned: whether the rejected answer sorts before the chosen one.
        reversed: whether the rejected answer has the higher score.
        near: whether the answers differ only in case, spaces or punctuation.
        special: special tokens found in the texts.
        tokens: tokens of prompt and chosen answer, of prompt and rejected answer, and of the images; None without a
            processor.
        pixels: statistics of its first image that has a rejected one, and of that; None where they are not asked for.
        origin: key of the picture that the row's first edited image is made of, "" where none is edited.
    """

    key: str
    error: tuple[str, str, str] | None = None
    images: int = 0
    chosen: int = 0
    rejected: int = 0
    pair: int = 0
    turned: bool = False
    reversed: bool = False
    near: bool = False
    special: tuple[str, ...] = ()
    tokens: tuple[int, int, int] | None = None
    rejected_key: str = ""
    pixels: tuple[PixelStatistics, PixelStatistics] | None = None
    origin: str = ""


class Rows(Protocol):
    """Rows in the normal form that can be looked at one by one."""

    @property
    def access(self) -> ImageAccess: ...

    def __len__(self) -> int: ...

    def plain(self, position: int) -> dict[str, Any]: ...

    def where(self, position: int) -> str: ...


# is given a row in the normal form, access to its images and its name, and raises a DataError
Judge = Callable[[dict[str, Any], ImageAccess, str], None]
TokenCounter = Callable[[dict[str, Any]], tuple[int, int, int]]


def inspect_row(
    row: dict[str, Any],
    access: ImageAccess,
    where: str,
    count: TokenCounter | None = None,
    pixels: bool = False,
) -> RowRecord:
    """Look at one row in the normal form, decoding each of its images once.

    Args:
        row: a pair, or a question without answers.
        access: to its images.
        where: names the row in errors.
        count: counts the tokens of a pair whose images are decoded.
        pixels: whether a picture and the one rejected for it are measured.

    Raises:
        DataError: if an image cannot be used, or nothing is left to be told apart.
    """
    images = len(row["images"])
    keys = [access.key(source, where) for source in row["images"]]
    key = image_set_key(keys)
    origin = origin_of(row, access, where)
    if "chosen" not in row:
        return RowRecord(key, images=images, origin=origin)
    chosen, rejected = text_of(row["chosen"]), text_of(row["rejected"])
    rejected_keys = [access.key(source, f"{where}, rejected image") for source in row.get("rejected_images", ())]
    rejected_key = image_set_key(rejected_keys)
    refuse_equal(row, key, rejected_key, where)
    shown = [key, rejected_key] if rejected_key else [key]
    identity = "\x1f".join([*shown, str(row["prompt"]), *sorted((chosen, rejected))])
    tokens = None
    measured = None
    differ = [n for n, (one, other) in enumerate(zip(keys, rejected_keys, strict=False)) if one != other]
    if pixels and differ:
        true, other = (row[name][differ[0]] for name in ("images", "rejected_images"))
        measured = pixel_statistics(access.open(true, where)), pixel_statistics(access.open(other, where))
    if count is not None:
        opened = [access.open(source, where) for source in row["images"]]
        with foreign_code(f"{where} cannot be processed", "Mend the row, or leave it out."):
            tokens = count({**row, "images": opened})
    return RowRecord(
        key,
        None,
        images,
        len(chosen),
        len(rejected),
        int.from_bytes(hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[:8], "big", signed=True),
        rejected < chosen,
        row.get("score_rejected", 0.0) > row.get("score_chosen", row.get("score_rejected", 0.0)),
        _bare(chosen) == _bare(rejected),
        tuple(
            sorted(set(SPECIAL.findall(chosen) + SPECIAL.findall(rejected) + SPECIAL.findall(text_of(row["prompt"]))))
        ),
        tokens,
        rejected_key,
        measured,
        origin,
    )


def refuse_equal(pair: Mapping[str, Any], image_key: str, rejected_key: str, where: str) -> None:
    """Refuse a pair of one answer about one picture.

    Args:
        pair: in the normal form.
        image_key, rejected_key: of its images and of its rejected ones, "" for none.
        where: names it in errors.

    Raises:
        DataError: saying so.
    """
    if image_key == rejected_key and text_of(pair["chosen"]) == text_of(pair["rejected"]):
        raise DataError(
            f"{where}: chosen and rejected answer are equal, and so are their images.",
            "Nothing can be learnt from such a pair; drop it.",
            "equal answers",
        )


def origin_of(row: Mapping[str, Any], access: ImageAccess, where: str) -> str:
    """Key of the picture that a row's first edited image is made of, "" where none is edited."""
    first = next((unedited(source) for source in row["images"] if is_edited(source)), None)
    return "" if first is None else access.stored_key(first, where)


def _bare(text: str) -> str:
    # where nothing but punctuation is said, the punctuation is the answer
    return re.sub(r"[\W_]+", "", text).casefold() or text


def inspect_rows(
    rows: Rows,
    name: str,
    count: TokenCounter | None = None,
    pixels: bool = False,
) -> Iterator[RowRecord]:
    """Look at every row, in order, over several processes where there are many.

    Args:
        rows: to look at.
        name: of the data, for the progress bar.
        count: as for `inspect_row`.
        pixels: as for `inspect_row`.

    Returns:
        a record per row; one with `error` where the row cannot be used.
    """
    many = len(rows) >= WORTH_PROCESSES
    looked = DataLoader(
        _Looked(rows, count, pixels),
        batch_size=ROWS_PER_TASK,
        collate_fn=list,
        num_workers=min(os.cpu_count() or 1, LARGEST_POOL) if many else 0,
        # else it draws from the global one, and looking would change what is sampled or shuffled later
        generator=torch.Generator(),
    )
    with Progress(len(rows), f"checking {name}", quiet_below=WORTH_PROCESSES) as bar:
        for records in looked:
            yield from records
            bar.update(len(records))


class _Looked(Dataset[RowRecord]):
    """Records of rows, in whichever process asks."""

    def __init__(self, rows: Rows, count: TokenCounter | None, pixels: bool) -> None:
        self._rows = rows
        self._count = count
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> RowRecord:
        try:
            row = self._rows.plain(position)
            where = self._rows.where(position)
            return inspect_row(row, self._rows.access, where, self._count, self._pixels)
        except DataError as error:
            return RowRecord("", (error.finding, error.remedy, error.kind))
