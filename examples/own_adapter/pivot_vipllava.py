"""VipLLaVA for pivot-plugin: like LLaVA, but the projector reads five layers of the tower side by side.

Install it beside pivot-plugin (`pip install ./examples/own_adapter`) and `pivot adapters` lists it; nothing else to do.
"""

import torch
from transformers import PreTrainedModel, VipLlavaForConditionalGeneration
from transformers.utils import ModelOutput

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.hooks import hookimpl


class VipLlavaAdapter(VisionAdapter):
    family = "vipllava"

    @property
    def feature_layer(self) -> int:
        # blocks behind the deepest layer in use get no LoRA: nothing there reaches the features
        depth = len(self.blocks())
        layers = self.model.config.vision_feature_layers
        return max(layer if layer >= 0 else depth + 1 + layer for layer in layers)

    def hidden_state(self, output: ModelOutput) -> torch.Tensor:
        layers = self.model.config.vision_feature_layers
        return torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    return VipLlavaAdapter(model) if isinstance(model, VipLlavaForConditionalGeneration) else None
