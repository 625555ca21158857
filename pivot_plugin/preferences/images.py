"""Images of a pair, in whatever form people keep them: PIL, bytes, path, or a row of datasets' Image feature."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pivot_plugin.errors import DataError


def image_bytes(source: object, folder: Path | None, where: str) -> bytes | Image.Image:
    """The encoded bytes of an image, or the image itself where it is decoded already.

    Args:
        source: PIL image, bytes, path, or mapping with `bytes` or `path`.
        folder: what relative paths start from; the working directory where None.
        where: names the row in errors.

    Raises:
        DataError: if the file is missing, the source is a URL, or of a type that is no image.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image | bytes):
        return source
    if isinstance(source, str) and "://" in source:
        raise DataError(
            f"{where}: image {source!r} is a URL, and nothing is fetched from the network during training.",
            "Download the images and give their paths.",
        )
    if isinstance(source, str | Path):
        path = Path(folder or ".", source)
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{where}: image {str(path)!r} cannot be read ({error.strerror or error}).",
                "Check the path and its permissions; relative paths start from the data's own folder.",
            ) from error
    raise DataError(
        f"{where}: an image is a {type(source).__name__}.", "Give a PIL image, encoded bytes, or the path of a file."
    )


def open_image(source: object, folder: Path | None = None, where: str = "image") -> Image.Image:
    """Decode an image to RGB.

    Args:
        source, folder, where: as for `image_bytes`.

    Raises:
        DataError: if it is no image, truncated or empty.
    """
    encoded = image_bytes(source, folder, where)
    if isinstance(encoded, Image.Image):
        return encoded.convert("RGB")
    name = f"image {str(source)!r}" if isinstance(source, str | Path) else "an image"
    try:
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{where}: {name} ({len(encoded)} bytes) is unreadable or truncated: {error}.",
            "Replace the file, or leave the row out.",
        ) from error


def image_key(sources: list[object], folder: Path | None, where: str) -> str:
    """A key that is equal for equal image sets: the hash of their contents, "" for none."""
    if not sources:
        return ""
    digest = hashlib.sha256()
    for source in sources:
        encoded = image_bytes(source, folder, where)
        if isinstance(encoded, Image.Image):
            digest.update(f"{encoded.mode}{encoded.size}".encode())
            encoded = encoded.tobytes()
        digest.update(hashlib.sha256(encoded).digest())
    return digest.hexdigest()
