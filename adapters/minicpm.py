"""MiniCPM-OCR: a tower with a merger halfway up, which a setting of the model leaves out."""

import torch
from transformers import PreTrainedModel

from pivot_plugin.hooks import hookimpl

from .base import ImageInputs, TowerArgument, VisionAdapter, is_of_class

MERGER = "vit_merger"
# of the model, and by which a loaded encoder is read as the model reads it
SETTING, LEFT_OUT = "downsample_mode", "4x"


class MiniCPMOcrAdapter(VisionAdapter):
    """MiniCPM-OCR, and its tower by itself, which merges unless it is told not to."""

    family = "minicpm-ocr"

    @property
    def _merges(self) -> bool:
        return getattr(self.model.config, SETTING, None) != LEFT_OUT

    def unread_paths(self) -> tuple[str, ...]:
        unread = super().unread_paths()
        return unread if self._merges else (*unread, f"{self.tower_path}.{MERGER}")

    def tower_arguments(self, tower: PreTrainedModel, inputs: ImageInputs) -> dict[str, TowerArgument]:
        arguments = super().tower_arguments(tower, inputs)
        if self._merges:
            return arguments
        return arguments | {"use_vit_merger": TowerArgument(torch.tensor(False), "False")}

    def extract(self) -> PreTrainedModel:
        encoder = super().extract()
        setattr(encoder.config, SETTING, getattr(self.model.config, SETTING, None))
        return encoder


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    known = is_of_class(model, "MiniCPMOcrForConditionalGeneration", "MiniCPMOcrVisionModel")
    return MiniCPMOcrAdapter(model) if known else None
