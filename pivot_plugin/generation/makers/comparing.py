"""Questions that compare pictures: order, same_or_different, odd_one_out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pivot_plugin.data.edits import blank, edited, light, noise, paste, view

from .pictures import Picture
from .protocol import Draw, Maker, Question, Unsuitable
from .views import ALIKE, Box, distance, jittered, look, side_of, square, within

PANELS = 4
# of a sheet's side, between and around its panels
MARGIN = 0.02
# how the quantity of a panel is asked for: from the least to the most
ORDER_WORDING: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "light": {
        "least": ("Which of the four panels is the darkest?", "In which panel was the light turned down the most?"),
        "most": ("Which of the four panels is the brightest?", "In which panel was the light turned down the least?"),
    },
    "size": {
        "least": ("In which panel is the picture the smallest?", "Which of the four copies was made the smallest?"),
        "most": ("In which panel is the picture the largest?", "Which of the four copies was made the largest?"),
    },
    "noise": {
        "least": ("Which of the four panels is nearest to a clean picture?", "Which panel has the least noise?"),
        "most": ("Which of the four panels is furthest from a clean picture?", "Which panel has the most noise?"),
    },
}
ORDER_ENDING = (
    " Panels are numbered row by row from the upper left. Answer with the number.",
    " The upper panels are 1 and 2, the lower ones 3 and 4. Answer with the number alone.",
    " Count row by row, from the upper left with 1. Answer with one number from 1 to 4.",
)
SAME_WORDING = (
    "Picture 1: <image>\nPicture 2: <image>\nDo they show the same, or was a part replaced? Answer same or different.",
    "<image>\n<image>\nLight and frame aside, is the content the same or different? Answer with one of these words.",
    "First: <image>\nSecond: <image>\nIs a part of one missing in the other? Answer different if so, else same.",
    "Compare the two pictures.\n<image>\n<image>\nAnswer different if they differ in a part, and same if they do not.",
)
ODD_WORDING = (
    "{pictures}\nOne of these {count} pictures differs from the others in a part. Which? Answer with its number.",
    "{pictures}\nAll pictures but one show the same. What is the number of the odd one?",
    "Find the odd one out among {count} pictures:\n{pictures}\nAnswer with its number.",
)
# places and patches that are tried for one question
TRIES, CANDIDATES = 8, 6
# spread of colours that a place and a patch must have, so that a patch in its colours can be told from another
SPREAD = 8.0


def order(draw: Draw) -> Question:
    """Which of four panels is the darkest, largest, least noisy, or the opposite.

    The panels lie on one picture, so that nothing about the picture as a whole tells their order.
    """
    picture = draw.picture
    box = square(picture, draw.random, 1.0)
    if look(picture, box).std(axis=(0, 1)).max() < SPREAD:
        raise Unsuitable("it shows nothing")
    right, wrong = draw.answer(range(PANELS), "panel")
    quantity = draw.random.choice(list(ORDER_WORDING))
    extreme = draw.random.choice(("least", "most"))
    # from the extreme that is asked for to the opposite one: the nearest wrong panel comes next
    ranks = {right: 0} | {panel: rank for rank, panel in enumerate(wrong, 1)}
    side = max(side_of(picture, box) // 2, 16)
    sheet = picture.edited(blank((2 * side, 2 * side)))
    for panel, rank in ranks.items():
        amount = rank if extreme == "least" else PANELS - 1 - rank
        place = _panel(panel)
        copy, place = _copy(draw, picture.edited(view(box, (side, side))), quantity, amount, place)
        sheet = edited(sheet, paste(copy, place))
    prompt = draw.random.choice(ORDER_WORDING[quantity][extreme]) + draw.random.choice(ORDER_ENDING)
    return Question([sheet], prompt, str(right + 1), [str(panel + 1) for panel in wrong])


def _panel(number: int) -> Box:
    column, row = number % 2, number // 2
    return (column / 2 + MARGIN, row / 2 + MARGIN, (column + 1) / 2 - MARGIN, (row + 1) / 2 - MARGIN)


def _copy(draw: Draw, copy: dict[str, Any], quantity: str, amount: int, place: Box) -> tuple[dict[str, Any], Box]:
    """One panel, with so much of a quantity (0 to 3), and where it is pasted."""
    if quantity == "light":
        return edited(copy, light(1.0 - draw.between(0.2, 0.06) * (PANELS - 1 - amount))), place
    if quantity == "noise":
        return edited(copy, noise(draw.between(0.08, 0.02) * amount + 0.01, draw.random.randrange(2**31))), place
    share = 1.0 - draw.between(0.18, 0.07) * (PANELS - 1 - amount)
    left, top = draw.random.uniform(0, 1 - share), draw.random.uniform(0, 1 - share)
    return copy, within(place, (left, top, left + share, top + share))


@dataclass(frozen=True)
class _Patched:
    """A picture with a place into which one of two patches is pasted.

    Every view has a patch, so that no trace of pasting tells which one it is.
    """

    base: dict[str, Any]
    side: int
    place: Box
    patches: tuple[dict[str, Any], dict[str, Any]]

    def view(self, draw: Draw, which: int) -> dict[str, Any]:
        """The picture with a patch, seen a little differently every time."""
        pasted = paste(self.patches[which], self.place, matched=True)
        return edited(self.base, pasted, *jittered(self.side, draw.random, draw.between(0.06, 0.15)))


def _patched(draw: Draw) -> _Patched:
    """A picture, a place in it, and two patches: large and unlike where easy, small and alike where hard.

    Raises:
        Unsuitable: if the picture shows nothing anywhere, or no two patches differ.
    """
    picture = draw.picture
    box = square(picture, draw.random, 1.0)
    share = draw.between(0.45, 0.22)
    for _ in range(TRIES):
        left, top = draw.random.uniform(0.1, 0.9 - share), draw.random.uniform(0.1, 0.9 - share)
        place: Box = (left, top, left + share, top + share)
        if _spread(look(picture, within(box, place), 4)) >= SPREAD:
            break
    else:
        raise Unsuitable("it shows nothing in any place")
    found = [patch for _ in range(2 * CANDIDATES) if (patch := _patch(draw, share)) is not None][:CANDIDATES]
    if not found:
        raise Unsuitable("other pictures show nothing in any place")
    first, *rest = found
    by_distance = sorted(rest, key=lambda patch: distance(_standard(first[2]), _standard(patch[2])))
    unlike = [patch for patch in by_distance if distance(_standard(first[2]), _standard(patch[2])) * SPREAD >= ALIKE]
    if not unlike:
        raise Unsuitable("patches look alike")
    second = unlike[round(draw.between(len(unlike) - 1, 0))]
    side = side_of(picture, box)
    patches = [first, second]
    # which of the two came first says nothing
    draw.random.shuffle(patches)
    size = max(4, round(share * side))
    shown = tuple(patch[0].edited(view(patch[1], (size, size))) for patch in patches)
    return _Patched(picture.edited(view(box, (side, side))), side, place, (shown[0], shown[1]))


def _patch(draw: Draw, share: float) -> tuple[Picture, Box, np.ndarray] | None:
    """A part of another picture, and a look at it; None for one that shows nothing."""
    other = draw.other()
    box = square(other, draw.random, share)
    seen = look(other, box, 4)
    return (other, box, seen) if _spread(seen) >= SPREAD else None


def _spread(seen: np.ndarray) -> float:
    return float(seen.std(axis=(0, 1)).mean())


def _standard(seen: np.ndarray) -> np.ndarray:
    """A look without its mean colours and their spread, which pasting takes away."""
    return (seen - seen.mean(axis=(0, 1))) / np.maximum(seen.std(axis=(0, 1)), 1.0)


def same_or_different(draw: Draw) -> Question:
    """Do two views show the same, or is a part of one replaced; the place is drawn, and no single view tells."""
    right, wrong = draw.answer(("same", "different"))
    patched = _patched(draw)
    first = draw.random.randrange(2)
    images = [patched.view(draw, first), patched.view(draw, first if right == "same" else 1 - first)]
    return Question(images, draw.random.choice(SAME_WORDING), right, wrong)


def odd_one_out(draw: Draw) -> Question:
    """Which of three (from half of the difficulty on four) views has another part than the rest."""
    count = 3 if draw.difficulty < 0.5 else 4
    right, wrong = draw.answer(range(1, count + 1))
    patched = _patched(draw)
    usual = draw.random.randrange(2)
    images = [patched.view(draw, 1 - usual if number == right else usual) for number in range(1, count + 1)]
    pictures = " ".join(f"{number}: <image>" for number in range(1, count + 1))
    prompt = draw.random.choice(ODD_WORDING).format(pictures=pictures, count=count)
    return Question(images, prompt, str(right), _texts(wrong))


def _texts(numbers: Sequence[int]) -> list[str]:
    return [str(number) for number in numbers]


def smallest_for_patches(difficulty: float) -> int:
    """Pixels of the shorter side for patches that show something."""
    return round(8 / (0.45 + (0.22 - 0.45) * difficulty))


MAKERS = {
    "order": Maker("order", "SSL-R1 (similarity), arXiv 2604.20705; SSL4RL (contrast), arXiv 2510.16416", order),
    "same_or_different": Maker(
        "same_or_different",
        "TWIN, arXiv 2512.23592; SAGA, arXiv 2606.15134",
        same_or_different,
        pictures=2,
        smallest=smallest_for_patches,
    ),
    "odd_one_out": Maker(
        "odd_one_out",
        "SSL-R1 (similarity), arXiv 2604.20705",
        odd_one_out,
        pictures=2,
        smallest=smallest_for_patches,
    ),
}
