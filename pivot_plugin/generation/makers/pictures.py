"""Pictures to make something of: where they are, how large, what is said of them. None is kept decoded, but a thumb."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, overload

import numpy as np
from PIL import Image

from pivot_plugin.data.edits import edited
from pivot_plugin.data.images import ImageAccess

T = TypeVar("T")
THUMB = 32
REMEMBERED_THUMBS = 20_000


class Thumbs:
    """Thumbs of the pictures looked at lately, by their place among all pictures."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def of(self, picture: "Picture") -> np.ndarray:
        """(THUMB, THUMB, 3) colours from 0 to 255."""
        if (kept := self._kept.get(picture.index)) is None:
            small = picture.open().resize((THUMB, THUMB), Image.Resampling.BOX, reducing_gap=2.0)
            kept = self._kept[picture.index] = np.asarray(small, dtype=np.uint8)
            if len(self._kept) > REMEMBERED_THUMBS:
                self._kept.popitem(last=False)
        return kept.astype(np.float32)


@dataclass(frozen=True)
class Picture:
    """One picture, not opened.

    Attributes:
        sources: of all pictures, whatever a row's `images` may hold.
        at: its place among them.
        where: names it in errors.
        access: to it.
        captions: what is said of it, none for nothing.
        size: (width, height) in pixels, (0, 0) where nobody has looked.
        index: its place among those that a maker may use.
    """

    sources: Sequence[Any] = field(repr=False, compare=False)
    at: int
    where: str
    access: ImageAccess
    captions: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    index: int = 0
    thumbs: Thumbs = field(default_factory=Thumbs, compare=False, repr=False)

    @property
    def source(self) -> Any:
        """Whatever a row's `images` may hold."""
        return self.sources[self.at]

    def open(self) -> Image.Image:
        """The picture, decoded, RGB and upright.

        Raises:
            DataError: if it cannot be used.
        """
        return self.access.open(self.source, self.where)

    def looked_at(self) -> "Picture":
        """The same picture with its size, read from its header where nobody has.

        Raises:
            DataError: if it is no image.
        """
        return self if self.size != (0, 0) else replace(self, size=self.access.size(self.source, self.where))

    def edited(self, *edits: Any) -> dict[str, Any]:
        """The picture with edits that are done when it is opened (`data.edits`)."""
        return edited(self.source, *edits)

    @property
    def thumb(self) -> np.ndarray:
        """(THUMB, THUMB, 3) a coarse look at it, colours from 0 to 255; opens it at the first time."""
        return self.thumbs.of(self)


class Pictures(Sequence[Picture]):
    """Pictures in a fixed order.

    Args:
        pictures: to be numbered anew.
        name: of the data, for errors.
    """

    def __init__(self, pictures: Sequence[Picture], name: str = "pictures") -> None:
        self.thumbs = Thumbs()
        self._pictures = [replace(one, index=index, thumbs=self.thumbs) for index, one in enumerate(pictures)]
        self._once: dict[str, Any] = {}
        self.name = name

    @classmethod
    def of(cls, sources: Sequence[Any], access: ImageAccess | None = None, name: str = "pictures") -> "Pictures":
        """Pictures of images as rows hold them.

        Args:
            sources: whatever a row's `images` may hold; each is asked for when it is needed.
            access: to them.
            name: of the data, for errors.
        """
        reads = access or ImageAccess()
        return cls([Picture(sources, at, f"picture {at} of {name}", reads) for at in range(len(sources))], name)

    def once(self, key: str, compute: Callable[[], T]) -> T:
        """Something about all of these pictures, computed when it is asked for the first time.

        Args:
            key: its name.
            compute: gives it.
        """
        if key not in self._once:
            self._once[key] = compute()
        value: T = self._once[key]
        return value

    def __len__(self) -> int:
        return len(self._pictures)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> list[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | list[Picture]:
        return self._pictures[index]

    def __iter__(self) -> Iterator[Picture]:
        return iter(self._pictures)
