"""Parts of pictures and looks at them, as makers share them. Nothing here opens a picture but for its thumb."""

import random

import numpy as np

from pivot_plugin.data.edits import blur, light, view

from .pictures import Picture
from .protocol import Unsuitable

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
# of what comes out, in pixels; what encoders see today
LARGEST_SIDE, SMALLEST_SIDE = 336, 16
# scaled down by this, a picture loses the traces of its compression: blocks, and colours sampled along one axis.
# None is made smaller than so many pixels by it.
REDUCED, REDUCED_TO = 0.6, 96
# mean difference of colours, of 255, below which two parts look alike; spread below which a part shows nothing
ALIKE, FLAT = 6.0, 5.0


def square(picture: Picture, random_numbers: random.Random, share: float = 1.0) -> Box:
    """A square part at a random place, in shares of the picture.

    Args:
        picture: whose size is known.
        random_numbers: that place it.
        share: its side in shares of the picture's shorter one.
    """
    width, height = picture.size
    side = share * min(width, height)
    left, top = random_numbers.uniform(0, width - side), random_numbers.uniform(0, height - side)
    return within(WHOLE, (left / width, top / height, (left + side) / width, (top + side) / height))


def within(outer: Box, inner: Box) -> Box:
    """A box given in shares of another one, in shares of the picture; rounding leads out of neither."""
    left, top, right, bottom = outer
    x, y = (lambda share: left + share * (right - left)), (lambda share: top + share * (bottom - top))
    made = x(inner[0]), y(inner[1]), x(inner[2]), y(inner[3])
    return (max(made[0], 0.0), max(made[1], 0.0), min(made[2], 1.0), min(made[3], 1.0))


def side_of(picture: Picture, box: Box) -> int:
    """Pixels of the side at which a square part is shown."""
    side = (box[2] - box[0]) * picture.size[0]
    return max(SMALLEST_SIDE, min(LARGEST_SIDE, round(max(side * REDUCED, min(side, REDUCED_TO)))))


def jittered(side: int, random_numbers: random.Random, shift: float) -> list[dict[str, object]]:
    """Edits that make another view of a square picture: a little smaller, elsewhere, in other light, less sharp.

    Args:
        side: of it and of what comes out, in pixels.
        random_numbers: that say how.
        shift: largest share of the side that is cut off.
    """
    part = 1 - random_numbers.uniform(0.2, 1.0) * shift
    left, top = random_numbers.uniform(0, 1 - part), random_numbers.uniform(0, 1 - part)
    gain = random_numbers.uniform(0.85, 1.05)
    return [
        view((left, top, min(left + part, 1.0), min(top + part, 1.0)), (side, side)),
        blur(random_numbers.uniform(0.002, 0.012)),
        light(gain, random_numbers.uniform(-0.05, 0.05)),
    ]


def look(picture: Picture, box: Box = WHOLE, cells: int = 8) -> np.ndarray:
    """(cells, cells, 3) colours of a part of a picture, coarsely.

    Args:
        picture: opened for its thumb where that is not known.
        box: the part.
        cells: across and down.
    """
    thumb = picture.thumb
    middles = (np.arange(cells) + 0.5) / cells
    columns = ((box[0] + middles * (box[2] - box[0])) * thumb.shape[1]).astype(int).clip(0, thumb.shape[1] - 1)
    rows = ((box[1] + middles * (box[3] - box[1])) * thumb.shape[0]).astype(int).clip(0, thumb.shape[0] - 1)
    return thumb[np.ix_(rows, columns)]


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Mean difference of two looks, of 255."""
    return float(np.abs(first - second).mean())


def refuse_alike(looks: list[np.ndarray], what: str) -> None:
    """Make sure that parts can be told apart.

    Args:
        looks: at them; the first is compared with each other one.
        what: they are.

    Raises:
        Unsuitable: if any looks like the first.
    """
    if any(distance(looks[0], other) < ALIKE for other in looks[1:]):
        raise Unsuitable(f"{what} look alike")
