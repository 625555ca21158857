"""Questions about how a picture was turned, mirrored and cut: rotation, flip, jigsaw, locate."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from pivot_plugin.data.edits import even_colours, mirror, tiles, turn, view

from .protocol import Draw, Maker, Question, Unsuitable
from .views import Box, distance, jittered, look, refuse_alike, side_of, square, within

# rows and columns of a jigsaw, from easy to hard
GRIDS = ((1, 2), (1, 3), (2, 2), (2, 3), (3, 3))
SMALLEST_TILE = 16
# share of a tile that is cut off, so that edges do not simply go on
TILE_GAP = 0.12
# orders that are few enough to be balanced as such
FEW_TILES = 4

ROTATION_WORDING = (
    "By how many degrees was this picture turned clockwise? Answer with one of {options}.",
    "This picture may have been turned. By how many degrees, clockwise: {options}? Answer with the number.",
    "How far was the picture rotated clockwise? Choose one number of degrees from {options}.",
)
FLIP_WORDING = (
    "Picture 1: <image>\nPicture 2: <image>\nHow was picture 2 made of picture 1? Answer with one of {options}.",
    "First picture: <image>\nSecond picture: <image>\nWas the second picture mirrored? Choose one of {options}.",
    "<image>\n<image>\nThe second picture is another view of the first: {options}? Answer with one of these.",
)
FLIPS = {"unchanged": (), "mirrored": ("left-right",), "upside down": ("upside-down",)}
BOTH = {"turned around": ("left-right", "upside-down")}
JIGSAW_WORDING = (
    "This picture was cut into {count} tiles ({rows} by {columns}), which were shuffled. Places are numbered row by "
    "row from the upper left. Say for each place of the original picture, in this order, at which place its tile lies "
    "now. Answer with {count} numbers, separated by commas.",
    "The {count} tiles of this picture ({rows} rows, {columns} columns) are out of order. Number the places row by "
    "row, beginning at the upper left with 1. List the numbers of the tiles in the order that restores the picture, "
    "separated by commas.",
    "Solve the puzzle: {count} tiles in {rows} rows and {columns} columns, numbered row by row as they lie. In which "
    "order do they make the picture? Answer with the {count} numbers and commas.",
)
LOCATE_WORDING = (
    "Picture: <image>\nDetail: <image>\nWhere in the picture is the detail? Answer with one of {options}.",
    "<image>\n<image>\nThe second picture is a part of the first. Which part: {options}?",
    "From which part of the first picture was the second one cut?\n<image>\n<image>\nChoose one of {options}.",
)
PLACES = {
    2: ("upper left", "upper right", "lower left", "lower right"),
    3: (
        *("upper left", "upper middle", "upper right"),
        *("middle left", "center", "middle right"),
        *("lower left", "lower middle", "lower right"),
    ),
}


def listed(options: Sequence[object]) -> str:
    """Options in a question, in an order that has nothing to do with the answer."""
    *first, last = map(str, options)
    return f"{', '.join(first)} or {last}"


def rotation(draw: Draw) -> Question:
    """By how much was the picture turned: half turns where easy, quarter turns of smaller parts where hard."""
    choices = (0, 180) if draw.difficulty < 1 / 3 else (0, 90, 180, 270)
    picture = draw.picture
    box = square(picture, draw.random, draw.between(1.0, 0.5))
    seen = look(picture, box)
    refuse_alike([np.rot90(seen, degrees // 90) for degrees in choices], "a picture and itself turned")
    right, wrong = draw.answer(choices)
    side = side_of(picture, box)
    prompt = draw.random.choice(ROTATION_WORDING).format(options=listed(choices))
    # Turned before it is scaled, since scaling rounds along one axis first; and what JPEG keeps of colours along one
    # axis alone would say how it was turned, too.
    shown = picture.edited(turn(right), view(_turned(box, right), (side, side)), even_colours())
    return Question([shown], prompt, str(right), [str(degrees) for degrees in wrong])


def _turned(box: Box, degrees: int) -> Box:
    """Where a part lies when the picture is turned clockwise."""
    for _ in range(degrees // 90):
        left, top, right, bottom = box
        box = (1 - bottom, left, 1 - top, right)
    return box


def flip(draw: Draw) -> Question:
    """How was a second view mirrored; from two thirds of the difficulty on also both ways."""
    kinds = FLIPS if draw.difficulty < 2 / 3 else FLIPS | BOTH
    picture = draw.picture
    box = square(picture, draw.random, draw.between(1.0, 0.6))
    seen = look(picture, box)
    mirrored = [_mirrored(seen, axes) for axes in kinds.values()]
    for first, second in itertools.combinations(mirrored, 2):
        refuse_alike([first, second], "a picture and itself mirrored")
    right, wrong = draw.answer(list(kinds))
    side = side_of(picture, box)
    shift = draw.between(0.1, 0.3)
    base = view(box, (side, side))
    images = [
        picture.edited(base, *map(mirror, axes), *jittered(side, draw.random, shift)) for axes in ((), kinds[right])
    ]
    return Question(images, draw.random.choice(FLIP_WORDING).format(options=listed(list(kinds))), right, wrong)


def _mirrored(seen: np.ndarray, axes: Sequence[str]) -> np.ndarray:
    for axis in axes:
        seen = seen[:, ::-1] if axis == "left-right" else seen[::-1]
    return seen


def grid_of(difficulty: float) -> tuple[int, int]:
    """Rows and columns of a jigsaw."""
    return GRIDS[min(int(difficulty * len(GRIDS)), len(GRIDS) - 1)]


def smallest_for_jigsaw(difficulty: float) -> int:
    """Pixels of the shorter side for tiles that show something."""
    return SMALLEST_TILE * max(grid_of(difficulty))


def jigsaw(draw: Draw) -> Question:
    """In which order do the tiles make the picture: two tiles where easy, nine where hard; judged by `permutation`."""
    rows, columns = grid_of(draw.difficulty)
    count = rows * columns
    picture = draw.picture
    box = square(picture, draw.random, 1.0)
    seen = [look(picture, within(box, cell), 4) for cell in _cells(rows, columns)]
    for number in range(count):
        refuse_alike(seen[number:], "tiles")
    if count <= FEW_TILES:
        order = list(draw.balanced(list(itertools.permutations(range(count)))))
    else:
        order = draw.random.sample(range(count), count)
    answer = [order.index(tile) + 1 for tile in range(count)]
    wrong = []
    pairs = list(itertools.combinations(range(count), 2))
    for first, second in draw.random.sample(pairs, min(3, len(pairs))):
        swapped = list(answer)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        wrong.append(", ".join(map(str, swapped)))
    side = side_of(picture, box)
    size = (side // columns * columns, side // rows * rows)
    shown = picture.edited(view(box, size), tiles(rows, columns, order, TILE_GAP))
    prompt = draw.random.choice(JIGSAW_WORDING).format(count=count, rows=rows, columns=columns)
    return Question([shown], prompt, ", ".join(map(str, answer)), wrong, rule="permutation")


def _cells(rows: int, columns: int) -> list[Box]:
    return [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]


def locate_grid(difficulty: float) -> int:
    """Places across and down among which a detail is looked for."""
    return 2 if difficulty < 0.5 else 3


def smallest_for_locate(difficulty: float) -> int:
    """Pixels of the shorter side for details that show something."""
    return math.ceil(2 * SMALLEST_TILE * locate_grid(difficulty))


def locate(draw: Draw) -> Question:
    """Where does a detail come from: quarters where easy, small parts of ninths where hard."""
    across = locate_grid(draw.difficulty)
    names = PLACES[across]
    picture = draw.picture
    box = square(picture, draw.random, 1.0)
    cells = _cells(across, across)
    right, wrong = draw.answer(names)
    cell = cells[names.index(right)]
    share = draw.between(0.95, 0.6)
    left, top = draw.random.uniform(0, 1 - share), draw.random.uniform(0, 1 - share)
    detail = within(box, within(cell, (left, top, left + share, top + share)))
    own = look(picture, detail, 4)
    if own.std(axis=(0, 1)).max() < 2:
        raise Unsuitable("the detail shows nothing")
    others = [look(picture, within(box, within(other, (left, top, left + share, top + share))), 4) for other in cells]
    if any(distance(own, look_) < 4 for number, look_ in enumerate(others) if names[number] != right):
        raise Unsuitable("another place looks alike")
    # of the same row or column first: that relation is the same both ways, so that no place is more often wrong
    here = divmod(names.index(right), across)
    wrong.sort(key=lambda name: all(a != b for a, b in zip(divmod(names.index(name), across), here, strict=True)))
    side = side_of(picture, box)
    images = [picture.edited(view(box, (side, side))), picture.edited(view(detail, (side // 2, side // 2)))]
    return Question(images, draw.random.choice(LOCATE_WORDING).format(options=listed(names)), right, wrong)


MAKERS = {
    "rotation": Maker("rotation", "SSL4RL, arXiv 2510.16416; SSL-R1, arXiv 2604.20705", rotation),
    "flip": Maker("flip", "Spatial-SSRL, arXiv 2510.27606", flip),
    "jigsaw": Maker("jigsaw", "Visual Jigsaw, arXiv 2509.25190", jigsaw, smallest=smallest_for_jigsaw),
    "locate": Maker(
        "locate", "SSL4RL (position), arXiv 2510.16416; Spatial-SSRL (crop)", locate, smallest=smallest_for_locate
    ),
}
