"""VipLLaVA for pivot-plugin: like LLaVA, but the projector reads five layers of the tower side by side.

Install it beside pivot-plugin (`pip install ./examples/own_adapter`) and `pivot adapters` lists it; nothing else to do.
"""

from transformers import PreTrainedModel, VipLlavaForConditionalGeneration

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.hooks import hookimpl


class VipLlavaAdapter(VisionAdapter):
    family = "vipllava"

    @property
    def feature_layer(self) -> int:
        # the deepest of them: blocks behind it get no LoRA, and it is what probes read of the encoder by itself
        depth = len(self.blocks())
        layers = self.model.config.vision_feature_layers
        return max(layer if layer >= 0 else depth + 1 + layer for layer in layers)


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    return VipLlavaAdapter(model) if isinstance(model, VipLlavaForConditionalGeneration) else None
