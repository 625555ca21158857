"""An encoder's signature: its features of two generated pictures, by which a copy is known to compute the same."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from pivot_plugin.models.evaluating import evaluating
from pivot_plugin.models.find import find_adapter

# numbers kept of each picture's mean feature vector
KEPT = 64
SIDE = 224
# relative to the length of the vector: other versions and devices round otherwise
TOLERANCE = {"float32": 2e-3, "bfloat16": 6e-2, "float16": 2e-2}


def pictures() -> list[Image.Image]:
    """Two pictures made by whole-number arithmetic, the same on every machine."""
    row, column = np.mgrid[0:SIDE, 0:SIDE]
    waves = np.stack([row * column // 97, row * 5 + column * 3, (row // 16 + column // 16) * 37], axis=-1) % 256
    blocks = np.stack([row * 255 // SIDE, column * 255 // SIDE, (row // 32) * (column // 32) * 11], axis=-1) % 256
    return [Image.fromarray(values.astype(np.uint8)) for values in (waves, blocks)]


@torch.no_grad()
def signature(encoder: PreTrainedModel, image_processor: Any) -> dict[str, Any]:
    """What is stored of an encoder's features.

    Args:
        encoder: stand-alone, read at the layer its configuration names.
        image_processor: its own.

    Returns:
        precision, and per picture the length of the mean feature vector and its first numbers.
    """
    adapter = find_adapter(encoder, encoder=True)
    inputs = {
        name: value.to(device=encoder.device, dtype=encoder.dtype if value.is_floating_point() else value.dtype)
        for name, value in image_processor(images=pictures(), return_tensors="pt").items()
    }
    with evaluating(encoder):
        vectors = [features.values.float().mean(dim=0).cpu() for features in adapter.patch_features(inputs)]
    return {
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "width": len(vectors[0]),
        "length": [round(vector.norm().item(), 6) for vector in vectors],
        "first": [[round(number, 6) for number in vector[:KEPT].tolist()] for vector in vectors],
    }


def differs(stored: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Whether two signatures are of different encoders.

    Args:
        stored: of a record, which may come from strangers.
        found: computed now.

    Returns:
        None where they agree within rounding, else what differs.
    """
    try:
        if stored["width"] != found["width"]:
            return f"features have width {found['width']}, {stored['width']} were recorded"
        tolerance = TOLERANCE.get(str(stored["dtype"]), 2e-3)
        worst = 0.0
        for index, length in enumerate(found["length"]):
            gap = np.array(stored["first"][index], dtype=float) - np.array(found["first"][index], dtype=float)
            worst = max(worst, float(np.linalg.norm(gap)) / max(length, 1e-12))
            worst = max(worst, abs(float(stored["length"][index]) - length) / max(length, 1e-12))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return f"the recorded signature cannot be read ({type(error).__name__})"
    return (
        None
        if worst <= tolerance
        else f"features of generated pictures are {worst:.2g} apart, relative to their length"
    )
