"""One look at every row: can it be used, and the few numbers from which a whole data set is judged.

A record is small and holds no text and no image, so that a million of them pass through in little memory; looking is
spread over processes, because reading and decoding images is what it costs.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from pivot_plugin.errors import DataError, foreign_code

from .images import ImageAccess, image_set_key
from .layout import text_of

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
        chosen, rejected: lengths of the answers in characters; for a question both are 0.
        pair: hash of images, prompt and both answers, whichever way round they stand.
        turned: whether the rejected answer sorts before the chosen one.
        reversed: whether the rejected answer has the higher score.
        near: whether the answers differ only in case, spaces or punctuation.
        special: special tokens found in the texts.
        tokens: tokens of prompt and chosen answer, of prompt and rejected answer, and of the images; None without a
            processor.
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


def inspect_row(row: dict[str, Any], access: ImageAccess, where: str, count: TokenCounter | None = None) -> RowRecord:
    """Look at one row in the normal form, decoding each of its images once.

    Args:
        row: a pair, or a question without answers.
        access: to its images.
        where: names the row in errors.
        count: counts the tokens of a pair whose images are decoded.

    Raises:
        DataError: if an image cannot be used.
    """
    images = len(row["images"])
    key = image_set_key([access.key(source, where) for source in row["images"]])
    if "chosen" not in row:
        return RowRecord(key, images=images)
    chosen, rejected = text_of(row["chosen"]), text_of(row["rejected"])
    identity = "\x1f".join([key, str(row["prompt"]), *sorted((chosen, rejected))])
    tokens = None
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
    )


def _bare(text: str) -> str:
    # where nothing but punctuation is said, the punctuation is the answer
    return re.sub(r"[\W_]+", "", text).casefold() or text


def inspect_rows(
    rows: Rows,
    name: str,
    count: TokenCounter | None = None,
) -> Iterator[RowRecord]:
    """Look at every row, in order, over several processes where there are many.

    Args:
        rows: to look at.
        name: of the data, for the progress bar.
        count: as for `inspect_row`.

    Returns:
        a record per row; one with `error` where the row cannot be used.
    """
    many = len(rows) >= WORTH_PROCESSES
    looked = DataLoader(
        _Looked(rows, count),
        batch_size=ROWS_PER_TASK,
        collate_fn=list,
        num_workers=min(os.cpu_count() or 1, LARGEST_POOL) if many else 0,
        # else it draws from the global one, and looking would change what is sampled or shuffled later
        generator=torch.Generator(),
    )
    with tqdm(total=len(rows), desc=f"checking {name}", disable=not many, leave=False) as bar:
        for records in looked:
            yield from records
            bar.update(len(records))


class _Looked(Dataset[RowRecord]):
    """Records of rows, in whichever process asks."""

    def __init__(self, rows: Rows, count: TokenCounter | None) -> None:
        self._rows = rows
        self._count = count

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> RowRecord:
        try:
            row = self._rows.plain(position)
            where = self._rows.where(position)
            return inspect_row(row, self._rows.access, where, self._count)
        except DataError as error:
            return RowRecord("", (error.finding, error.remedy, error.kind))
