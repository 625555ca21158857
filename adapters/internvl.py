"""InternVL: an image is cut into tiles, one row of `pixel_values` each, a thumbnail last where there are several."""

import copy

from pivot_plugin.hooks import hookimpl
from transformers import InternVLForConditionalGeneration, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .base import VisionAdapter


class InternVLAdapter(VisionAdapter):
    """InternVL2.5, 3 and 3.5 in transformers' own classes; features of the last layer after the tower's norm.

    Its processor does not say which tiles are of which image, so `patch_features` gives one record per tile; with the
    processor of `image_processor`, which does not cut, one per image.
    """

    family = "internvl"

    @property
    def feature_layer(self) -> int | None:
        layer = super().feature_layer
        # at -1 the model reads last_hidden_state, which has passed the closing norm
        return None if layer == -1 else layer

    def image_processor(self, processor: object) -> BaseImageProcessor:
        whole = copy.deepcopy(processor.image_processor)  # type: ignore[attr-defined]
        whole.crop_to_patches = False
        return whole


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    return InternVLAdapter(model) if isinstance(model, InternVLForConditionalGeneration) else None
