"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: any resolution, M-RoPE, and a projector ("merger") that lives in the tower."""

from collections.abc import Sequence

import torch
from pivot_plugin.hooks import hookimpl
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.utils import ModelOutput
from transformers.vision_utils import get_vision_window_index

from .base import ImageFeatures, ImageInputs, VisionAdapter


class QwenVLAdapter(VisionAdapter):
    """Qwen2-VL. Patches come in blocks of merge x merge, one row of `pixel_values` per patch."""

    family = "qwen2-vl"
    lmms_eval_name = "qwen2_vl"
    projector_names = ("merger", "deepstack_merger_list")

    def select_images(self, inputs: ImageInputs, start: int, stop: int) -> dict[str, torch.Tensor]:
        ends = [0, *inputs["image_grid_thw"].prod(dim=1).cumsum(0).tolist()]
        return {
            "pixel_values": inputs["pixel_values"][ends[start] : ends[stop]],
            "image_grid_thw": inputs["image_grid_thw"][start:stop],
        }

    def positions(self, tokens: torch.Tensor, images: ImageInputs) -> torch.Tensor | None:
        is_image = (tokens == self.image_token_id).long()
        positions, _ = self.model.base_model.get_rope_index(
            tokens[None], mm_token_type_ids=is_image[None], image_grid_thw=images.get("image_grid_thw")
        )
        return positions[:, 0]

    def run_tower(self, tower: PreTrainedModel, inputs: ImageInputs) -> ModelOutput:
        return tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])

    def whole_views(self, inputs: ImageInputs, image_tokens: Sequence[int]) -> list[int]:
        return list(range(len(inputs["pixel_values"])))

    def on_grid(self, hidden: torch.Tensor, inputs: ImageInputs, tower: PreTrainedModel) -> list[ImageFeatures]:
        grids, merge = inputs["image_grid_thw"], tower.config.spatial_merge_size
        blocks = self.in_image_order(hidden.reshape(-1, merge * merge, hidden.shape[-1]), grids, tower)
        features = []
        for values, (_, rows, columns) in zip(
            blocks.split((grids.prod(dim=1) // merge**2).tolist()), grids.tolist(), strict=True
        ):
            # from (block row, block column, row in block, column in block) to raster order
            raster = values.reshape(rows // merge, columns // merge, merge, merge, -1).transpose(1, 2)
            features.append(ImageFeatures(raster.reshape(rows * columns, -1), (rows, columns)))
        return features

    def project(self, features: ImageFeatures, tower: PreTrainedModel | None = None) -> ImageFeatures:
        tower = tower or self.tower
        merge = tower.config.spatial_merge_size
        rows, columns = features.grid[0] // merge, features.grid[1] // merge
        blocks = features.values.reshape(rows, merge, columns, merge, -1).transpose(1, 2)
        return ImageFeatures(tower.merger(blocks.reshape(rows * columns * merge * merge, -1)), (rows, columns))

    def tokens_on_grid(self, tokens: torch.Tensor, inputs: ImageInputs) -> ImageFeatures:
        merge = self.tower.config.spatial_merge_size
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        return ImageFeatures(tokens, (rows // merge, columns // merge))

    def in_image_order(self, blocks: torch.Tensor, grids: torch.Tensor, tower: PreTrainedModel) -> torch.Tensor:
        """Blocks of merged patches, (blocks, patches in block, D), in the order of the image."""
        return blocks


class Qwen2_5_VLAdapter(QwenVLAdapter):
    """Qwen2.5-VL, whose tower works, and leaves its last hidden state, in the order of its attention windows."""

    family = "qwen2.5-vl"
    lmms_eval_name = "qwen2_5_vl"

    def in_image_order(self, blocks: torch.Tensor, grids: torch.Tensor, tower: PreTrainedModel) -> torch.Tensor:
        config = tower.config
        order, _ = get_vision_window_index(grids, config.spatial_merge_size, config.window_size, config.patch_size)
        return blocks[torch.argsort(order)]


class Qwen3VLAdapter(QwenVLAdapter):
    """Qwen3-VL; what it hands on from deeper blocks ("deepstack") is not part of its patch features."""

    family = "qwen3-vl"
    lmms_eval_name = "qwen3_vl"


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    if isinstance(model, Qwen2_5_VLForConditionalGeneration | Qwen2_5_VisionTransformerPretrainedModel):
        return Qwen2_5_VLAdapter(model)
    if isinstance(model, Qwen2VLForConditionalGeneration | Qwen2VisionTransformerPretrainedModel):
        return QwenVLAdapter(model)
    if isinstance(model, Qwen3VLForConditionalGeneration | Qwen3VLVisionModel):
        return Qwen3VLAdapter(model)
    return None
