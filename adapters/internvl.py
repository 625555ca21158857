"""InternVL: an image is cut into tiles, one row of `pixel_values` each, a thumbnail last where there are several."""

import copy
import itertools
from collections.abc import Sequence

import torch
from transformers import InternVLForConditionalGeneration, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from pivot_plugin.hooks import hookimpl

from .base import ImageInputs, VisionAdapter
from .grids import ImageFeatures


class InternVLAdapter(VisionAdapter):
    """InternVL2.5, 3 and 3.5 in transformers' own classes; features of the last layer after the tower's norm.

    Its processor does not say which tiles are of which image, so `patch_features` gives one record per tile; with the
    processor of `image_processor`, which does not cut, one per image.
    """

    family = "internvl"
    lmms_eval_name = "internvl_hf"

    @property
    def feature_layer(self) -> int | None:
        layer = super().feature_layer
        # at -1 the model reads last_hidden_state, which has passed the closing norm
        return None if layer == -1 else layer

    def project(self, features: ImageFeatures, tower: PreTrainedModel | None = None) -> ImageFeatures:
        rows, columns = features.grid
        ratio = self.model.config.downsample_ratio
        shuffled = self.model.base_model.pixel_shuffle(features.values.reshape(1, rows, columns, -1), ratio)
        projector = self.model.get_submodule(self.projector_paths[0])
        return ImageFeatures(projector(shuffled).flatten(0, 2), (int(rows * ratio), int(columns * ratio)))

    def whole_views(self, inputs: ImageInputs, image_tokens: Sequence[int]) -> list[int]:
        # the thumbnail is the last tile, and the only one where there is no other
        return [int(end) // self._tile_tokens - 1 for end in itertools.accumulate(image_tokens)]

    def tokens_on_grid(self, tokens: torch.Tensor, inputs: ImageInputs) -> ImageFeatures:
        return super().tokens_on_grid(tokens[-self._tile_tokens :], inputs)

    @property
    def _tile_tokens(self) -> int:
        """Language model tokens of one tile."""
        return int(self.model.config.image_seq_length)

    def image_processor(self, processor: object) -> BaseImageProcessor:
        whole = copy.deepcopy(processor.image_processor)  # type: ignore[attr-defined]
        whole.crop_to_patches = False
        return whole


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    return InternVLAdapter(model) if isinstance(model, InternVLForConditionalGeneration) else None
