"""What one look at rows tells of each, in flat arrays: a million rows take some 80 MB."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from .images import KEY_LENGTH, ImageAccess, KnownImage, image_set_key
from .layout import text_of
from .records import origin_of, refuse_equal

TEXTS = ("prompt", "chosen", "rejected", "messages")
CONTENT_LENGTH = 32


@dataclass(frozen=True)
class Looks:
    """What is known of rows that were looked at.

    Attributes:
        keys: (rows,) of their image sets, empty for none.
        rejected_keys: (rows,) of the image sets that their chosen answers are not right of, empty for none.
        origins: (rows,) of the pictures that their first edited images are made of, empty where none is edited.
        contents: (rows, 32) bytes, hashes of image sets and texts.
        pixels: (rows,) of all their images.
        characters: (rows,) of their texts.
    """

    keys: np.ndarray
    rejected_keys: np.ndarray
    origins: np.ndarray
    contents: np.ndarray
    pixels: np.ndarray
    characters: np.ndarray

    @classmethod
    def empty(cls, rows: int) -> Self:
        """Of rows that are yet to be looked at."""
        return cls(
            np.zeros(rows, dtype=f"S{KEY_LENGTH}"),
            np.zeros(rows, dtype=f"S{KEY_LENGTH}"),
            np.zeros(rows, dtype=f"S{KEY_LENGTH}"),
            np.zeros((rows, CONTENT_LENGTH), dtype=np.uint8),
            np.zeros(rows, dtype=np.int64),
            np.zeros(rows, dtype=np.int32),
        )

    def __len__(self) -> int:
        return len(self.keys)

    def at(self, positions: Any) -> "Looks":
        """Those of some rows."""
        return Looks(**{name: values[positions] for name, values in vars(self).items()})

    def put(self, start: int, others: "Looks") -> None:
        """Fill in what was found of the rows from a position on."""
        for name, values in vars(others).items():
            getattr(self, name)[start : start + len(values)] = values


def look_at(
    row: Mapping[str, Any], access: ImageAccess, where: str, know: Callable[[object, str], KnownImage] | None = None
) -> Looks:
    """Look at one row, decoding each of its images once.

    Args:
        row: in the normal form, its images as they stand in the source.
        access: to its images.
        where: names the row in errors.
        know: tells of an image, by what stands in the row and the name of the row; `access.known` where None.

    Raises:
        DataError: if an image cannot be used, or nothing is left to be told apart.
    """
    know = know or access.known
    images = [know(source, where) for source in row["images"]]
    key = image_set_key([image.key for image in images])
    rejected_key = ""
    if "chosen" in row:
        rejected_key = image_set_key(
            [know(source, f"{where}, rejected image").key for source in row.get("rejected_images", ())]
        )
        refuse_equal(row, key, rejected_key, where)
    characters = sum(len(text_of(row[name])) for name in TEXTS if name in row)
    return Looks(
        np.array([key.encode()], dtype=f"S{KEY_LENGTH}"),
        np.array([rejected_key.encode()], dtype=f"S{KEY_LENGTH}"),
        np.array([origin_of(row, access, where).encode()], dtype=f"S{KEY_LENGTH}"),
        np.frombuffer(content_of(row, key, rejected_key), dtype=np.uint8)[None],
        np.array([sum(image.pixels for image in images)], dtype=np.int64),
        np.array([characters], dtype=np.int32),
    )


def content_of(row: Mapping[str, Any], image_key: str, rejected_key: str = "") -> bytes:
    """A hash that is equal for rows with equal images and texts.

    Args:
        row: in the normal form.
        image_key, rejected_key: of its images and of its rejected ones, "" for none.
    """
    texts = [row[name] for name in TEXTS if name in row]
    keys = [image_key, rejected_key] if rejected_key else [image_key]
    return hashlib.sha256(json.dumps([*keys, texts]).encode()).digest()
