"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: a CLIP or SigLIP tower, one of its hidden states, an MLP projector."""

import itertools
from collections.abc import Sequence

import torch
from pivot_plugin.hooks import hookimpl
from transformers import (
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    SiglipImageProcessor,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils import ModelOutput

from .base import ImageFeatures, ImageInputs, VisionAdapter


class LlavaAdapter(VisionAdapter):
    """LLaVA-1.5: one square image, features of layer -2, so the last block and the closing norm are never used."""

    family = "llava"
    lmms_eval_name = "llava_hf"


class TiledLlavaAdapter(VisionAdapter):
    """LLaVA-NeXT and LLaVA-OneVision: an image is its small version followed by tiles of the large one."""

    family = "llava-next"
    lmms_eval_name = "llava_hf"

    def run_tower(self, tower: PreTrainedModel, inputs: ImageInputs) -> ModelOutput:
        pixels = inputs["pixel_values"]
        return super().run_tower(tower, {"pixel_values": pixels[:, 0] if pixels.ndim == 5 else pixels})

    def whole_views(self, inputs: ImageInputs, image_tokens: Sequence[int]) -> list[int]:
        # the small version comes first, then the tiles that the model finds by the image's size
        pinpoints, side = self.model.config.image_grid_pinpoints, self.tower.config.image_size
        tiles = [image_size_to_num_patches(size, pinpoints, side) for size in inputs["image_sizes"].tolist()]
        return [0, *itertools.accumulate(tiles[:-1])]

    def shown_box(self, processor: object, size: tuple[int, int]) -> tuple[float, float, float, float]:
        return 0.0, 0.0, 1.0, 1.0

    def tokens_on_grid(self, tokens: torch.Tensor, inputs: ImageInputs) -> ImageFeatures:
        side = self.tower.config.image_size // self.tower.config.patch_size
        return ImageFeatures(tokens[: side * side], (side, side))

    def image_processor(self, processor: object) -> BaseImageProcessor:
        # the tiling processor gives 5-D pixels, which the stand-alone tower refuses
        tiling = processor.image_processor  # type: ignore[attr-defined]
        height = width = int(self.tower.config.image_size)
        size = {"height": height, "width": width}
        settings = {"image_mean": tiling.image_mean, "image_std": tiling.image_std, "resample": tiling.resample}
        if "clip" in self.tower.config.model_type:
            return CLIPImageProcessor(size=size, do_center_crop=False, **settings)
        return SiglipImageProcessor(size=size, **settings)


class LlavaOnevisionAdapter(TiledLlavaAdapter):
    """LLaVA-OneVision: tiles for a single image, one view each where a prompt has several."""

    family = "llava-onevision"

    def whole_views(self, inputs: ImageInputs, image_tokens: Sequence[int]) -> list[int]:
        counts = inputs.get("batch_num_images")
        if counts is not None and len(image_tokens) > 1 and counts.tolist() == [len(image_tokens)]:
            return list(range(len(image_tokens)))
        return super().whole_views(inputs, image_tokens)

    def select_images(self, inputs: ImageInputs, start: int, stop: int) -> dict[str, torch.Tensor]:
        per_image = {name: value for name, value in inputs.items() if name != "batch_num_images"}
        return super().select_images(per_image, start, stop)


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    if isinstance(model, LlavaForConditionalGeneration):
        return LlavaAdapter(model)
    if isinstance(model, LlavaNextForConditionalGeneration):
        return TiledLlavaAdapter(model)
    if isinstance(model, LlavaOnevisionForConditionalGeneration):
        return LlavaOnevisionAdapter(model)
    return None
