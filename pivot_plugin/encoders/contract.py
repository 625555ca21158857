"""What an encoder takes and gives, in the words of its card: read off its image processor and off one run of it.

Nothing here is taken from a table of families: which layer is read is found by comparing the features with what every
block and norm answered, and their order by comparing them with the patch grid of the adapter.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.models.evaluating import evaluating
from pivot_plugin.models.find import find_adapter

from .compatibility import RELEASE_NOTES, checked_releases
from .signature import pictures

logger = logging.getLogger(__name__)

_RESAMPLING = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "Hamming"}


def contract(encoder: PreTrainedModel, image_processor: Any) -> dict[str, Any] | None:
    """What goes into an encoder, what comes out, and where that was checked.

    Args:
        encoder: stand-alone, read at the layer its configuration names.
        image_processor: its own.

    Returns:
        sentences under `in`, `out` and `layer`, the lines of a diagram under `flow`, `releases` of transformers, and
        `notes` on these; None for an encoder that cannot be run by itself.
    """
    releases = list(checked_releases(encoder.config.model_type))
    try:
        out, layer, flow = _given(encoder, image_processor)
        notes = list(RELEASE_NOTES.get(encoder.config.model_type, ()))
        told = {"in": _taken(image_processor), "out": out, "layer": layer, "flow": flow}
        return told | {"releases": releases, "notes": notes}
    # an encoder of a foreign family may want what a plain call does not give; its weights are paid for
    except Exception as error:
        logger.warning("What a %s takes and gives is not on its card: %s", type(encoder).__name__, error)
        return None


def is_put_on_square(image_processor: Any) -> bool:
    """Whether an image processor puts an image on a square before anything else, as LLaVA's does."""
    return bool(getattr(image_processor, "do_pad", False)) and hasattr(image_processor, "pad_to_square")


def _taken(image_processor: Any) -> str:
    """How an image becomes what the encoder is called with."""

    def setting(name: str) -> Any:
        return getattr(image_processor, name, None)

    steps = ["RGB images"]
    resample = setting("resample")
    how = f" ({_RESAMPLING.get(int(resample), 'other')})" if resample is not None else ""
    size = {name: value for name, value in dict(setting("size") or {}).items() if value is not None}
    if is_put_on_square(image_processor):
        steps.append("put in the middle of a square of the mean colour")
    if setting("do_resize"):
        steps.append(f"resized{how} {_resized(size, setting)}")
    if setting("do_center_crop") and setting("crop_size"):
        crop = dict(setting("crop_size"))
        steps.append(f"cut to the middle {crop['height']} x {crop['width']}")
    if setting("do_rescale"):
        steps.append(f"values of 0 to 255 times {float(setting('rescale_factor')):.6g}")
    if setting("do_normalize"):
        mean, std = (", ".join(f"{float(v):.6g}" for v in setting(name)) for name in ("image_mean", "image_std"))
        steps.append(f"less mean ({mean}), divided by deviation ({std})")
    return "; ".join(steps)


def _resized(size: dict[str, int], setting: Any) -> str:
    if "height" in size and "width" in size:
        return f"to {size['height']} x {size['width']}, not keeping the aspect ratio"
    if "shortest_edge" in size and setting("merge_size"):
        multiple = int(setting("patch_size")) * int(setting("merge_size"))
        fewest, most = size["shortest_edge"], size["longest_edge"]
        return f"to edges of multiples of {multiple}, keeping the aspect ratio, {fewest:,} to {most:,} pixels in all"
    if "shortest_edge" in size:
        return f"to a shortest edge of {size['shortest_edge']}, keeping the aspect ratio"
    return f"by {size}"


@torch.no_grad()
def _given(encoder: PreTrainedModel, image_processor: Any) -> tuple[str, str, list[str]]:
    """Shape and order of the features of one image, behind which module they are read, and the way there, drawn."""
    adapter = find_adapter(encoder, encoder=True)
    image = pictures()[0].resize((224, 160), Image.Resampling.NEAREST)
    inputs = {
        name: value.to(device=encoder.device, dtype=encoder.dtype if value.is_floating_point() else value.dtype)
        for name, value in image_processor(images=[image], return_tensors="pt").items()
    }
    blocks = [path.lstrip(".") for path in adapter.blocks()]
    with evaluating(encoder), _watched(encoder, blocks) as answers:
        hidden = adapter.hidden_state(adapter.run_tower(encoder, inputs))
        rows = adapter.on_grid(hidden, inputs, encoder)[0]
    layer = _read_at(hidden, answers, blocks)
    flow = _flow(image, inputs.get("pixel_values"), rows.grid, hidden, layer)
    return _shape(hidden, rows.values, rows.grid, adapter, encoder), layer, flow


def _flow(
    image: Image.Image, pixels: torch.Tensor | None, grid: tuple[int, int], hidden: torch.Tensor, layer: str
) -> list[str]:
    """What one image becomes on its way to the features, with its sizes, a line a station."""
    counted = "patches of all images" if hidden.ndim == 2 else "images, tokens"
    if hidden.ndim == 3 and hidden.shape[1] == grid[0] * grid[1]:
        counted = "images, patches"
    stations = [("image", f"for example {image.width} x {image.height}")]
    if pixels is not None:
        stations.append(("pixel_values", _sizes(pixels)))
    stations += [
        ("patches", f"{grid[0]} rows x {grid[1]} columns"),
        ("features", f"{_sizes(hidden)}  ({counted}, dim), {layer.replace('`', '')}"),
    ]
    lines = [f"{name:<12}  {sizes}" for name, sizes in stations]
    return [line for station in lines for line in (station, "  |")][:-1]


def _sizes(tensor: torch.Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _shape(
    hidden: torch.Tensor,
    raster: torch.Tensor,
    grid: tuple[int, int],
    adapter: VisionAdapter,
    encoder: PreTrainedModel,
) -> str:
    width, patches = hidden.shape[-1], len(raster)
    # the patches stand at the end of a row of tokens
    flat = hidden.flatten(0, -2)[-patches:]
    merge = int(getattr(encoder.config, "spatial_merge_size", 1) or 1)
    if torch.equal(flat, raster):
        order = "in raster order"
    elif torch.equal(flat, _in_blocks(raster, grid, merge)):
        order = f"in blocks of {merge} x {merge}, blocks and what is in them in raster order"
    else:
        order = "in the tower's own order, which `pivot_plugin` puts into raster order"
    if hidden.ndim == 2:
        return f"(patches of all images, {width}), {order}; an image has as many as its `image_grid_thw` multiplies to"
    others = hidden.shape[1] - patches if hidden.ndim == 3 else 0
    first = f"{others} class or register token{'s' if others > 1 else ''}, then " if others else ""
    rows, columns = grid
    shape = ", ".join(str(size) for size in hidden.shape[1:])
    return f"(images, {shape}): {first}{rows} x {columns} patches {order}"


def _in_blocks(raster: torch.Tensor, grid: tuple[int, int], merge: int) -> torch.Tensor:
    rows, columns = grid
    if rows % merge or columns % merge:
        return raster[:0]
    square = raster.reshape(rows // merge, merge, columns // merge, merge, -1)
    return square.transpose(1, 2).reshape(rows * columns, -1)


@contextmanager
def _watched(encoder: PreTrainedModel, blocks: list[str]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """What every block, and every norm that stands in no block, answers meanwhile, in the order of their calls."""
    answers: list[tuple[str, torch.Tensor]] = []

    def hook(path: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            answers.append((path, output[0] if isinstance(output, tuple) else output))

        return keep

    watched = [
        (path, module)
        for path, module in encoder.named_modules()
        if path in blocks
        or ("norm" in type(module).__name__.lower() and not any(path.startswith(f"{block}.") for block in blocks))
    ]
    handles = [module.register_forward_hook(hook(path)) for path, module in watched]
    try:
        yield answers
    finally:
        for handle in handles:
            handle.remove()


def _read_at(hidden: torch.Tensor, answers: list[tuple[str, torch.Tensor]], blocks: list[str]) -> str:
    """Behind which block or norm a hidden state stands, and before which norm."""
    seen = [path for path, answer in answers if answer.numel() == hidden.numel() and _same(answer, hidden)]
    if not seen:
        return "the tower's own output"
    path = seen[-1]
    if path not in blocks:
        return f"behind the norm `{path}`, which follows block {len(blocks)} of {len(blocks)}"
    number, after = blocks.index(path) + 1, [name for name, _ in answers]
    closing = [name for name in after[after.index(path) + 1 :] if name not in blocks]
    before = f", before the norm `{closing[0]}`" if closing else ""
    return f"behind block {number} of {len(blocks)}{before}"


def _same(answer: torch.Tensor, hidden: torch.Tensor) -> bool:
    return torch.equal(answer.reshape(-1), hidden.reshape(-1))
