"""Images of a row, in whatever form people keep them: PIL, bytes, path, URL, or a row of datasets' Image feature."""

import functools
import hashlib
import io
import math
import stat
import urllib.request
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from pivot_plugin.errors import DataError, foreign_code

from .edits import is_edited, made_of, rendered

# where Pillow begins to warn of a decompression bomb; at twice this it refuses
MAX_PIXELS = 89_478_485
URL_TIMEOUT_S = 30
KEY_LENGTH = 32
EXIF_ORIENTATION = 0x0112
UNREADABLE, OVERLARGE, MISSING = "unreadable image", "over-large image", "image not found"
TOO_SMALL = "too small an image"
# what is opened at all: formats that pictures for training come in, and no document, icon or game texture
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# of a file for every pixel that an image may have: 16 bits in four channels, uncompressed
BYTES_PER_PIXEL = 8
# a processor stretches an image to patches of 14 or more pixels; of fewer pixels than these it makes a smear, and
# of a longer strip it makes nothing (Qwen's refuses it)
SMALLEST_SIDE, LONGEST_STRIP = 4, 200
REMEMBERED_IMAGES = 10_000
# decoded pictures that others are made of: those of one question, no larger than 75 MB
KEPT_BASES, LARGEST_BASE = 3, 25_000_000


@dataclass(frozen=True)
class ImageAccess:
    """How the images of a data set are found, and which are refused.

    Args:
        folder: what relative paths start from; the working directory where None.
        confined: refuse paths that leave the folder, as rows from strangers may.
        allow_urls: fetch images given by http(s) address.
        max_pixels: refuse larger images before decoding them.
        image_folder: where relative paths are looked up before `folder`.
    """

    folder: Path | None = None
    confined: bool = False
    allow_urls: bool = False
    max_pixels: int = MAX_PIXELS
    image_folder: Path | None = None

    def encoded(self, source: object, where: str) -> bytes | Image.Image:
        """The encoded bytes of an image, or the image itself where it is decoded already.

        Args:
            source: PIL image, bytes, path, URL, or mapping with `bytes` or `path`, and with `edits` where it is made
                of that (see `data.edits`).
            where: names the row in errors.

        Raises:
            DataError: if the file is missing or not allowed, or the source is of a type that is no image.
        """
        if is_edited(source):
            return rendered(source, self, where)
        if isinstance(source, Mapping):
            source = source.get("bytes") or source.get("path")
        if isinstance(source, bytes):
            return source
        if isinstance(source, Image.Image):
            return _loaded(source, where)
        if is_address(source):
            return self._fetched(str(source), where)
        if isinstance(source, str | Path):
            return self._read(source, where)
        raise DataError(
            f"{where}: an image is a {type(source).__name__}.",
            "Give a PIL image, encoded bytes, or the path of a file.",
            UNREADABLE,
        )

    def found(self, source: str | Path) -> Path | None:
        """The file of a path, None where there is none."""
        folders = (self.image_folder, self.folder or Path())
        return next((folder / source for folder in folders if folder is not None and (folder / source).is_file()), None)

    def files_of(self, source: object) -> list[Path]:
        """The files that an image may be read from, or those that it is made of; none where it is in none.

        Args:
            source: as for `encoded`.

        Raises:
            OSError, ValueError: for a path that cannot be asked.
        """
        if is_edited(source):
            return [file for one in made_of(source) for file in self.files_of(one)]
        if isinstance(source, Mapping):
            source = source.get("bytes") or source.get("path")
        if not isinstance(source, str | Path) or is_address(source):
            return []
        folders = [folder for folder in (self.image_folder, self.folder or Path()) if folder is not None]
        return [folder / source for folder in folders]

    def _folder_of(self, source: str | Path) -> Path:
        if self.image_folder is not None and (self.image_folder / source).exists():
            return self.image_folder
        return self.folder or Path()

    def _read(self, source: str | Path, where: str) -> bytes:
        tried = (self.folder or Path()) / source
        try:
            folder = self._folder_of(source)
            path = folder / source
            if self.confined and not path.resolve().is_relative_to(folder.resolve()):
                raise DataError(
                    f"{where}: image {str(source)!r} lies outside of {str(folder)!r}.",
                    "Keep the images of an archive inside it, or unpack it yourself and give the folder.",
                    "path outside its folder",
                )
            return self._file(path, source, where)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            elsewhere = self.image_folder is not None and self.image_folder / source != tried
            places = [self.image_folder / source] if self.image_folder is not None and elsewhere else []
            raise DataError(
                f"{where}: image {' nor '.join(repr(str(place)) for place in (*places, tried))} cannot be read "
                f"({reason}).",
                "Check the path and its permissions; relative paths start from image_folder= (--image-folder), where "
                "it is given, and from the data's own folder.",
                MISSING,
            ) from error

    def _file(self, path: Path, source: object, where: str) -> bytes:
        """The content of a file, which is looked at before it is opened: a pipe or a device may never end."""
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(
                f"{where}: image {str(source)!r} is a {_kind_of_file(status.st_mode)}.", "Give the path of a file."
            )
        self._bounded(status.st_size, source, where)
        with path.open("rb") as file:
            return file.read(self._most_bytes)

    @property
    def _most_bytes(self) -> int:
        """How large the file of an image may be."""
        return BYTES_PER_PIXEL * self.max_pixels + 1_000_000

    def _bounded(self, size: int, source: object, where: str) -> None:
        if size > self._most_bytes:
            raise DataError(
                f"{where}: image {str(source)!r} has {size:,} bytes or more; {self._most_bytes:,} are read for at most "
                f"{self.max_pixels:,} pixels.",
                "Scale it down, or load the data with a larger max_pixels=.",
                OVERLARGE,
            )

    def _fetched(self, url: str, where: str) -> bytes:
        if not self.allow_urls:
            raise DataError(
                f"{where}: image {url!r} is a URL, and nothing is fetched from the network unasked.",
                "Download the images and give their paths, or load the data with allow_urls=True (--allow-urls).",
                "image given as URL",
            )
        if not url.startswith(("http://", "https://")):
            raise DataError(f"{where}: image {url!r} is no http address.", "Give http(s) addresses or paths.")
        with (
            foreign_code(
                f"{where}: image {url!r} cannot be fetched", "Check the address, or leave the row out.", kind=MISSING
            ),
            urllib.request.urlopen(url, timeout=URL_TIMEOUT_S) as answer,
        ):
            content: bytes = answer.read(self._most_bytes + 1)
            self._bounded(len(content), url, where)
            return content

    def open(self, source: object, where: str = "image") -> Image.Image:
        """Decode an image to RGB: upright, first frame, 16-bit greys scaled to 8 bits.

        Args:
            source, where: as for `encoded`.

        Raises:
            DataError: if it is no image, truncated, empty, over-large or too small, or its pixels are no colours.
        """
        return self._shown(self.encoded(source, where), source, where)

    def base(self, source: object, where: str = "image") -> Image.Image:
        """As `open`, for one of which several pictures are made at once; not to be changed, since it is kept a while.

        Args:
            source, where: as for `encoded`.

        Raises:
            DataError: as `open`.
        """
        encoded = self.encoded(source, where)
        if isinstance(encoded, Image.Image):
            return self._shown(encoded, source, where)
        stored = hashlib.sha256(encoded).digest()
        if (image := _bases.get(stored)) is None or image.width * image.height > self.max_pixels:
            image = self._shown(encoded, source, where)
            if image.width * image.height <= LARGEST_BASE:
                _bases[stored] = image
            while len(_bases) > KEPT_BASES:
                _bases.popitem(last=False)
        return image

    def size(self, source: object, where: str = "image") -> tuple[int, int]:
        """Width and height of an image as `open` gives it, from its header alone.

        Args:
            source, where: as for `encoded`.

        Raises:
            DataError: as `open`.
        """
        encoded = self.encoded(source, where)
        if isinstance(encoded, Image.Image):
            width, height = encoded.size
            return (height, width) if _lies(encoded) else (width, height)
        with (
            foreign_code(f"{where} ({len(encoded)} bytes) is no image", "Replace it.", kind=UNREADABLE),
            Image.open(io.BytesIO(encoded), formats=_formats()) as image,
        ):
            return (image.height, image.width) if _lies(image) else image.size

    def key(self, source: object, where: str = "image") -> str:
        """A key that is equal for images of which the model is shown the same: the hash of what `open` gives.

        An image that was decoded lately is not decoded again.

        Args:
            source, where: as for `encoded`.

        Raises:
            DataError: as `open`.
        """
        return self.known(source, where).key

    def known(self, source: object, where: str = "image") -> "KnownImage":
        """The key of an image, as `key` gives it, and how many pixels it has.

        Args:
            source, where: as for `encoded`.

        Raises:
            DataError: as `open`.
        """
        encoded = self.encoded(source, where)
        if isinstance(encoded, Image.Image):
            shown = self._shown(encoded, source, where)
            return KnownImage(pixel_key(shown), shown.width * shown.height)
        stored = hashlib.sha256(encoded).digest()
        remembered = _known_images.get(stored)
        if remembered is None or remembered.pixels > self.max_pixels:
            image = self._shown(encoded, source, where)
            remembered = _known_images[stored] = KnownImage(pixel_key(image), image.width * image.height)
            if len(_known_images) > REMEMBERED_IMAGES:
                _known_images.popitem(last=False)
        return remembered

    def stored_key(self, source: object, where: str = "image") -> str:
        """As `key`, without decoding what is encoded: one that differs for the same picture in two files.

        Args:
            source, where: as for `encoded`.

        Raises:
            DataError: as `open`, for images that are decoded; as `encoded` for others.
        """
        encoded = self.encoded(source, where)
        if isinstance(encoded, Image.Image):
            return pixel_key(self._shown(encoded, source, where))
        return hashlib.sha256(encoded).hexdigest()[:KEY_LENGTH]

    def _shown(self, encoded: bytes | Image.Image, source: object, where: str) -> Image.Image:
        """An image as the model's processor gets it."""
        name = f"image {str(source)!r}" if isinstance(source, str | Path) else "an image"
        size = f" ({len(encoded)} bytes)" if isinstance(encoded, bytes) else ""
        with foreign_code(
            f"{where}: {name}{size} is unreadable or truncated",
            "Replace the file, or leave the row out.",
            kind="empty image" if isinstance(encoded, bytes) and not encoded else UNREADABLE,
        ):
            if isinstance(encoded, Image.Image):
                self._check_size(encoded, name, where)
                return _rgb(encoded, name, where)
            try:
                with Image.open(io.BytesIO(encoded), formats=_formats()) as image:
                    self._check_size(image, name, where)
                    return _rgb(image, name, where)
            except Image.DecompressionBombError as error:
                raise DataError(f"{where}: {name} is over-large: {error}.", "Scale it down.", OVERLARGE) from error

    def _check_size(self, image: Image.Image, name: str, where: str) -> None:
        shorter, longer = sorted(image.size)
        if image.width * image.height > self.max_pixels:
            raise DataError(
                f"{where}: {name} has {image.width} x {image.height} pixels, more than {self.max_pixels:,}.",
                f"Scale it down, or load the data with a larger max_pixels= (up to {2 * MAX_PIXELS:,}).",
                OVERLARGE,
            )
        if shorter < SMALLEST_SIDE or longer > LONGEST_STRIP * shorter:
            raise DataError(
                f"{where}: {name} has {image.width} x {image.height} pixels, of which no processor makes a picture.",
                f"Give images of at least {SMALLEST_SIDE} pixels a side, none more than {LONGEST_STRIP} times as long "
                "as wide, or leave the row out.",
                TOO_SMALL,
            )


class KnownImage(NamedTuple):
    """What is remembered of an encoded image: the key of what it shows, and how many pixels that has."""

    key: str
    pixels: int


_known_images: OrderedDict[bytes, KnownImage] = OrderedDict()
_bases: OrderedDict[bytes, Image.Image] = OrderedDict()


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _kind_of_file(mode: int) -> str:
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((name for test, name in kinds.items() if test(mode)), "device")


def _loaded(image: Image.Image, where: str) -> Image.Image:
    """An image whose file, which Pillow opens but reads late, is read to its end."""
    with foreign_code(
        f"{where}: an image is unreadable or truncated", "Replace the file, or leave the row out.", kind=UNREADABLE
    ):
        image.load()
    return image


def _lies(image: Image.Image) -> bool:
    """Whether an image is stored on its side."""
    return image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)


def _rgb(image: Image.Image, name: str, where: str) -> Image.Image:
    """An image upright and in colours of 8 bits.

    Args:
        image: decoded or not.
        name, where: of it, for errors.

    Raises:
        DataError: for pixels of which nobody knows how bright they are.
    """
    upright = ImageOps.exif_transpose(image)
    if not upright.mode.startswith(("I", "F")):
        return upright.convert("RGB")
    # of one channel; Pillow clips what is above 255 instead of scaling it
    lowest, highest = (float(value) for value in upright.getextrema())  # type: ignore[arg-type]
    is_float = upright.mode.startswith("F")
    if not (math.isfinite(lowest) and math.isfinite(highest)) or lowest < 0 or highest > (255 if is_float else 65535):
        raise DataError(
            f"{where}: {name} has pixels from {lowest:g} to {highest:g} ({upright.mode}), of which nobody knows what "
            "is white.",
            "Save it in 8 bits; numbers from 0 to 1, 255 or (whole ones) 65,535 are scaled.",
            UNREADABLE,
        )
    if is_float:
        scale = 255.0 if highest <= 1 else 1.0
        return upright.point(lambda value: value * scale + 0.5).convert("L").convert("RGB")
    # 32-bit integers hold 8 bits as well as 16
    if highest > 255 or upright.mode != "I":
        upright = upright.convert("I").point(lambda value: value * (1 / 256))
    return upright.convert("L").convert("RGB")


def is_address(source: object) -> bool:
    """Whether an image is given by its address on the network."""
    return isinstance(source, str) and "://" in source


def pixel_key(image: Image.Image) -> str:
    """The key of an image that `ImageAccess.open` gave."""
    return hashlib.sha256(f"{image.width} x {image.height} ".encode() + image.tobytes()).hexdigest()[:KEY_LENGTH]


def image_set_key(keys: Sequence[str]) -> str:
    """The key of an image set, by those of its images; "" for none."""
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:KEY_LENGTH] if keys else ""
