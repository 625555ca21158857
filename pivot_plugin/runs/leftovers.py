"""What a run that has ended left of its model, where it kept no checkpoint of its last step (save_strategy="no")."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.encoders import load_encoder
from pivot_plugin.encoders.record import PROJECTOR_FILE
from pivot_plugin.models.loading import load_model

ENCODER_FOLDER, MODEL_FOLDER = "encoder", "model"


def whole_model(folder: Path, record: Mapping[str, Any]) -> Path | None:
    """The folder that holds all that a run has trained, None where there is none.

    Args:
        folder: of the run.
        record: of the run, which has finished.
    """
    model, encoder = folder / MODEL_FOLDER, folder / ENCODER_FOLDER
    if (model / "config.json").is_file():
        return model
    # the folder of an encoder has the projector, and nothing of the language model
    others = {part for part, (trained, _) in record.get("trained", {}).items() if trained} - {"encoder", "projector"}
    return encoder if (encoder / "config.json").is_file() and not others else None


def trained_in(record: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """How many parameters of each part a run has trained, and of how many, as its record has it."""
    return {part: (trained, total) for part, (trained, total) in record["trained"].items()}


@torch.no_grad()
def put_back(folder: Path, adapter: VisionAdapter) -> None:
    """Give a model the weights that a run left.

    Args:
        folder: as `whole_model` found it.
        adapter: of the model that the run was given.

    Raises:
        EncoderError: if the encoder has changed since, or is not this model's.
    """
    if folder.name == MODEL_FOLDER:
        trained, _ = load_model(str(folder), None)
        adapter.model.load_state_dict(trained.state_dict())
        return
    adapter.graft(load_encoder(folder))
    parameters = dict(adapter.model.named_parameters())
    for name, tensor in load_file(folder / PROJECTOR_FILE).items():
        parameters[name].copy_(tensor)
