"""LLaVA-NeXT: what LLaVA, LLaVA-NeXT and the PIVOT authors' code take as --vision_tower."""

import re

from transformers import PreTrainedModel

from .form import CLIP_BLOCK, Form, edge, refuse_unless, used_blocks
from .transformers_4 import outer_names, transformers_4_config

# LLaVA-NeXT's SigLipVisionTower takes these for granted, whatever the folder says
_LLAVA_NEXT_SIGLIP = {"hidden_size": 1152, "image_size": 384, "patch_size": 14}


def for_llava_next(encoder: PreTrainedModel, image_processor: object) -> Form:
    """A CLIP or SigLIP as LLaVA-NeXT's tower classes load it."""
    config, kind = encoder.config, encoder.config.model_type
    problems = []
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        problems.append(f"its towers are CLIP and SigLIP, this is of type {kind}")
    elif kind == "siglip_vision_model":
        problems += [
            f"its SigLIP class has {name} {expected} built in, this has {edge(getattr(config, name))}"
            for name, expected in _LLAVA_NEXT_SIGLIP.items()
            if edge(getattr(config, name)) != expected
        ]
    refuse_unless(
        "LLaVA-NeXT", encoder, problems, "Use `pivot graft` into a LLaVA of transformers, which takes any encoder."
    )
    if kind == "clip_vision_model":
        depth = config.num_hidden_layers
        layer = used_blocks(encoder, depth) - depth - 1
        settings = {"vision_tower": "<folder>", "mm_vision_select_layer": layer, "mm_vision_select_feature": "patch"}
        return Form(dict(outer_names(encoder.state_dict())), transformers_4_config(encoder), settings)
    return _llava_next_siglip(encoder)


def _llava_next_siglip(encoder: PreTrainedModel) -> Form:
    """A SigLIP whose last block the other side deletes, so that what it keeps ends where the features in use end."""
    depth, used = encoder.config.num_hidden_layers, used_blocks(encoder, encoder.config.num_hidden_layers)
    tensors = {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if not (found := re.match(CLIP_BLOCK, name)) or int(found[1]) <= used
    }
    if used == depth:
        last = f"encoder.layers.{depth - 1}."
        tensors |= {
            name.replace(last, f"encoder.layers.{depth}."): tensor
            for name, tensor in encoder.state_dict().items()
            if name.startswith(last)
        }
        note = f"One block more than the encoder's {depth} is written, a copy of the last, which LLaVA-NeXT deletes."
    else:
        note = f"LLaVA-NeXT deletes block {used + 1} of those written, the first behind the features in use."
    config = transformers_4_config(encoder) | {"num_hidden_layers": used + 1}
    return Form(
        dict(outer_names(tensors)),
        config,
        {"vision_tower": "<Hub id with siglip in it>"},
        (
            note,
            "Its builder takes a local folder for a CLIP: put this one on the Hub under a name with 'siglip' in it.",
            "What it reads is the hidden state behind the last block it keeps, before the closing norm.",
        ),
    )
