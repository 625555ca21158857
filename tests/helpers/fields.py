"""Pictures that look alike whichever way they are turned: smooth random fields, stored as people's pictures are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.images import encoded

GRIDS = (8, 16, 32)


def field(side: int, seed: int) -> Image.Image:
    """A square picture without up or down, and without a middle: part of a larger one."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(rng.normal(size=(grid, grid)).astype(np.float32)).resize((2 * side, 2 * side), 3))
        for grid in GRIDS
        for _ in range(3)
    ]
    values = sum(np.stack(layers[start : start + 3], axis=2) for start in range(0, len(layers), 3))
    part = values[side // 2 : side // 2 + side, side // 2 : side // 2 + side]
    scaled = (part - part.min()) / (part.max() - part.min()) * 255
    return Image.fromarray(scaled.astype(np.uint8))


def stored(count: int, side: int = 100, seed: int = 0) -> list[bytes]:
    """Fields as JPEG of several qualities and ways to keep colours, and as PNG."""
    rng = np.random.default_rng(seed)
    files = []
    for number in range(count):
        image = field(side, seed * 1000 + number)
        options = {"quality": int(rng.integers(50, 95)), "subsampling": int(rng.integers(0, 3))}
        files.append(encoded(image) if number % 4 == 0 else encoded(image, "JPEG", **options))
    return files


def written(folder: Path, count: int, side: int = 64, captions: Sequence[str] = ()) -> Path:
    """A folder of such pictures, with captions beside them where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        field(side, number).save(folder / f"{number:03}.png")
        if captions:
            (folder / f"{number:03}.txt").write_text(captions[number % len(captions)])
    return folder
