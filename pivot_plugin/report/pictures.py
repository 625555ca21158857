"""Heat maps over images, as pictures that stand in the page."""

import base64
import io

import numpy as np
from PIL import Image, ImageOps

from pivot_plugin.extras import require

SIDE = 168
OPACITY = 0.6


def overlay(image: Image.Image, values: np.ndarray, box: tuple[float, float, float, float]) -> Image.Image:
    """A heat map laid over an image: one flat block per patch, divided by the map's largest value, nothing smoothed.

    Args:
        image: as it was given.
        values: (rows, columns), not negative.
        box: the part of the image that the map covers, as shares of width and height.
    """
    shown = fitted(image)
    left, top, right, bottom = (
        round(share * edge) for share, edge in zip(box, (*shown.size, *shown.size), strict=True)
    )
    highest = float(values.max())
    scaled = values / highest if highest > 0 else np.zeros_like(values)
    colours = require("matplotlib", "probes", "A report").colormaps["inferno"](scaled)[..., :3]
    heat = Image.fromarray((colours * 255).astype(np.uint8)).resize(
        (max(1, right - left), max(1, bottom - top)), Image.Resampling.NEAREST
    )
    covered = shown.crop((left, top, left + heat.width, top + heat.height))
    # the shapes of a dark image are to be seen below the map too
    grey = ImageOps.autocontrast(covered.convert("L")).convert("RGB")
    shown.paste(Image.blend(grey, heat, OPACITY), (left, top))
    return shown


def fitted(image: Image.Image) -> Image.Image:
    """An image scaled so that its longer side has SIDE pixels; small ones are enlarged pixel by pixel."""
    scale = SIDE / max(image.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    return image.convert("RGB").resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), how)


def as_address(image: Image.Image) -> str:
    """A picture as a data: address, so that the page needs no other file."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
