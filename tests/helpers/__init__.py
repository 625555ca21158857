"""What tests of every room begin with: pictures, preference pairs about them, and the type of a tiny model."""

from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

Tiny = tuple[PreTrainedModel, ProcessorMixin]


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row(text: str, chosen: str, rejected: str, *images: Image.Image) -> dict[str, Any]:
    return {"images": list(images), "prompt": text, "chosen": chosen, "rejected": rejected}
