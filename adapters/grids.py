"""Where the tokens of a vision tower lie in its pictures: what the shapes of its inputs say of any tower.

Six ways in which towers of transformers take pictures, tried in this order:

    sizes given in patches       image_grid_thw, target_sizes: one row per patch; spatial_shapes: rows that are padded
    positions given              one pair of coordinates per patch
    sizes given in pixels        image_sizes: pictures padded to the largest, patches of all in one row
    pictures padded, with a mask pixel_attention_mask, pixel_mask: patches of the padded picture, those of the mask kept
    maps                         convolutional nets: rows and columns are axes of their own
    one size for all             rows and columns by the patch size, class and register tokens in front

Notation for shapes: I pictures (or tiles), T tokens, D width, R rows and C columns of patches.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.vision_utils import get_vision_window_index

Grid = tuple[int, int]


@dataclass(frozen=True)
class ImageFeatures:
    """Features of one image as the projector reads them, in raster order.

    Attributes:
        values: (R * C, D) features, one row per patch.
        grid: R and C of the patch grid.
    """

    values: torch.Tensor
    grid: Grid


def on_grids(
    hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any, in_blocks: bool | None = None
) -> list[ImageFeatures] | None:
    """Tokens of a tower, picture by picture, where they lie.

    Args:
        hidden: (I, T, D), (T, D) or maps, as the tower answered.
        inputs: processor outputs about the pictures.
        config: of the tower.
        in_blocks: whether the processor cuts its patches block by block; by the shape of its pixels where None.

    Returns:
        I records, or None where nothing tells how the tokens lie.
    """
    found = _by_grids(hidden, inputs, config, in_blocks)
    if found is not None:
        return found
    ways = (_by_shapes, _by_positions, _by_sizes, _by_mask, _by_maps, _by_patch_size, _by_square)
    return next((found for way in ways if (found := way(hidden, inputs, config)) is not None), None)


def _by_grids(
    hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any, in_blocks: bool | None
) -> list[ImageFeatures] | None:
    if hidden.ndim > 3 or not (grids := _said_grids(inputs)):
        return None
    rows = hidden.flatten(0, -2)
    in_blocks = _come_in_blocks(inputs) if in_blocks is None else in_blocks
    # towers that merge patches by themselves answer with one token per block, in raster order
    merged = _merges_of_each(inputs, config, len(grids))
    for merges, whole_patches in (([1] * len(grids), True), (merged, False)):
        sizes = [down // merge * (across // merge) for (down, across), merge in zip(grids, merges, strict=True)]
        if sum(sizes) != len(rows):
            continue
        if _in_windows(config):
            rows = _out_of_windows(rows, inputs, config, 1 if whole_patches else merged[0])
        found = []
        for part, grid, merge, block in zip(rows.split(sizes), grids, merges, merged, strict=True):
            as_blocks = whole_patches and in_blocks and block > 1
            found.append(ImageFeatures(_from_blocks(part, grid, block) if as_blocks else part, _divided(grid, merge)))
        return found
    return None


def _said_grids(inputs: Mapping[str, Any]) -> list[Grid]:
    """Rows and columns of patches of each picture, where the processor says them as they lie in its rows."""
    for name, value in inputs.items():
        if name.endswith("grid_thw"):
            return [(int(down), int(across)) for _, down, across in value.tolist()]
        if name.endswith(("grid_hw", "target_sizes")):
            return [(int(down), int(across)) for down, across in value.tolist()]
    return []


def _come_in_blocks(inputs: Mapping[str, Any]) -> bool:
    """Whether a processor cuts its patches block by block: those that flatten them do, others keep raster order."""
    pixels = next((value for name, value in inputs.items() if name.startswith("pixel_values")), None)
    return isinstance(pixels, torch.Tensor) and pixels.ndim == 2 and not any(n.endswith("grid_hw") for n in inputs)


def _merges_of_each(inputs: Mapping[str, Any], config: Any, images: int) -> list[int]:
    """Patches along the edge of a block, for each picture."""
    said = next((value for name, value in inputs.items() if name.endswith("merge_sizes")), None)
    return [int(size) for size in said.tolist()] if said is not None else [_merge(config)] * images


def _in_windows(config: Any) -> bool:
    """Whether a tower works, and leaves its last hidden state, in the order of its attention windows."""
    return bool(getattr(config, "window_size", None)) and getattr(config, "fullatt_block_indexes", None) is not None


def _out_of_windows(rows: torch.Tensor, inputs: Mapping[str, Any], config: Any, merge: int) -> torch.Tensor:
    """Patches of towers with attention windows in the order in which the processor gave them."""
    if merge > 1:
        # what is merged already was put back on the way
        return rows
    grids = next(value for name, value in inputs.items() if name.endswith("grid_thw"))
    block = _merge(config)
    order, _ = get_vision_window_index(grids, block, config.window_size, patch_size(config)[0])  # type: ignore[index]
    return rows.reshape(-1, block * block, rows.shape[-1])[torch.argsort(order)].flatten(0, 1)


def patches_on_grids(
    patches: torch.Tensor, inputs: Mapping[str, Any], config: Any, in_blocks: bool
) -> list[ImageFeatures] | None:
    """What a processor gives of each patch, where the patch lies in its picture.

    Args:
        patches: (T, numbers), one row per patch of all pictures.
        inputs: processor outputs about the pictures.
        config: of the tower.
        in_blocks: whether the processor cuts them block by block.

    Returns:
        I records, or None where nothing tells how the patches lie.
    """
    grids = _said_grids(inputs)
    if sum(down * across for down, across in grids) != len(patches):
        return None
    merges = _merges_of_each(inputs, config, len(grids))
    parts = patches.split([down * across for down, across in grids])
    return [
        ImageFeatures(_from_blocks(part, grid, merge) if in_blocks and merge > 1 else part, grid)
        for part, grid, merge in zip(parts, grids, merges, strict=True)
    ]


def _from_blocks(values: torch.Tensor, grid: Grid, merge: int) -> torch.Tensor:
    """From (block row, block column, row in block, column in block), as processors that merge patches cut them."""
    rows, columns = grid
    blocks = values.reshape(rows // merge, columns // merge, merge, merge, -1)
    return blocks.transpose(1, 2).reshape(rows * columns, -1)


def _by_shapes(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[ImageFeatures] | None:
    shapes = inputs.get("spatial_shapes")
    if shapes is None or hidden.ndim != 3 or len(shapes) != len(hidden):
        return None
    grids = [(int(down), int(across)) for down, across in shapes.tolist()]
    return [
        ImageFeatures(row[: down * across], (down, across)) for row, (down, across) in zip(hidden, grids, strict=True)
    ]


def _by_positions(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[ImageFeatures] | None:
    positions = next((value for name, value in inputs.items() if name.endswith("position_ids")), None)
    if positions is None or positions.ndim != 3 or positions.shape[-1] != 2:
        return None
    grids = []
    for places in positions:
        # padding has negative coordinates; x comes before y
        across, down = (int(number) + 1 for number in places.amax(dim=0).tolist())
        grids.append((down, across))
    rows = hidden.flatten(0, -2)
    total = sum(down * across for down, across in grids)
    pool = math.isqrt(total // len(rows)) if len(rows) and total % len(rows) == 0 else 0
    if not pool or total != len(rows) * pool * pool:
        return None
    grids = [_divided(grid, pool) for grid in grids]
    parts = rows.split([down * across for down, across in grids])
    return [ImageFeatures(part, grid) for part, grid in zip(parts, grids, strict=True)]


def _by_sizes(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[ImageFeatures] | None:
    sizes, patch = inputs.get("image_sizes"), patch_size(config)
    if sizes is None or not patch or hidden.ndim > 3:
        return None
    grids = [(int(height) // patch[0], int(width) // patch[1]) for height, width in _listed(sizes)]
    rows = hidden.flatten(0, -2)
    if sum(down * across for down, across in grids) != len(rows):
        return None
    parts = rows.split([down * across for down, across in grids])
    return [ImageFeatures(part, grid) for part, grid in zip(parts, grids, strict=True)]


def _by_mask(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[ImageFeatures] | None:
    mask, patch = inputs.get("pixel_attention_mask", inputs.get("pixel_mask")), patch_size(config)
    if mask is None or not patch or hidden.ndim != 3 or mask.ndim < 3 or mask.shape[-1] < patch[1]:
        return None
    mask = mask.flatten(0, -3).bool()
    down, across = mask.shape[-2] // patch[0], mask.shape[-1] // patch[1]
    if len(mask) != len(hidden) or hidden.shape[1] != down * across:
        return None
    found = []
    for values, shown in zip(hidden, mask, strict=True):
        rows = -(-int(shown.any(dim=1).sum()) // patch[0])
        columns = -(-int(shown.any(dim=0).sum()) // patch[1])
        kept = values.reshape(down, across, -1)[:rows, :columns]
        found.append(ImageFeatures(kept.reshape(rows * columns, -1), (rows, columns)))
    return found


def _by_maps(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[ImageFeatures] | None:
    if hidden.ndim != 4:
        return None
    # (I, R, C, D) of transformers that keep their maps, which have a patch size, or (I, D, R, C) of convolutional nets
    if _expected(inputs, config) == tuple(hidden.shape[1:3]):
        return [ImageFeatures(values.flatten(0, 1), (int(values.shape[0]), int(values.shape[1]))) for values in hidden]
    return [ImageFeatures(values.flatten(1).T, (int(values.shape[1]), int(values.shape[2]))) for values in hidden]


def _by_patch_size(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[ImageFeatures] | None:
    expected = _expected(inputs, config)
    if expected is None or hidden.ndim != 3:
        return None
    count, tokens = expected[0] * expected[1], hidden.shape[1]
    # class and register tokens come before the patches
    if not count or not 0 <= tokens - count <= 16:
        return None
    return [ImageFeatures(values[tokens - count :], expected) for values in hidden]


def _by_square(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[ImageFeatures] | None:
    """Without patch size a square number of tokens, or one more, is a square picture."""
    if hidden.ndim != 3:
        return None
    for extra in (0, 1):
        side = math.isqrt(hidden.shape[1] - extra)
        if side > 1 and side * side == hidden.shape[1] - extra:
            return [ImageFeatures(values[extra:], (side, side)) for values in hidden]
    return None


def _expected(inputs: Mapping[str, Any], config: Any) -> Grid | None:
    """Rows and columns of patches in pictures that all have one size."""
    patch = patch_size(config)
    pixels = next((value for name, value in inputs.items() if name.startswith("pixel_values")), None)
    if not patch or not isinstance(pixels, torch.Tensor) or pixels.ndim < 4:
        return None
    return int(pixels.shape[-2]) // patch[0], int(pixels.shape[-1]) // patch[1]


def patch_size(config: Any) -> tuple[int, int] | None:
    """Height and width of a tower's patches in pixels, None for one without.

    Args:
        config: of the tower.
    """
    size = getattr(config, "patch_size", None)
    if size is None:
        return None
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _merge(config: Any) -> int:
    for name in ("spatial_merge_size", "merge_size", "merge_kernel_size", "window_kernel_size"):
        size = getattr(config, name, None)
        if size:
            return int(size if isinstance(size, int) else size[0])
    return 1


def _divided(grid: Grid, by: int) -> Grid:
    return grid[0] // by, grid[1] // by


def _listed(sizes: Any) -> list[Any]:
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else list(sizes)
