"""Makers of rejected pictures: of one picture, another that the chosen answer fits less.

other_picture     another row's picture, as it is
patch_shuffle     its own tiles in another order
region_blackout   a part of it black
crop              a part of it alone, scaled to its size (mDPO's)

What is made of a picture by cutting or painting looks made, which is told without looking at what is shown: a model
can learn to know unnatural pictures instead of reading them (arXiv 2502.13928, section 1). A linear classifier of pixel
statistics (`data.pixels`) tells crops, black patches and shuffled tiles from true pictures, and no other picture of the
same rows. `pivot prefs check` says where that is so, and so does a run that has them made.
"""

import math
from collections.abc import Mapping

import numpy as np

from pivot_plugin.data.edits import fill, tiles, view
from pivot_plugin.hooks import hookimpl

from .protocol import Draw, Maker, Unsuitable

MDPO, SVCO = "arXiv 2406.11839", "arXiv 2502.13928"
# by difficulty from 0 to 1: shares of the picture's area, tiles a side, candidates of which the nearest is taken
KEPT, BLACK, TILES, CANDIDATES = (0.1, 0.8), (0.7, 0.1), (8, 2), (1, 16)
SIDE_OF_A_TILE = 4


def other_picture(draw: Draw) -> object:
    """Another row's picture; the harder, the more alike at a coarse look.

    No classifier of single pictures tells it, since it is the true picture of another row.
    """
    count = round(draw.between(*CANDIDATES))
    candidates = [draw.other() for _ in range(count)]
    if count == 1:
        return candidates[0].source
    own = draw.picture.thumb
    nearest = min(candidates, key=lambda one: float(np.abs(one.thumb - own).mean()))
    return nearest.source


def patch_shuffle(draw: Draw) -> object:
    """The picture's tiles, none in its place; the harder, the fewer tiles. Its edges give it away as made."""
    width, height = _size(draw)
    side = min(round(draw.between(*TILES)), min(width, height) // SIDE_OF_A_TILE)
    if side < 2:
        raise Unsuitable(f"{width} x {height} pixels are too few for tiles")
    # one circle through all tiles in random order leaves none in its place
    circle = list(range(side * side))
    draw.random.shuffle(circle)
    order = [0] * len(circle)
    for tile, following in zip(circle, circle[1:] + circle[:1], strict=True):
        order[tile] = following
    return draw.picture.edited(tiles(side, side, order))


def region_blackout(draw: Draw) -> object:
    """The picture with a black rectangle; the harder, the smaller. Exact black gives it away as made."""
    return draw.picture.edited(fill(_box(draw, draw.between(*BLACK)), (0, 0, 0)))


def crop(draw: Draw) -> object:
    """A part of the picture, scaled to its size; the harder, the larger. Soft edges give it away as made."""
    return draw.picture.edited(view(_box(draw, draw.between(*KEPT)), _size(draw)))


def _size(draw: Draw) -> tuple[int, int]:
    picture = draw.picture
    return picture.size if min(picture.size) else picture.access.size(picture.source, picture.where)


def _box(draw: Draw, area: float) -> tuple[float, float, float, float]:
    """A rectangle of so much of the picture's area, its shape and place drawn at random."""
    longest = min(math.log(2.0), -math.log(area) / 2)
    stretch = math.exp(draw.random.uniform(-longest, longest))
    # of an area near the whole, both sides stay within the picture
    width, height = min(1.0, math.sqrt(area) * stretch), min(1.0, math.sqrt(area) / stretch)
    left, top = draw.random.uniform(0, 1 - width), draw.random.uniform(0, 1 - height)
    return left, top, min(1.0, left + width), min(1.0, top + height)


REJECTED: Mapping[str, Maker] = {
    maker.name: maker
    for maker in (
        Maker("other_picture", f"{SVCO}, section 1: natural pictures", rejected=other_picture, pictures=2),
        Maker("patch_shuffle", "ours, after Visual Jigsaw (arXiv 2509.25190)", rejected=patch_shuffle),
        Maker("region_blackout", f"ours, after {MDPO}", rejected=region_blackout),
        Maker("crop", f"{MDPO}, section 3", rejected=crop),
    )
}


@hookimpl
def pivot_makers() -> Mapping[str, Maker]:
    """The built-in makers of rejected pictures."""
    return REJECTED
