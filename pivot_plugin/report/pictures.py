"""Heat maps over images, as pictures that stand in the page."""

import base64
import io
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps

from pivot_plugin.errors import SettingsError
from pivot_plugin.extras import require
from pivot_plugin.probes.gradients import PairSaliency
from pivot_plugin.probes.scores import ProbeResult

SIDE = 168
SHEET_PAIRS, GAP = 4, 6
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


def saliency_sheet(probes: Mapping[str, Mapping[int, ProbeResult]], count: int = SHEET_PAIRS) -> Image.Image | None:
    """Some pairs as one picture for a model card: a row each, the image, then the maps of each loss before and after.

    Args:
        probes: results by label and step.
        count: pairs at most.

    Returns:
        None where no maps were kept, or matplotlib is not installed.
    """
    looks = [steps for steps in probes.values() if isinstance(steps[max(steps)].artefacts, list)]
    looks = [steps for steps in looks if all(isinstance(a, PairSaliency) for a in steps[max(steps)].artefacts)]
    if not looks or len(looks[0]) < 2:
        return None
    first, last = (looks[0][step].artefacts for step in (min(looks[0]), max(looks[0])))
    try:
        rows = [
            [fitted(before.image)]
            + [overlay(pair.image, pair.maps[loss], pair.box) for loss in before.maps for pair in (before, after)]
            for before, after in list(zip(first, last, strict=True))[:count]
        ]
    except SettingsError:
        return None
    wide, high = max(map(len, rows)), len(rows)
    sheet = Image.new("RGB", (wide * (SIDE + GAP) - GAP, high * (SIDE + GAP) - GAP), "white")
    for down, row in enumerate(rows):
        for across, shown in enumerate(row):
            sheet.paste(shown, (across * (SIDE + GAP), down * (SIDE + GAP)))
    return sheet
