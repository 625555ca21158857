"""Images of a row, in whatever form people keep them: PIL, bytes, path, URL, or a row of datasets' Image feature."""

import hashlib
import io
import struct
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from pivot_plugin.errors import DataError

# where Pillow begins to warn of a decompression bomb; at twice this it refuses
MAX_PIXELS = 89_478_485
URL_TIMEOUT_S = 30
KEY_LENGTH = 32
EXIF_ORIENTATION = 0x0112
UNREADABLE, OVERLARGE, MISSING = "unreadable image", "over-large image", "image not found"


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
            source: PIL image, bytes, path, URL, or mapping with `bytes` or `path`.
            where: names the row in errors.

        Raises:
            DataError: if the file is missing or not allowed, or the source is of a type that is no image.
        """
        if isinstance(source, Mapping):
            source = source.get("bytes") or source.get("path")
        if isinstance(source, bytes):
            return source
        if isinstance(source, Image.Image):
            return _loaded(source, where)
        if isinstance(source, str) and "://" in source:
            return self._fetched(source, where)
        if isinstance(source, str | Path):
            return self._read(source, where)
        raise DataError(
            f"{where}: an image is a {type(source).__name__}.",
            "Give a PIL image, encoded bytes, or the path of a file.",
            UNREADABLE,
        )

    def _read(self, source: str | Path, where: str) -> bytes:
        folder = self.folder or Path()
        tried = folder / source
        try:
            if self.image_folder is not None and (self.image_folder / source).exists():
                folder = self.image_folder
            path = folder / source
            if self.confined and not path.resolve().is_relative_to(folder.resolve()):
                raise DataError(
                    f"{where}: image {str(source)!r} lies outside of {str(folder)!r}.",
                    "Keep the images of an archive inside it, or unpack it yourself and give the folder.",
                    "path outside its folder",
                )
            return path.read_bytes()
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

    def _fetched(self, url: str, where: str) -> bytes:
        if not self.allow_urls:
            raise DataError(
                f"{where}: image {url!r} is a URL, and nothing is fetched from the network unasked.",
                "Download the images and give their paths, or load the data with allow_urls=True (--allow-urls).",
                "image given as URL",
            )
        if not url.startswith(("http://", "https://")):
            raise DataError(f"{where}: image {url!r} is no http address.", "Give http(s) addresses or paths.")
        try:
            with urllib.request.urlopen(url, timeout=URL_TIMEOUT_S) as answer:
                content: bytes = answer.read()
                return content
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise DataError(
                f"{where}: image {url!r} cannot be fetched ({error}).",
                "Check the address, or leave the row out.",
                MISSING,
            ) from error

    def open(self, source: object, where: str = "image") -> Image.Image:
        """Decode an image to RGB: upright, first frame, 16-bit greys scaled to 8 bits.

        Args:
            source, where: as for `encoded`.

        Raises:
            DataError: if it is no image, truncated, empty or over-large.
        """
        encoded = self.encoded(source, where)
        if isinstance(encoded, Image.Image):
            return _rgb(encoded)
        return self._decoded(encoded, source, where)

    def size(self, source: object, where: str = "image") -> tuple[int, int]:
        """Width and height of an image as `open` gives it, from its header alone.

        Args:
            source, where: as for `encoded`.

        Raises:
            DataError: as `open`.
        """
        encoded = self.encoded(source, where)
        if isinstance(encoded, Image.Image):
            return encoded.size
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else image.size
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, struct.error) as error:
            raise DataError(
                f"{where} ({len(encoded)} bytes) is no image: {error}.", "Replace it.", UNREADABLE
            ) from error

    def check(self, encoded: bytes | Image.Image, source: object, where: str) -> None:
        """Make sure that an image can be decoded to its end, at the lowest resolution its format allows.

        Raises:
            DataError: as `open`.
        """
        if isinstance(encoded, bytes):
            self._decoded(encoded, source, where, lowest=True)

    def _decoded(self, encoded: bytes, source: object, where: str, lowest: bool = False) -> Image.Image:
        name = f"image {str(source)!r}" if isinstance(source, str | Path) else "an image"
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                if image.width * image.height > self.max_pixels:
                    raise DataError(
                        f"{where}: {name} has {image.width} x {image.height} pixels, more than {self.max_pixels:,}.",
                        f"Scale it down, or load the data with a larger max_pixels= (up to {2 * MAX_PIXELS:,}).",
                        OVERLARGE,
                    )
                if not lowest:
                    return _rgb(image)
                # a JPEG is read to its end at an eighth of its size, which finds a truncated one
                image.draft(None, (1, 1))
                image.load()
                return image
        except Image.DecompressionBombError as error:
            raise DataError(f"{where}: {name} is over-large: {error}.", "Scale it down.", OVERLARGE) from error
        # what a broken file makes Pillow's decoders raise is not one family of errors
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
            raise DataError(
                f"{where}: {name} ({len(encoded)} bytes) is unreadable or truncated: {error}.",
                "Replace the file, or leave the row out.",
                "empty image" if not encoded else UNREADABLE,
            ) from error


def _loaded(image: Image.Image, where: str) -> Image.Image:
    """An image whose file, which Pillow opens but reads late, is read to its end."""
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(
            f"{where}: an image is unreadable or truncated: {error}.",
            "Replace the file, or leave the row out.",
            UNREADABLE,
        ) from error
    return image


def _rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # Pillow clips what is above 255 instead of scaling it
        _, highest = upright.getextrema()
        if isinstance(highest, int | float) and highest > 255:
            upright = upright.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return upright.convert("RGB")


def content_key(encoded: Sequence[bytes | Image.Image]) -> str:
    """A key that is equal for equal image sets: the hash of their contents, "" for none."""
    if not encoded:
        return ""
    digest = hashlib.sha256()
    for content in encoded:
        if isinstance(content, Image.Image):
            digest.update(f"{content.mode}{content.size}".encode())
            content = content.tobytes()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:KEY_LENGTH]
