"""An encoder in a new MLLM: frozen, before a fresh language model and a projector that begins with kept layers.

Variants, by how many layers are kept (and frozen) and how many are new (arXiv 2510.16333, table H):

    0      a new projector
    1+1    the first layer of the projector that the encoder was trained with, and one new layer
    2+2    both its layers, and two new ones

How a projector gets more layers than transformers gives it, the adapter of the family knows.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.encoders.assemble import assemble
from pivot_plugin.encoders.record import PROJECTOR_FILE
from pivot_plugin.encoders.towers import DEFAULT_FEATURE_LAYER, draw
from pivot_plugin.errors import EncoderError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import empty_model, load_model

KEPT = {"0": 0, "1+1": 1, "2+2": 2}


def transplant(
    encoder: PreTrainedModel | str | Path,
    language_model: PreTrainedModel | str | Path,
    variant: str = "0",
    *,
    feature_layer: int = DEFAULT_FEATURE_LAYER,
    seed: int = 0,
    **options: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Put an encoder into a new MLLM.

    Args:
        encoder: loaded, or its folder; for kept layers a folder with `projector.safetensors`.
        language_model: as for `assemble`.
        variant: "0", "1+1" or "2+2".
        feature_layer, seed: as for `assemble`.
        **options: `tokenizer`, `image_processor`, `chat_template` as for `assemble`.

    Returns:
        the MLLM and its processor; `kept_layers` names what to freeze.

    Raises:
        EncoderError: if there are no layers to keep, or they do not fit the encoder.
    """
    model, processor = assemble(encoder, language_model, feature_layer=feature_layer, seed=seed, **options)
    if count := KEPT[variant]:
        tuned = _tuned_projector(encoder)
        draw(find_adapter(model).begin_projector(tuned, count), model, seed)
    return model, processor


def kept_layers(model: PreTrainedModel, variant: str) -> list[str]:
    """Paths of the projector's layers that are kept, to be frozen.

    Args:
        model: made by `transplant`.
        variant: it was made with.
    """
    return find_adapter(model).projector_layers()[: KEPT[variant]]


def load_transplant(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A transplant that was saved, whose projector may have more layers than its family's own.

    Args:
        folder: written by `save_pretrained` of model and processor.

    Raises:
        ModelError: if there is none.
    """
    return load_model(find_adapter(empty_model(str(folder))).load(folder), None)


def _tuned_projector(encoder: PreTrainedModel | str | Path) -> dict[str, torch.Tensor]:
    """Weights of the projector that an encoder was trained with."""
    file = Path(encoder) / PROJECTOR_FILE if isinstance(encoder, str | Path) else None
    if file is None or not file.is_file():
        raise EncoderError(
            f"There is no {PROJECTOR_FILE} with the encoder, so no layer of a tuned projector can be kept.",
            'Use the projector variant "0", or an encoder folder that a run has written.',
        )
    tensors: dict[str, torch.Tensor] = load_file(file)
    return tensors
