"""Rendered scenes and what can be asked about them: the data of the embedded world.

A scene is two to four coloured shapes on a noisy background, seen by day or at dusk. Everything that is known about it
(which shape, which colour, where) is kept beside the picture, so that questions, preference pairs and patch labels come
from one source. The first stage sees scenes by day; dusk is the new domain that preference pairs teach the encoder.
This file knows nothing of models.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 48
PATCH_SIZE = 6
COLOURS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (52, 104, 220),
    "yellow": (232, 200, 40),
    "purple": (140, 70, 190),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
DUSK_LIGHT = np.array([0.6, 0.65, 0.8])
DUSK_HAZE = np.array([4, 8, 30])
NUMBERS = {2: "two", 3: "three", 4: "four"}
QUESTION_KINDS = ("colour", "shape", "count", "existence", "relation")


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene; `box` is (left, top, right, bottom) in pixels, ends included."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture and the objects in it, in raster order of the 3x3 cells they stand in."""

    image: Image.Image
    objects: tuple[SceneObject, ...]

    def caption(self) -> str:
        """Every object as "colour shape", in raster order."""
        return " and ".join(f"{item.colour} {item.shape}" for item in self.objects)

    def mask(self, shown: Sequence[SceneObject] | None = None) -> np.ndarray:
        """Shape class per pixel, as drawn: 0 for background, else 1 + index in `SHAPES`; (48, 48) integers.

        Args:
            shown: objects to draw; all where None.
        """
        image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
        for item in self.objects if shown is None else shown:
            _draw(ImageDraw.Draw(image), item, 1 + SHAPES.index(item.shape))
        return np.asarray(image)


@dataclass(frozen=True)
class Question:
    """A question about one scene: its right answer, wrong answers of the same kind, and the objects it is about."""

    kind: str
    text: str
    answer: str
    wrong: tuple[str, ...]
    about: tuple[SceneObject, ...] = ()


def _draw(canvas: ImageDraw.ImageDraw, item: SceneObject, fill: Any) -> None:
    left, top, right, bottom = item.box
    middle_x, middle_y = (left + right) // 2, (top + bottom) // 2
    if item.shape == "circle":
        canvas.ellipse(item.box, fill=fill)
    elif item.shape == "square":
        canvas.rectangle(item.box, fill=fill)
    elif item.shape == "triangle":
        canvas.polygon([(left, bottom), (right, bottom), (middle_x, top)], fill=fill)
    elif item.shape == "diamond":
        canvas.polygon([(middle_x, top), (right, middle_y), (middle_x, bottom), (left, middle_y)], fill=fill)
    else:
        third = max(1, (right - left) // 3)
        canvas.rectangle((left + third, top, right - third, bottom), fill=fill)
        canvas.rectangle((left, top + third, right, bottom - third), fill=fill)


@dataclass(frozen=True)
class Style:
    """How scenes look.

    Attributes:
        cells: of a side of the grid that objects stand in, jittered.
        sizes: of the smallest and the largest object, in pixels.
        objects: the fewest and the most.
        noise: standard deviation of what lies over everything, in grey levels.
    """

    cells: int = 3
    sizes: tuple[int, int] = (10, 15)
    objects: tuple[int, int] = (2, 4)
    noise: float = 0.0


CROWDED = Style()
FOGGY = Style(cells=2, sizes=(15, 22), objects=(1, 2), noise=10.0)


def render(rng: random.Random, dusk: bool = False, style: Style = CROWDED) -> Scene:
    """Draw one scene on a noisy background, 48x48 px RGB.

    Args:
        rng: source of all chance.
        dusk: show it dark and bluish.
        style: of the scene.
    """
    noise_rng = np.random.default_rng(rng.getrandbits(32))
    noise = noise_rng.normal(96, 24, (IMAGE_SIZE, IMAGE_SIZE, 3))
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    objects = []
    width = IMAGE_SIZE // style.cells
    for cell in sorted(rng.sample(range(style.cells**2), rng.randint(*style.objects))):
        size = rng.randint(*style.sizes)
        left = (cell % style.cells) * width + rng.randint(0, width - size)
        top = (cell // style.cells) * width + rng.randint(0, width - size)
        box = (left, top, left + size - 1, top + size - 1)
        objects.append(SceneObject(rng.choice(SHAPES), rng.choice(list(COLOURS)), box))
        _draw(canvas, objects[-1], COLOURS[objects[-1].colour])
    if style.noise:
        fog = np.asarray(image) + noise_rng.normal(0, style.noise, noise.shape)
        image = Image.fromarray(fog.clip(0, 255).astype(np.uint8))
    if dusk:
        image = Image.fromarray((np.asarray(image) * DUSK_LIGHT + DUSK_HAZE).astype(np.uint8))
    return Scene(image, tuple(objects))


def render_many(count: int, seed: int, dusk: bool = False, style: Style = CROWDED) -> list[Scene]:
    """Draw `count` scenes; the same seed gives the same pictures."""
    rng = random.Random(seed)
    return [render(rng, dusk, style) for _ in range(count)]


def _single(scene: Scene, attribute: str) -> list[SceneObject]:
    """Objects whose colour (or shape) occurs once, so that a question about it has one answer."""
    values = [getattr(item, attribute) for item in scene.objects]
    return [item for item in scene.objects if values.count(getattr(item, attribute)) == 1]


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """Make a question of one kind about a scene, or None where the scene allows none of that kind."""
    if kind == "colour" and (items := _single(scene, "shape")):
        item = rng.choice(items)
        wrong = tuple(colour for colour in COLOURS if colour != item.colour)
        return Question(kind, f"what color is the {item.shape}", item.colour, wrong, (item,))
    if kind == "shape" and (items := _single(scene, "colour")):
        item = rng.choice(items)
        wrong = tuple(shape for shape in SHAPES if shape != item.shape)
        return Question(kind, f"what shape is the {item.colour} object", item.shape, wrong, (item,))
    if kind == "count":
        answer = NUMBERS[len(scene.objects)]
        return Question(kind, "how many objects", answer, tuple(n for n in NUMBERS.values() if n != answer))
    if kind == "existence":
        present = {(item.colour, item.shape) for item in scene.objects}
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
        yes = rng.random() < 0.5
        colour, shape = rng.choice(sorted(present) if yes else absent)
        text = f"is there a {colour} {shape}"
        return Question(kind, text, "yes" if yes else "no", ("no" if yes else "yes",))
    if kind == "relation" and len(items := _single(scene, "shape")) >= 2:
        first, second = rng.sample(items, 2)
        if abs(first.box[0] - second.box[0]) < PATCH_SIZE:
            return None
        yes = first.box[0] < second.box[0]
        text = f"is the {first.shape} left of the {second.shape}"
        return Question(kind, text, "yes" if yes else "no", ("no" if yes else "yes",), (first, second))
    return None


def ask_any(scene: Scene, rng: random.Random, kinds: tuple[str, ...] = QUESTION_KINDS) -> Question:
    """Make a question of a random kind that the scene allows."""
    for kind in rng.sample(kinds, len(kinds)):
        if question := ask(scene, kind, rng):
            return question
    raise ValueError(f"no question of the kinds {kinds} can be asked about this scene")


def wrong_caption(scene: Scene, rng: random.Random) -> str:
    """The caption with one colour or one shape replaced by another: wrong in a single visual fact."""
    words = [[item.colour, item.shape] for item in scene.objects]
    item, slot = rng.randrange(len(words)), rng.randrange(2)
    values = SHAPES if slot else tuple(COLOURS)
    words[item][slot] = rng.choice([value for value in values if value != words[item][slot]])
    return " and ".join(" ".join(pair) for pair in words)


def facts_right(said: str, scene_caption: str) -> float:
    """Share of the facts of a caption, colour and shape of each object in order, that are right.

    An object too many or too few counts as two facts that are wrong.

    Args:
        said: a caption to be judged.
        scene_caption: what the scene shows.
    """
    told, true = ([part.split() for part in caption.split(" and ")] for caption in (said, scene_caption))
    right = sum(
        one == other
        for first, second in zip(told, true, strict=False)
        for one, other in zip(first, second, strict=False)
    )
    return right / (2 * max(len(told), len(true)))
