"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: a CLIP or SigLIP tower, one of its hidden states, an MLP projector."""

import itertools
from collections.abc import Sequence

import torch
from PIL import Image
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

from pivot_plugin.errors import EncoderError
from pivot_plugin.hooks import hookimpl

from .base import ImageFeatures, ImageInputs, VisionAdapter


class LlavaAdapter(VisionAdapter):
    """LLaVA-1.5: one square image, features of layer -2, so the last block and the closing norm are never used."""

    family = "llava"
    lmms_eval_name = "llava_hf"

    @property
    def projector_first_layer(self) -> str | None:
        return f"{self.projector_paths[0]}.linear_1"

    def replace_tower(self, encoder: PreTrainedModel, image_processor: object, processor: object, layer: int) -> None:
        patches, others = _tokens(encoder, image_processor, layer)
        self._check_replacement(encoder, processor)
        config, backbone = self.model.config, self.model.base_model
        strategy = "default" if others else "full"
        place, precision = self.model.device, self.model.dtype
        config.vision_config = encoder.config
        config.vision_feature_layer = layer
        config.vision_feature_select_strategy = strategy
        config.image_seq_length = patches + others - bool(others)
        backbone.vision_tower = encoder.to(device=place, dtype=precision)
        kind = type(backbone.multi_modal_projector)
        backbone.multi_modal_projector = kind(config).to(device=place, dtype=precision)
        self._teach(processor, image_processor, patches, others, strategy)
        self.__dict__.pop("projector_paths", None)

    def _check_replacement(self, encoder: PreTrainedModel, processor: object) -> None:
        """Refuse an encoder that the family cannot take."""

    def _teach(self, processor: object, image_processor: object, patches: int, others: int, strategy: str) -> None:
        """Have the model's processor prepare images for another encoder, and count its tokens."""
        config = self.model.config.vision_config
        processor.image_processor = image_processor  # type: ignore[attr-defined]
        processor.patch_size = _edge(config.patch_size)  # type: ignore[attr-defined]
        processor.num_additional_image_tokens = others  # type: ignore[attr-defined]
        processor.vision_feature_select_strategy = strategy  # type: ignore[attr-defined]


class TiledLlavaAdapter(LlavaAdapter):
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

    def _check_replacement(self, encoder: PreTrainedModel, processor: object) -> None:
        ours, theirs = _edge(self.tower.config.image_size), _edge(encoder.config.image_size)
        if ours != theirs:
            raise EncoderError(
                f"The encoder takes images of {theirs} px, the tiles of this {type(self.model).__name__} have {ours}.",
                "Use an encoder of the same image size, or a LlavaForConditionalGeneration, which cuts no tiles.",
            )

    def _teach(self, processor: object, image_processor: object, patches: int, others: int, strategy: str) -> None:
        # it goes on cutting tiles, and colours them as the encoder knows them
        tiling = processor.image_processor  # type: ignore[attr-defined]
        for name in ("image_mean", "image_std", "resample", "rescale_factor"):
            if hasattr(image_processor, name):
                setattr(tiling, name, getattr(image_processor, name))
        super()._teach(processor, tiling, patches, others, strategy)

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

    def _teach(self, processor: object, image_processor: object, patches: int, others: int, strategy: str) -> None:
        super()._teach(processor, image_processor, patches, others, strategy)
        processor.num_image_tokens = patches  # type: ignore[attr-defined]

    def select_images(self, inputs: ImageInputs, start: int, stop: int) -> dict[str, torch.Tensor]:
        per_image = {name: value for name, value in inputs.items() if name != "batch_num_images"}
        return super().select_images(per_image, start, stop)


def _edge(size: int | Sequence[int]) -> int:
    """Pixels of a square's edge, which some configurations give twice."""
    return int(size if isinstance(size, int) else size[0])


@torch.no_grad()
def _tokens(encoder: PreTrainedModel, image_processor: object, layer: int) -> tuple[int, int]:
    """Patches that an encoder makes of an image, and tokens beside them (class, registers).

    Raises:
        EncoderError: if it does not work like a vision transformer that LLaVA can read.
    """
    try:
        inputs = image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")  # type: ignore[operator]
        pixels = inputs["pixel_values"].to(device=encoder.device, dtype=encoder.dtype)
        tokens = encoder.eval()(pixels, output_hidden_states=True).hidden_states[layer].shape[1]
        patch = _edge(encoder.config.patch_size)
        patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise EncoderError(
            f"{type(encoder).__name__} cannot be read as LLaVA reads a tower, hidden state {layer} of square images in "
            f"one piece: {type(error).__name__}: {error}.",
            "Use a vision transformer of the CLIP, SigLIP, DINO or ViT kind with its own image processor.",
        ) from error
    if not 0 <= tokens - patches <= 16:
        raise EncoderError(
            f"{type(encoder).__name__} makes {tokens} tokens of {patches} patches.", "Use an encoder with patch tokens."
        )
    return patches, tokens - patches


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    if isinstance(model, LlavaForConditionalGeneration):
        return LlavaAdapter(model)
    if isinstance(model, LlavaNextForConditionalGeneration):
        return TiledLlavaAdapter(model)
    if isinstance(model, LlavaOnevisionForConditionalGeneration):
        return LlavaOnevisionAdapter(model)
    return None
