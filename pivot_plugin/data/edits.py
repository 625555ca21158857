"""Pictures that are made of others when they are needed: a source and the edits that are done to it, as plain data.

A row keeps {"path": "a.jpg", "edits": [{"edit": "view", "box": [0, 0, 0.5, 0.5], "size": [224, 224]}]} where it would
keep an image. That goes into JSON, is rendered whenever the image is opened, and is never stored beside what it is made
of. Boxes are (left, top, right, bottom) in shares of the picture's width and height.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import numpy as np
from PIL import Image, ImageFilter

from pivot_plugin.errors import DataError, foreign_code, unknown

EDITS = "edits"
# of one image, those of what is pasted into it counted
MOST_EDITS = 200
GREY = (127, 127, 127)
# JPEG keeps colours for every pixel, every second along one axis, or along both
COARSE = 4
_TURNS = {
    90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_90,
}
_MIRRORS = {"left-right": Image.Transpose.FLIP_LEFT_RIGHT, "upside-down": Image.Transpose.FLIP_TOP_BOTTOM}


class Opener(Protocol):
    """Opens images, those that are edited too."""

    @property
    def max_pixels(self) -> int: ...

    def open(self, source: object, where: str) -> Image.Image: ...

    def base(self, source: object, where: str) -> Image.Image: ...


def is_edited(source: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether an image of a row is one that is made of another."""
    return isinstance(source, Mapping) and source.get(EDITS) is not None


def edited(source: object, *edits: Mapping[str, Any]) -> dict[str, Any]:
    """An image with edits that are done to it when it is opened.

    Args:
        source: whatever `ImageAccess.open` takes; of one that is edited already the edits go on.
        *edits: as the functions of this module make them.
    """
    if isinstance(source, Mapping):
        return {**source, EDITS: [*(source.get(EDITS) or ()), *edits]}
    if isinstance(source, bytes):
        return {"bytes": source, EDITS: list(edits)}
    if isinstance(source, Image.Image):
        return {"image": source, EDITS: list(edits)}
    return {"path": str(source), EDITS: list(edits)}


def unedited(source: object) -> object:
    """What an image is made of, first of all; itself where it is not edited."""
    if not (isinstance(source, Mapping) and is_edited(source)):
        return source
    if source.get("image") is not None:
        return source["image"]
    return {name: value for name, value in source.items() if name != EDITS}


def made_of(source: object) -> list[object]:
    """The pictures that an image is made of: its own, and those pasted into it; itself where it is not edited."""
    if not is_edited(source):
        return [source]
    pasted = [step["picture"] for step in _steps(source) if isinstance(step, Mapping) and "picture" in step]
    return [unedited(source), *(one for picture in pasted for one in made_of(picture))]


def rendered(source: Mapping[str, Any], opener: Opener, where: str) -> Image.Image:
    """An image with its edits done.

    Args:
        source: with `edits`.
        opener: of what it is made of.
        where: names the row in errors.

    Raises:
        DataError: if an edit is unknown or cannot be done.
    """
    if _count(source) > MOST_EDITS:
        raise DataError(f"{where}: an image has more than {MOST_EDITS} edits.", "Mend the row.")
    picture = base = opener.base(unedited(source), where)
    for number, step in enumerate(_steps(source)):
        name = step.get("edit") if isinstance(step, Mapping) else None
        if not isinstance(name, str) or name not in _EDITS:
            wrong = unknown("edit", name, _EDITS)
            raise DataError(f"{where}: {wrong.finding}", wrong.remedy)
        options = {key: value for key, value in step.items() if key != "edit"}
        if name == "paste":
            options["picture"] = opener.open(options.get("picture"), where)
        with foreign_code(f"{where}: edit {number} ({name}) of an image cannot be done", "Mend the row."):
            if name in _SIZED:
                _check_size(options.get("size") or (0, 0), opener.max_pixels, where)
            picture = _EDITS[name](picture, **options)
    # the base is kept for the next picture that is made of it
    return picture.copy() if picture is base else picture


def _steps(source: object) -> Sequence[Any]:
    """The edits of an image, as far as they are a list; what else is there counts as one that is unknown."""
    if not (isinstance(source, Mapping) and is_edited(source)):
        return ()
    edits = source[EDITS]
    return edits if isinstance(edits, list | tuple) else (edits,)


def _count(source: object) -> int:
    """How many edits an image has, those of what is pasted into it counted; no further than is allowed."""
    count = 0
    for step in _steps(source):
        count += 1 + (_count(step.get("picture")) if isinstance(step, Mapping) else 0)
        if count > MOST_EDITS:
            break
    return count


def _check_size(size: Sequence[int], most: int, where: str) -> None:
    width, height = (int(side) for side in size)
    if not (0 < width * height <= most and width > 0):
        raise DataError(
            f"{where}: an image of {width} x {height} pixels is to be made.", f"Make one of 1 to {most:,} pixels."
        )


def view(box: Sequence[float], size: Sequence[int]) -> dict[str, Any]:
    """An edit: a part of the picture, smoothly scaled.

    Args:
        box: the part.
        size: (width, height) in pixels of what comes out.
    """
    return {"edit": "view", "box": [float(value) for value in box], "size": [int(value) for value in size]}


def _view(picture: Image.Image, box: Sequence[float], size: Sequence[int]) -> Image.Image:
    left, top, right, bottom = _pixels(picture, box)
    return picture.resize((int(size[0]), int(size[1])), Image.Resampling.LANCZOS, (left, top, right, bottom), 3.0)


def turn(degrees: int) -> dict[str, Any]:
    """An edit: the picture turned clockwise, by 0, 90, 180 or 270 degrees."""
    return {"edit": "turn", "degrees": degrees}


def _turn(picture: Image.Image, degrees: int) -> Image.Image:
    return picture if degrees == 0 else picture.transpose(_TURNS[degrees])


def mirror(axis: str) -> dict[str, Any]:
    """An edit: the picture mirrored, "left-right" or "upside-down"."""
    return {"edit": "mirror", "axis": axis}


def _mirror(picture: Image.Image, axis: str) -> Image.Image:
    return picture.transpose(_MIRRORS[axis])


def tiles(rows: int, columns: int, order: Sequence[int], gap: float = 0.0) -> dict[str, Any]:
    """An edit: the picture cut into tiles, which are laid anew.

    Args:
        rows, columns: of tiles.
        order: for each place, row by row, the number of the tile (from 0) that is laid there.
        gap: share of a tile's side that is cut off between two and left grey.
    """
    return {"edit": "tiles", "rows": rows, "columns": columns, "order": list(order), "gap": gap}


def _tiles(picture: Image.Image, rows: int, columns: int, order: Sequence[int], gap: float = 0.0) -> Image.Image:
    if sorted(order) != list(range(rows * columns)):
        raise ValueError(f"order {list(order)} does not name each of {rows * columns} tiles once")
    width, height = picture.width // columns, picture.height // rows
    if min(width, height) < 2:
        raise ValueError(f"{picture.width} x {picture.height} pixels are too few for {rows} x {columns} tiles")
    cut_x, cut_y = round(width * gap / 2), round(height * gap / 2)
    laid = Image.new("RGB", (width * columns, height * rows), GREY)
    for place, tile in enumerate(order):
        left, top = tile % columns * width, tile // columns * height
        piece = picture.crop((left + cut_x, top + cut_y, left + width - cut_x, top + height - cut_y))
        laid.paste(piece, (place % columns * width + cut_x, place // columns * height + cut_y))
    return laid


def paste(picture: object, box: Sequence[float], *, matched: bool = False) -> dict[str, Any]:
    """An edit: another picture scaled into a place of this one.

    Args:
        picture: any image of a row, one that is edited too.
        box: the place.
        matched: give it mean and spread of each colour that the place has.
    """
    return {"edit": "paste", "picture": picture, "box": [float(value) for value in box], "matched": matched}


def _paste(canvas: Image.Image, picture: Image.Image, box: Sequence[float], matched: bool = False) -> Image.Image:
    left, top, right, bottom = (round(value) for value in _pixels(canvas, box))
    piece = picture.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    if matched:
        piece = _matched(piece, canvas.crop((left, top, right, bottom)))
    result = canvas.copy()
    result.paste(piece, (left, top))
    return result


def _matched(piece: Image.Image, place: Image.Image) -> Image.Image:
    """A picture with the mean and the spread of another, colour by colour."""
    of_piece, of_place = (np.asarray(image, dtype=np.float64) for image in (piece, place))
    spread = of_place.std(axis=(0, 1)) / np.maximum(of_piece.std(axis=(0, 1)), 1.0)
    moved = (of_piece - of_piece.mean(axis=(0, 1))) * spread + of_place.mean(axis=(0, 1))
    return Image.fromarray(np.clip(np.rint(moved), 0, 255).astype(np.uint8))


def fill(box: Sequence[float], colour: Sequence[int] | None = None) -> dict[str, Any]:
    """An edit: a place of one colour, of the picture's mean colour where none is given."""
    return {
        "edit": "fill",
        "box": [float(value) for value in box],
        "colour": None if colour is None else [int(value) for value in colour],
    }


def _fill(picture: Image.Image, box: Sequence[float], colour: Sequence[int] | None = None) -> Image.Image:
    left, top, right, bottom = (round(value) for value in _pixels(picture, box))
    if colour is None:
        colour = [round(value) for value in np.asarray(picture, dtype=np.float64).mean(axis=(0, 1)).tolist()]
    red, green, blue = colour
    result = picture.copy()
    result.paste((int(red), int(green), int(blue)), (left, top, right, bottom))
    return result


def blank(size: Sequence[int], colour: Sequence[int] = GREY) -> dict[str, Any]:
    """An edit: an empty canvas of (width, height) pixels in place of the picture, to paste on."""
    return {"edit": "blank", "size": [int(value) for value in size], "colour": [int(value) for value in colour]}


def _blank(picture: Image.Image, size: Sequence[int], colour: Sequence[int] = GREY) -> Image.Image:
    red, green, blue = colour
    return Image.new("RGB", (int(size[0]), int(size[1])), (int(red), int(green), int(blue)))


def light(gain: float, offset: float = 0.0) -> dict[str, Any]:
    """An edit: every value times `gain`, plus `offset` (of 255)."""
    return {"edit": "light", "gain": gain, "offset": offset}


def _light(picture: Image.Image, gain: float, offset: float = 0.0) -> Image.Image:
    return picture.point([min(max(round(value * gain + 255 * offset), 0), 255) for value in range(256)] * 3)


def even_colours() -> dict[str, Any]:
    """An edit: colours, not brightness, as coarse along one axis as along the other; JPEG may keep them unevenly."""
    return {"edit": "even_colours"}


def _even_colours(picture: Image.Image) -> Image.Image:
    bright, *colours = picture.convert("YCbCr").split()
    coarse = (max(picture.width // COARSE, 1), max(picture.height // COARSE, 1))
    even = [
        colour.resize(coarse, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BILINEAR)
        for colour in colours
    ]
    return Image.merge("YCbCr", (bright, *even)).convert("RGB")


def blur(radius: float) -> dict[str, Any]:
    """An edit: blurred, by a radius in shares of the shorter side."""
    return {"edit": "blur", "radius": radius}


def _blur(picture: Image.Image, radius: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(min(max(radius, 0.0), 1.0) * min(picture.size)))


def noise(strength: float, seed: int) -> dict[str, Any]:
    """An edit: normal noise on every value, of a standard deviation in shares of 255."""
    return {"edit": "noise", "strength": strength, "seed": seed}


def _noise(picture: Image.Image, strength: float, seed: int) -> Image.Image:
    values = np.asarray(picture, dtype=np.float64)
    noisy = values + np.random.default_rng(seed).normal(0.0, 255 * strength, values.shape)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _pixels(picture: Image.Image, box: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(value) for value in box)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"box {list(box)} is no part of the picture")
    return left * picture.width, top * picture.height, right * picture.width, bottom * picture.height


_SIZED = ("view", "blank")
_EDITS: Mapping[str, Callable[..., Image.Image]] = {
    "view": _view,
    "turn": _turn,
    "mirror": _mirror,
    "tiles": _tiles,
    "paste": _paste,
    "fill": _fill,
    "blank": _blank,
    "light": _light,
    "even_colours": _even_colours,
    "blur": _blur,
    "noise": _noise,
}
