"""Granite 4 Vision: a LLaVA-NeXT whose language model is given several layers of the tower at layers of its own."""

from transformers import PreTrainedModel

from pivot_plugin.hooks import hookimpl

from .base import VisionAdapter, is_of_class


class Granite4VisionAdapter(VisionAdapter):
    """Granite 4 Vision; its patch features are those of the deepest layer that is read."""

    family = "granite4-vision"
    projector_names = ("layerwise_projectors", "spatial_projectors")

    @property
    def feature_layer(self) -> int | None:
        config, depth = self.model.config, len(self.blocks())
        layers = [layer for layer, _ in config.deepstack_layer_map]
        # offsets of one layer, if they are taken at all
        layers += [config.spatial_vision_layer] if config.spatial_target_layers else []
        return max(int(layer) if layer >= 0 else depth + 1 + int(layer) for layer in layers)


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    return Granite4VisionAdapter(model) if is_of_class(model, "Granite4VisionForConditionalGeneration") else None
