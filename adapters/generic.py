"""Any transformers MLLM that follows `get_encoder(modality="image")`: asked last, so every family adapter wins."""

from transformers import PreTrainedModel

from pivot_plugin.hooks import hookimpl

from .base import VisionAdapter


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter:
    return VisionAdapter(model)
