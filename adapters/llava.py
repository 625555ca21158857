"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: a CLIP or SigLIP tower, one of its hidden states, an MLP projector."""

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

from .base import ImageFeatures, ImageInputs, VisionAdapter


class LlavaAdapter(VisionAdapter):
    """LLaVA-1.5: one square image, features of layer -2, so the last block and the closing norm are never used."""

    family = "llava"


class TiledLlavaAdapter(VisionAdapter):
    """LLaVA-NeXT and LLaVA-OneVision: an image is its small version followed by tiles of the large one."""

    family = "llava-next"

    def patch_features(self, inputs: ImageInputs, tower: PreTrainedModel | None = None) -> list[ImageFeatures]:
        pixels = inputs["pixel_values"]
        whole = pixels[:, 0] if pixels.ndim == 5 else pixels
        return super().patch_features({"pixel_values": whole}, tower)

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
