"""Why some models cannot be served, by what they are and not by their names.

Training and saliency need three things of a model: a vision tower that gradients reach, image features that stand in
the language model's input as tokens, and a language model that reads from left to right.
"""

import inspect
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

# what tells a model's forward pass which text looks at which image
ACROSS = ("cross_attention_mask", "image_attention_mask")
ALONG = "image_embeds_position_mask"


def why_unserved(model: PreTrainedModel) -> str | None:
    """Why a model cannot be served, in a clause; None for one about which nothing is wrong.

    Args:
        model: an MLLM.
    """
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" not in accepted:
        # an encoder by itself
        return None
    towers = [path for path, module in model.named_modules() if path and _takes_pictures(module)]
    quantiser = next((path for path, module in model.named_modules() if _is_quantiser(module)), None)
    if quantiser is not None and not _names_tower(model):
        return (
            f"it makes discrete image tokens of a picture ({quantiser}), through which no gradient passes: there is no "
            "vision tower to train"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder: its images are read with the question, and not in the sequence it writes"
    if name := next((name for name in ACROSS if name in accepted), None):
        return f"its text looks at images by cross-attention ({name}), and not at image tokens in its input"
    if (path := next(_cross_attention(model), None)) is not None:
        return f"its text looks at images by cross-attention ({path}), and not at image tokens in its input"
    if ALONG in accepted:
        return f"it is told by a mask along the whole prompt ({ALONG}) where its image stands, and not by image tokens"
    if "pixel_values" in accepted and not towers:
        return "it has no vision tower: patches of pixels go into the language model as they are"
    if "pixel_values" in accepted and not _names_image_token(model):
        return (
            f"it has no image token: what {towers[0]} makes of an image is put before the text, where no token stands "
            "for it"
        )
    if model.base_model is model and "pixel_values" in accepted:
        return (
            "there is no base model below its head (base_model is the model itself), of which the training could ask "
            "hidden states"
        )
    return None


def _takes_pictures(module: nn.Module) -> bool:
    if not isinstance(module, PreTrainedModel) or _is_quantiser(module):
        return False
    accepted = inspect.signature(module.forward).parameters
    return ("pixel_values" in accepted or "hidden_states" in accepted) and "input_ids" not in accepted


def _is_quantiser(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and "VQ" in type(module).__name__


def _names_tower(model: PreTrainedModel) -> bool:
    """Whether a model says by itself which of its modules reads images."""
    return model.get_encoder(modality="image") is not model


def _names_image_token(model: PreTrainedModel) -> bool:
    names = ("image_token_id", "image_token_index")
    return any(isinstance(getattr(model.config, name, None), int) for name in names)


def _cross_attention(model: PreTrainedModel) -> Iterator[str]:
    """Paths of modules of the language model by which it looks at something else than its input."""
    decoder = model.get_decoder()
    # of a model that names no decoder, all that looks across; a query transformer before a decoder is none of it
    for path, _ in decoder.named_modules():
        name = path.rpartition(".")[2]
        if "cross" in name and "attn" in name.replace("attention", "attn"):
            yield path
