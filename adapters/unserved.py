"""Why some models cannot be served, by what they are and not by their names.

Training and saliency need three things of a model: a vision tower that gradients reach, image features that stand in
the language model's input as tokens, and a language model that reads from left to right.
"""

import inspect
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

# of a forward pass, what tells which text looks at which image, and where in the prompt an image stands
ACROSS = ("cross_attention_mask", "image_attention_mask")
ALONG = "image_embeds_position_mask"
REMEDY = "Pass an MLLM that reads its images as tokens of a text, such as a LLaVA or a Qwen-VL."


def why_unserved(model: PreTrainedModel) -> str | None:
    """Why a model cannot be served, as a clause that goes on from its name; None for one with nothing in the way.

    Args:
        model: an MLLM.
    """
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" not in accepted:
        # an encoder by itself
        return None
    config = model.config
    if config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False):
        return "is an encoder-decoder model, whose prompts and answers stand in two sequences"
    if hasattr(config, "num_query_tokens"):
        return "passes its images through a query transformer, whose answers stand before the text"
    quantiser = next((path for path, module in model.named_modules() if is_quantiser(module)), None)
    if quantiser is not None and model.get_encoder(modality="image") in (model, model.get_submodule(quantiser)):
        return f"turns its images into discrete tokens ({quantiser}), which no gradient passes"
    across = next((name for name in ACROSS if name in accepted), None) or next(_cross_attention(model), None)
    if across is not None:
        return f"reads its images by cross-attention ({across}), not as tokens of the text"
    if ALONG in accepted:
        return f"is told by a mask along the prompt ({ALONG}) where its image stands, not by image tokens"
    return _without_a_part(model)


def _without_a_part(model: PreTrainedModel) -> str | None:
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        return None
    towers = [path for path, module in model.named_modules() if path and _reads_pictures(module)]
    if not towers:
        return "has no vision tower: patches of pixels go into the language model as they are"
    names = ("image_token_id", "image_token_index")
    if not any(isinstance(getattr(model.config, name, None), int) for name in names):
        return f"has no image token: what {towers[0]} makes of an image is put before the text, without one"
    if model.base_model is model:
        return "has no base model below its head (base_model is the model itself), which training asks hidden states"
    return None


def _reads_pictures(module: nn.Module) -> bool:
    accepted = inspect.signature(module.forward).parameters
    # a tower whose forward somebody wrapped still says by its class what it reads
    named = getattr(module, "main_input_name", "") == "pixel_values"
    takes_pixels = named or "pixel_values" in accepted or "grid_thw" in accepted
    return isinstance(module, PreTrainedModel) and takes_pixels and "input_ids" not in accepted


def is_quantiser(module: nn.Module) -> bool:
    """Whether a module turns pictures into discrete tokens.

    Args:
        module: of a model.
    """
    kind = type(module).__name__.lower()
    return any(name in kind for name in ("vqvae", "vqmodel", "vectorquantizer"))


def _cross_attention(model: PreTrainedModel) -> Iterator[str]:
    """Paths of modules of the language model by which it looks at something else than its input."""
    for path, module in model.get_decoder().named_modules():
        kind, name = type(module).__name__.lower(), path.rpartition(".")[2].replace("_", "")
        if ("crossattention" in kind and "text" in kind) or name in ("crossattention", "crossattn"):
            yield path
