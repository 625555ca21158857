"""What an image processor shows of a picture, measured with pictures whose every part is known.

Processors resize, crop, pad, and cut into tiles, each family in its own way and by settings of its own names. What
comes out tells all of it: a picture that grows brighter from left to right says where each column came from, and one
with another colour in each quarter says which tile shows the whole.

Notation for shapes: V views (tiles, or the one picture), R rows and C columns of a lattice: pixels, or patches where
the processor gives those.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from .grids import Grid, patches_on_grids

Box = tuple[float, float, float, float]
End = Literal["first", "last"]

# what cuts a picture into tiles, by every name that transformers has for it, and the value that does not
ONE_VIEW: Mapping[str, Any] = {
    "crop_to_patches": False,
    "do_image_splitting": False,
    "do_pan_and_scan": False,
    "split_image": False,
    "slice_mode": False,
    "max_image_tiles": 1,
    "vision_input_type": "vanilla",
}
WHOLE = (0.0, 0.0, 1.0, 1.0)
# shares of a picture's edge that rounding to whole pixels and patches may hide
SNAP = 0.012
# of a picture by which the order of patches is told
ORDER = (336, 224)


def settings_of(image_processor: Any) -> str | None:
    """What an image processor does with pictures, as far as its settings say it; None for one that has none to say.

    Args:
        image_processor: of any family.
    """
    if not hasattr(image_processor, "to_json_string"):
        return None
    kind = type(image_processor)
    return f"{kind.__module__}.{kind.__qualname__} {image_processor.to_json_string()}"


def without_tiles(image_processor: Any) -> Any:
    """A copy of an image processor with every setting that cuts pictures into tiles switched off.

    Args:
        image_processor: of any family.
    """
    whole = copy.deepcopy(image_processor)
    for name, value in ONE_VIEW.items():
        if hasattr(whole, name):
            setattr(whole, name, value)
    return whole


def one_view_processor(image_processor: Any, clip: bool) -> Any:
    """An image processor that shows every picture in one view of the whole, as far as any does.

    Where the one view has the same size for every picture, and comes with an axis for tiles or among tiles that no
    setting switches off, it is one that resizes and nothing else.

    Args:
        image_processor: of an MLLM.
        clip: whether the plain one is to be CLIP's, and not SigLIP's.
    """
    whole = without_tiles(image_processor)
    shapes = set()
    for size in ((64, 64), (256, 64)):
        try:
            inputs = _processed(whole, Image.new("RGB", size, (200, 100, 50)))
        # one that takes no such picture is published as it is
        except ValueError:
            return whole
        pixels = pixels_of(inputs)
        if pixels is None or _is_one_row_per_patch(inputs) or not (has_tile_axis(pixels) or pixels.ndim == 4):
            return whole
        if not has_tile_axis(pixels) and len(pixels) == 1:
            return whole
        shapes.add(tuple(pixels.shape[-2:]))
    if len(shapes) > 1:
        return whole
    height, width = shapes.pop()
    return plain_processor(image_processor, height, width, clip)


def plain_processor(tiling: Any, height: int, width: int, clip: bool) -> BaseImageProcessor:
    """An image processor that resizes, and colours as another one.

    Args:
        tiling: the other one.
        height, width: of its views in pixels.
        clip: whether it is to be CLIP's, and not SigLIP's.
    """
    size = {"height": height, "width": width}
    settings = {"image_mean": tiling.image_mean, "image_std": tiling.image_std, "resample": tiling.resample}
    if clip:
        return CLIPImageProcessor(size=size, do_center_crop=False, **settings)
    return SiglipImageProcessor(size=size, **settings)


def pixels_of(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """The pictures among a processor's outputs."""
    return next((v for n, v in inputs.items() if n.startswith("pixel_values") and isinstance(v, torch.Tensor)), None)


def has_tile_axis(pixels: torch.Tensor) -> bool:
    """Whether pictures have an axis for their tiles: (I, T, channels, height, width)."""
    return pixels.ndim == 5 and pixels.shape[2] in (1, 3)


def real_tiles(pixels: torch.Tensor) -> torch.Tensor:
    """(I, T) which of the tiles of pictures are any: those with fewer than others are filled up with zeros."""
    return pixels.flatten(2).any(dim=2)


def stacked_views(pixels: torch.Tensor) -> torch.Tensor:
    """(V, ...) the views of all pictures, without an axis for the tiles of each, and without mere padding."""
    return pixels[real_tiles(pixels)] if has_tile_axis(pixels) else pixels


def views_of_each(inputs: Mapping[str, Any], image_tokens: Sequence[int] | None = None) -> list[int] | None:
    """How many views there are of each picture.

    Args:
        inputs: a processor's outputs about the pictures.
        image_tokens: of each picture in the language model's input, where that is known.

    Returns:
        counts in order, those that are mere padding left out; None where nothing tells, or there is one row per patch.
    """
    pixels = pixels_of(inputs)
    if pixels is None or _is_one_row_per_patch(inputs):
        return None
    images = None if image_tokens is None else len(image_tokens)
    if has_tile_axis(pixels):
        counts = [max(1, count) for count in real_tiles(pixels).sum(dim=1).tolist()]
        if images in (None, len(counts)):
            return counts
    rows = len(stacked_views(pixels))
    if rows == images:
        return [1] * rows
    for counts in _said_counts(inputs):
        if sum(counts) == rows and images in (None, len(counts)):
            return counts
    total = sum(image_tokens or ())
    if image_tokens and all(count and rows * count % total == 0 for count in image_tokens):
        # every view is as many tokens
        return [rows * count // total for count in image_tokens]
    return [rows] if images == 1 else None


def _is_one_row_per_patch(inputs: Mapping[str, Any]) -> bool:
    return any(name.endswith(("grid_thw", "grid_hw", "target_sizes")) for name in inputs)


def _said_counts(inputs: Mapping[str, Any]) -> Iterator[list[int]]:
    """What among a processor's outputs may be numbers of views: one per picture, or a grid of tiles and the whole."""
    for value in inputs.values():
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            continue
        if value.ndim == 1:
            yield [int(count) for count in value.tolist()]
        elif value.ndim == 2 and value.shape[1] == 2:
            tiles = [int(down) * int(across) for down, across in value.tolist()]
            yield [count + (count > 1) for count in tiles]


def whole_end(image_processor: Any, edge: int) -> End | None:
    """Where the view of the whole stands among the tiles of a picture: the one that shows it from end to end.

    Args:
        image_processor: that may cut tiles.
        edge: of a tile in pixels, or about that.

    Returns:
        "first" or "last"; None where pictures are not cut into tiles.

    Raises:
        ValueError: if neither the first nor the last of several views shows the whole picture.
    """
    for size in ((2 * edge, 2 * edge), (4 * edge, 2 * edge)):
        inputs = _processed(image_processor, Image.new("RGB", size, (200, 100, 50)))
        pixels = pixels_of(inputs)
        if pixels is None or _is_one_row_per_patch(inputs) or (pixels.ndim > 4 and not has_tile_axis(pixels)):
            return None
        if len(stacked_views(pixels)) > 1:
            shown = _shares_of_views(image_processor, size)
            if abs(shown[0] - shown[-1]) < 0.15:
                raise ValueError(f"of {len(shown)} views neither the first nor the last alone shows the whole picture")
            return "first" if shown[0] > shown[-1] else "last"
    return None


def patches_in_blocks(image_processor: Any, config: Any) -> bool | None:
    """Whether a processor that gives one row per patch cuts them block by block, and not in raster order.

    Args:
        image_processor: of an MLLM.
        config: of its tower.

    Returns:
        None for a processor that gives whole pictures.
    """
    _, _, across, down = _greys(ORDER)
    uneven = {}
    for in_blocks in (True, False):
        lattices = [_patch_lattice(image_processor, values, config, in_blocks) for values in (across, down)]
        if lattices[0] is None or lattices[1] is None:
            return None
        # brightness that grows to the right is the same all along a column
        uneven[in_blocks] = float(lattices[0].std(dim=0).mean() + lattices[1].std(dim=1).mean())
    return uneven[True] <= uneven[False]


def _patch_lattice(image_processor: Any, values: np.ndarray, config: Any, in_blocks: bool) -> torch.Tensor | None:
    """(R, C) brightness of a grey picture in each of its patches; None for a processor that gives whole pictures."""
    inputs = _processed(image_processor, _grey(values))
    pixels = pixels_of(inputs)
    if pixels is None or not _is_one_row_per_patch(inputs):
        return None
    patches = patches_on_grids(pixels.flatten(1), inputs, config, in_blocks)
    return None if patches is None else patches[0].values.float().mean(dim=1).reshape(patches[0].grid)


def _shares_of_views(image_processor: Any, size: tuple[int, int]) -> list[float]:
    """Of each view of a picture, how much of its area it shows.

    Args:
        image_processor: that cuts tiles.
        size: width and height of the picture.
    """
    black, white, x, y = (_levels_of_views(image_processor, values) for values in _greys(size))
    contrast = white - black
    shares = []
    for index, seen in enumerate(contrast):
        inside = seen > 0.9 * contrast.max()
        if not inside.any():
            shares.append(0.0)
            continue
        brightness = [((ramp[index] - black[index]) / seen)[inside] for ramp in (x, y)]
        across, down = (float(values.max() - values.min()) for values in brightness)
        shares.append(across * down)
    return shares


def _levels_of_views(image_processor: Any, values: np.ndarray) -> torch.Tensor:
    """(V, places) brightness of a grey picture in each of its views; places are pixels, or patches."""
    pixels = pixels_of(_processed(image_processor, _grey(values)))
    assert pixels is not None
    views = pixels[0] if has_tile_axis(pixels) else pixels
    # channels of pixels, or the numbers of a patch
    return views.float().mean(dim=1 if views.ndim == 4 else -1).flatten(1)


def _greys(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Brightness of four pictures: black, white, and growing from left to right and from top to bottom.

    Args:
        size: width and height.
    """
    across, down = (np.linspace(0, 255, count, dtype=np.float32) for count in size)
    flat = np.zeros((size[1], size[0]), dtype=np.float32)
    return flat, flat + 255, flat + across, flat + down[:, None]


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(values).astype(np.uint8)).convert("RGB")


def shown_box(image_processor: Any, size: tuple[int, int], patch: tuple[int, int] | None, config: Any) -> Box:
    """Which part of a picture lies under the patch grid that a tower makes of it.

    Args:
        image_processor: that shows pictures in one view.
        size: width and height of the picture.
        patch: height and width of the tower's patches in pixels, None for one without.
        config: of the tower.

    Returns:
        left, top, right and bottom as shares of width and height. Below 0 and above 1 where a border was put around
        the picture.
    """
    in_blocks = patches_in_blocks(image_processor, config)
    if in_blocks is None:
        lattices = [_lattice(image_processor, values, patch) for values in _greys(size)]
    else:
        lattices = [_patch_lattice(image_processor, values, config, in_blocks) for values in _greys(size)]
    if any(one is None for one in lattices) or len({one.shape for one in lattices if one is not None}) != 1:
        return WHOLE
    black, white, x, y = (one for one in lattices if one is not None)
    contrast = white - black
    inside = contrast > 0.9 * contrast.max()
    left, right = _edges(((x - black) / contrast.clamp(min=1e-6)), inside, dim=0, count=size[0])
    top, bottom = _edges(((y - black) / contrast.clamp(min=1e-6)), inside, dim=1, count=size[1])
    return left, top, right, bottom


def _edges(shares: torch.Tensor, inside: torch.Tensor, dim: int, count: int) -> tuple[float, float]:
    """What share of a picture lies at the two ends of a lattice, by the straight line through what lies between.

    Args:
        shares: (R, C) of the picture's brightness, which grows along it.
        inside: (R, C) where the picture is, and not its border.
        dim: that is summed over, across the ramp.
        count: pixels of the picture along the ramp.
    """
    weights = inside.float()
    seen = weights.sum(dim=dim)
    places = (seen > 0).nonzero()[:, 0]
    # what lies at the edges is mixed with what lies beyond them
    kept = places[len(places) // 8 : len(places) - len(places) // 8]
    if len(kept) < 2:
        return 0.0, 1.0
    line = ((shares * weights).sum(dim=dim) / seen.clamp(min=1))[kept]
    # the ramp goes from the middle of the first pixel to the middle of the last
    line = (line * (count - 1) + 0.5) / count
    at = kept.float() + 0.5
    slope = float(((at - at.mean()) * (line - line.mean())).sum() / (at - at.mean()).square().sum())
    start = float(line.mean() - slope * at.mean())
    return _snapped(start, 0.0), _snapped(start + slope * shares.shape[1 - dim], 1.0)


def _snapped(share: float, whole: float) -> float:
    return whole if abs(share - whole) <= SNAP else share


def _lattice(image_processor: Any, values: np.ndarray, patch: tuple[int, int] | None) -> torch.Tensor | None:
    """(R, C) brightness of a grey picture as the tower gets it, up to the last patch; None where it cannot be told."""
    inputs = _processed(image_processor, _grey(values))
    pixels = pixels_of(inputs)
    if pixels is None:
        return None
    views = stacked_views(pixels)
    if views.ndim != 4 or views.shape[1] not in (1, 3) or len(views) != 1 or _is_one_row_per_patch(inputs):
        return None
    rows, columns = _kept_pixels(views.shape[-2:], inputs, patch)
    return views[0].float().mean(dim=0)[:rows, :columns]


def _kept_pixels(size: Any, inputs: Mapping[str, Any], patch: tuple[int, int] | None) -> Grid:
    """Rows and columns of pixels under the patch grid: whole patches, those of the mask where there is one."""
    rows, columns = (int(edge) for edge in size)
    if patch is None:
        return rows, columns
    mask = inputs.get("pixel_attention_mask", inputs.get("pixel_mask"))
    if mask is not None and tuple(mask.shape[-2:]) == (rows, columns):
        shown = mask.reshape(-1, rows, columns)[0].bool()
        # a patch that is shown in part is kept
        rows = min(rows, -(-int(shown.any(dim=1).sum()) // patch[0]) * patch[0])
        columns = min(columns, -(-int(shown.any(dim=0).sum()) // patch[1]) * patch[1])
    return rows // patch[0] * patch[0], columns // patch[1] * patch[1]


def _processed(image_processor: Any, picture: Image.Image) -> dict[str, Any]:
    """What an image processor makes of a picture.

    Raises:
        ValueError: if it makes nothing of it.
    """
    try:
        return dict(image_processor(images=[picture], return_tensors="pt"))
    # processors are foreign code, and raise what they like
    except Exception as error:
        raise ValueError(f"it takes no plain picture: {type(error).__name__}: {error}") from error
