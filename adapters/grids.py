"""Where the tokens of a vision tower lie in its pictures: what the shapes of its inputs say of any tower.

Six ways in which towers of transformers take pictures, tried in this order:

    sizes given in patches       image_grid_thw, spatial_shapes: one row per patch, or rows padded to the longest
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
class OnGrid:
    """Tokens of one picture in raster order.

    Attributes:
        values: (R * C, D).
        grid: R and C.
    """

    values: torch.Tensor
    grid: Grid


def on_grids(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[OnGrid] | None:
    """Tokens of a tower, picture by picture, where they lie.

    Args:
        hidden: (I, T, D), (T, D) or maps, as the tower answered.
        inputs: processor outputs about the pictures.
        config: of the tower.

    Returns:
        I records, or None where nothing tells how the tokens lie.
    """
    ways = (_by_grids, _by_shapes, _by_positions, _by_sizes, _by_mask, _by_maps, _by_patch_size, _by_square)
    return next((found for way in ways if (found := way(hidden, inputs, config)) is not None), None)


def _by_grids(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[OnGrid] | None:
    grids = next((value for name, value in inputs.items() if name.endswith("grid_thw")), None)
    if grids is None or hidden.ndim > 3:
        return None
    rows = hidden.flatten(0, -2)
    merge = _merge(inputs, config)
    # processors that lay a patch's pixels out in one row go block by block, those that keep its shape row by row
    pixels = next((value for name, value in inputs.items() if name.startswith("pixel_values")), None)
    in_blocks = isinstance(pixels, torch.Tensor) and pixels.ndim == 2
    if in_blocks and getattr(config, "window_size", None) and hasattr(config, "fullatt_block_indexes"):
        rows = _out_of_windows(rows, grids, config, merge)
    grids = [(int(down), int(across)) for _, down, across in grids.tolist()]
    for size, blocks in ((1, in_blocks), (merge, False)):
        sizes = [down // size * (across // size) for down, across in grids]
        if sum(sizes) == len(rows):
            parts = rows.split(sizes)
            return [
                OnGrid(_from_blocks(part, grid, merge) if blocks and merge > 1 else part, _divided(grid, size))
                for part, grid in zip(parts, grids, strict=True)
            ]
    return None


def _out_of_windows(rows: torch.Tensor, grids: torch.Tensor, config: Any, merge: int) -> torch.Tensor:
    """From the order of a tower's attention windows, in which it works and leaves its last hidden state."""
    order, _ = get_vision_window_index(grids, merge, config.window_size, _patch(config)[0])  # type: ignore[index]
    blocks = rows.reshape(len(order), -1, rows.shape[-1])
    return blocks[torch.argsort(order)].flatten(0, 1)


def _from_blocks(values: torch.Tensor, grid: Grid, merge: int) -> torch.Tensor:
    """From (block row, block column, row in block, column in block), as processors that merge patches cut them."""
    rows, columns = grid
    blocks = values.reshape(rows // merge, columns // merge, merge, merge, -1)
    return blocks.transpose(1, 2).reshape(rows * columns, -1)


def _by_shapes(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[OnGrid] | None:
    shapes = inputs.get("spatial_shapes")
    if shapes is None or hidden.ndim != 3 or len(shapes) != len(hidden):
        return None
    grids = [(int(down), int(across)) for down, across in shapes.tolist()]
    return [OnGrid(row[: down * across], (down, across)) for row, (down, across) in zip(hidden, grids, strict=True)]


def _by_positions(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[OnGrid] | None:
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
    return [OnGrid(part, grid) for part, grid in zip(parts, grids, strict=True)]


def _by_sizes(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[OnGrid] | None:
    sizes, patch = inputs.get("image_sizes"), _patch(config)
    if sizes is None or not patch or hidden.ndim > 3:
        return None
    grids = [(int(height) // patch[0], int(width) // patch[1]) for height, width in _listed(sizes)]
    rows = hidden.flatten(0, -2)
    if sum(down * across for down, across in grids) != len(rows):
        return None
    parts = rows.split([down * across for down, across in grids])
    return [OnGrid(part, grid) for part, grid in zip(parts, grids, strict=True)]


def _by_mask(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[OnGrid] | None:
    mask, patch = inputs.get("pixel_attention_mask", inputs.get("pixel_mask")), _patch(config)
    if mask is None or not patch or hidden.ndim != 3:
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
        found.append(OnGrid(kept.reshape(rows * columns, -1), (rows, columns)))
    return found


def _by_maps(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[OnGrid] | None:
    if hidden.ndim != 4:
        return None
    expected = _expected(inputs, config)
    # (I, D, R, C) as most convolutional nets, or (I, R, C, D)
    if expected is not None and tuple(hidden.shape[1:3]) == expected != tuple(hidden.shape[2:]):
        return [OnGrid(values.flatten(0, 1), expected) for values in hidden]
    if expected is not None and tuple(hidden.shape[1:3]) == expected and hidden.shape[3] == _width(config):
        return [OnGrid(values.flatten(0, 1), expected) for values in hidden]
    return [OnGrid(values.flatten(1).T, (int(values.shape[1]), int(values.shape[2]))) for values in hidden]


def _by_patch_size(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[OnGrid] | None:
    expected = _expected(inputs, config)
    if expected is None or hidden.ndim != 3:
        return None
    count, tokens = expected[0] * expected[1], hidden.shape[1]
    # class and register tokens come before the patches
    if not count or not 0 <= tokens - count <= 16:
        return None
    return [OnGrid(values[tokens - count :], expected) for values in hidden]


def _by_square(hidden: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[OnGrid] | None:
    """Without patch size a square number of tokens, or one more, is a square picture."""
    if hidden.ndim != 3:
        return None
    for extra in (0, 1):
        side = math.isqrt(hidden.shape[1] - extra)
        if side > 1 and side * side == hidden.shape[1] - extra:
            return [OnGrid(values[extra:], (side, side)) for values in hidden]
    return None


def _expected(inputs: Mapping[str, Any], config: Any) -> Grid | None:
    """Rows and columns of patches in pictures that all have one size."""
    patch = _patch(config)
    pixels = next((value for name, value in inputs.items() if name.startswith("pixel_values")), None)
    if not patch or not isinstance(pixels, torch.Tensor) or pixels.ndim < 4:
        return None
    return int(pixels.shape[-2]) // patch[0], int(pixels.shape[-1]) // patch[1]


def _patch(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "patch_size", None)
    if size is None:
        return None
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _merge(inputs: Mapping[str, Any], config: Any) -> int:
    """Patches along one side of a block that becomes one token."""
    sizes = next((value for name, value in inputs.items() if name.endswith("merge_sizes")), None)
    if sizes is not None and len(sizes) and bool((sizes == sizes[0]).all()):
        return int(sizes[0])
    for name in ("spatial_merge_size", "merge_size", "merge_kernel_size"):
        size = getattr(config, name, None)
        if size:
            return int(size if isinstance(size, int) else size[0])
    return 1


def _width(config: Any) -> int | None:
    return getattr(config, "hidden_size", None) or getattr(config, "output_channels", None)


def _divided(grid: Grid, by: int) -> Grid:
    return grid[0] // by, grid[1] // by


def _listed(sizes: Any) -> list[Any]:
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else list(sizes)
