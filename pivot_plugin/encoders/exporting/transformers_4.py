"""transformers 4: a folder that AutoModel of its releases reads."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from ..compatibility import checked_releases
from .form import Form, Settings, Tensors, refuse_unless


def outer_names(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Tensors under the names that releases before 5.1 gave them."""
    return {f"vision_model.{name}": tensor for name, tensor in tensors.items()}


def transformers_4_config(encoder: PreTrainedModel) -> Settings:
    """An encoder's configuration without what only this release knows."""
    settings: Settings = encoder.config.to_dict()
    dtype = str(encoder.dtype).removeprefix("torch.")
    for name in ("_name_or_path", "dtype", "transformers_version"):
        settings.pop(name, None)
    return settings | {"architectures": [type(encoder).__name__], "torch_dtype": dtype}


def for_transformers_4(encoder: PreTrainedModel, image_processor: object) -> Form:
    """An encoder under the names and settings that transformers 4 reads."""
    kind = encoder.config.model_type
    releases = [release for release in checked_releases(kind) if release.startswith("4.")]
    problems = [] if releases else [f"no release of transformers 4 was found to read a {kind} exactly"]
    refuse_unless("transformers 4", encoder, problems, "Read it with transformers 5: AutoModel.from_pretrained.")
    return Form(
        # their names are rewritten once the folder is there
        dict(encoder.state_dict()),
        transformers_4_config(encoder),
        {"model": f"{type(encoder).__name__}.from_pretrained('<folder>')"},
        (f"Features were compared in transformers {', '.join(releases)}.",),
    )
