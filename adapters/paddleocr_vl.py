"""PaddleOCR-VL: its tower takes the patches of all images as one sequence of small pictures."""

from transformers import PreTrainedModel

from pivot_plugin.hooks import hookimpl

from .base import ImageInputs, TowerArgument, VisionAdapter, is_of_class


class PaddleOCRVLAdapter(VisionAdapter):
    """PaddleOCR-VL, and its tower by itself."""

    family = "paddleocr-vl"

    def tower_arguments(self, tower: PreTrainedModel, inputs: ImageInputs) -> dict[str, TowerArgument]:
        arguments = super().tower_arguments(tower, inputs)
        pixels = arguments["pixel_values"]
        return arguments | {"pixel_values": TowerArgument(pixels.value[None], f"{pixels.code}[None]")}


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    known = is_of_class(model, "PaddleOCRVLForConditionalGeneration", "PaddleOCRVisionModel")
    return PaddleOCRVLAdapter(model) if known else None
