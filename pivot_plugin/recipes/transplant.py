"""An encoder in a new MLLM: frozen, before a fresh language model and a projector that begins with kept layers.

Variants, by how many layers are kept (and frozen) and how many are new (arXiv 2510.16333, table H):

    0      a new projector
    1+1    the first layer of the projector that the encoder was trained with, and one new layer
    2+2    both its layers, and two new ones
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin

from pivot_plugin.encoders.assemble import assemble
from pivot_plugin.encoders.towers import draw
from pivot_plugin.errors import EncoderError
from pivot_plugin.models.loading import load_model

PROJECTOR = "multi_modal_projector"
PROJECTOR_FILE = "projector.safetensors"
KEPT = {"0": 0, "1+1": 1, "2+2": 2}


def transplant(
    encoder: PreTrainedModel | str | Path,
    language_model: PreTrainedModel | str | Path,
    variant: str = "0",
    *,
    feature_layer: int = -2,
    seed: int = 0,
    **options: Any,
) -> tuple[LlavaForConditionalGeneration, ProcessorMixin]:
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
    kept = KEPT[variant]
    if not kept:
        return model, processor
    layers = _tuned_layers(encoder, model)[:kept]
    width = model.config.get_text_config().hidden_size
    old = model.model.multi_modal_projector
    if kept == 1 and layers[0][0].shape == old.linear_1.weight.shape:
        # what plain transformers have is what is written
        _fill(old.linear_1, layers[0])
        return model, processor
    new = [(layers[-1][0].shape[0], width), *[(width, width)] * (kept - 1)]
    sizes = [(weight.shape[1], weight.shape[0]) for weight, _ in layers] + new
    projector = _stack(sizes).to(device=old.linear_1.weight.device, dtype=old.linear_1.weight.dtype)
    linear = [module for module in projector if isinstance(module, nn.Linear)]
    for module, layer in zip(linear, layers, strict=False):
        _fill(module, layer)
    draw(linear[kept:], model, seed)
    model.model.multi_modal_projector = projector
    return model, processor


def kept_layers(model: PreTrainedModel, variant: str) -> list[str]:
    """Paths of the projector's layers that are kept, to be frozen.

    Args:
        model: made by `transplant`.
        variant: it was made with.
    """
    linear = [
        path
        for path, module in model.named_modules()
        if f"{PROJECTOR}." in f"{path}." and isinstance(module, nn.Linear)
    ]
    return linear[: KEPT[variant]]


def load_transplant(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A transplant that was saved, whose projector may have more layers than LLaVA's.

    Args:
        folder: written by `save_pretrained` of model and processor.
    """
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    pattern = re.compile(rf"(?:.*\.)?{PROJECTOR}\.(\d+)\.weight")
    sizes = {int(m[1]): (w.shape[1], w.shape[0]) for name, w in weights.items() if (m := pattern.fullmatch(name))}
    if not sizes:
        return load_model(folder, None)
    # transformers' loader knows LLaVA's own projector alone, and would tell at length what it does not find
    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    finally:
        transformers.logging.set_verbosity(said)
    projector = _stack([sizes[index] for index in sorted(sizes)])
    mark = f"{PROJECTOR}."
    projector.load_state_dict({n.partition(mark)[2]: w for n, w in weights.items() if mark in n}, assign=True)
    model.model.multi_modal_projector = projector
    return model.eval(), AutoProcessor.from_pretrained(folder)


def _tuned_layers(
    encoder: PreTrainedModel | str | Path, model: PreTrainedModel
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weights and biases of the two layers of the projector that an encoder was trained with."""
    file = Path(encoder) / PROJECTOR_FILE if isinstance(encoder, str | Path) else None
    if file is None or not file.is_file():
        raise EncoderError(
            f"There is no {PROJECTOR_FILE} with the encoder, so no layer of a tuned projector can be kept.",
            'Use the projector variant "0", or an encoder folder that a run has written.',
        )
    tensors: Mapping[str, torch.Tensor] = load_file(file)
    layers = []
    for name in ("linear_1", "linear_2"):
        path = next((key for key in tensors if key.endswith(f"{name}.weight")), None)
        if path is None:
            raise EncoderError(f"{file.name} has no layer {name}.", 'Use the projector variant "0".')
        layers.append((tensors[path], tensors.get(path.replace(".weight", ".bias"))))
    takes, gives = layers[0][0].shape[1], model.model.vision_tower.config.hidden_size
    if takes != gives:
        raise EncoderError(
            f"The tuned projector takes {takes} numbers per patch, the encoder gives {gives}.",
            'Use the projector variant "0".',
        )
    return layers


def _stack(sizes: list[tuple[int, int]]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for takes, gives in sizes:
        modules += [nn.Linear(takes, gives), nn.GELU()]
    return nn.Sequential(*modules[:-1])


@torch.no_grad()
def _fill(module: nn.Linear, layer: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    module.weight.copy_(layer[0])
    module.bias.copy_(torch.zeros_like(module.bias) if layer[1] is None else layer[1])
