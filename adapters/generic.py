"""Any transformers MLLM that follows `get_encoder(modality="image")`: asked last, so every family adapter wins."""

from transformers import PreTrainedModel

from pivot_plugin.errors import ModelError
from pivot_plugin.hooks import hookimpl

from .base import VisionAdapter
from .unserved import why_unserved


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter:
    if (reason := why_unserved(model)) is not None:
        raise ModelError(
            f"{type(model).__name__} cannot be served: {reason}.",
            "Use a model whose image features stand in its input as image tokens, such as a LLaVA or a Qwen-VL, or a "
            "plugin with an adapter for this family (`pivot adapters` lists what is installed).",
        )
    return VisionAdapter(model)
