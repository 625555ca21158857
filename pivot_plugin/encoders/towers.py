"""A vision tower out of one MLLM and into another."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.adapters.base import FEATURE_LAYER
from pivot_plugin.choices import Projector
from pivot_plugin.errors import EncoderError, SettingsError, foreign_code
from pivot_plugin.hooks import collect
from pivot_plugin.models.find import find_adapter

from .loading import image_processor_in
from .record import PROJECTOR_FILE, origin_of

# LLaVA's, and the paper's (arXiv 2510.16333, appendix E.1)
DEFAULT_FEATURE_LAYER = -2


def extract_encoder(
    model: PreTrainedModel | PeftModel | nn.Module | str | Path, *, processor: object | None = None
) -> PreTrainedModel:
    """Copy the vision tower of an MLLM as a stand-alone transformers model.

    All its layers are kept, also those behind the one the MLLM reads. An adapter (LoRA) on it is merged in the copy.

    Args:
        model: the MLLM, not changed; loaded, also as a PEFT model or an object of another repository that a plugin
            knows; or its folder or Hub id, or that of its adapter.
        processor: the tokenizer of another repository's object that does not know where it was loaded from.

    Raises:
        ModelError: if it cannot be loaded, has no vision tower, no adapter knows it, or its tower is quantised.
    """
    # not at the top: who loads an encoder or grafts one reads no MLLM by name and merges no adapter
    from pivot_plugin.models.loading import from_plugins, load_model
    from pivot_plugin.models.merging import base_model, refuse_quantised, without_adapters

    if isinstance(model, str | Path):
        model = load_model(model, None)[0]
    elif (foreign := from_plugins(model, processor)) is not None:
        model = foreign[0]
    adapter = find_adapter(base_model(model))  # type: ignore[arg-type]
    refuse_quantised(adapter.tower)
    encoder = adapter.extract()
    without_adapters(encoder)
    return encoder.requires_grad_(True)


def graft(
    model: PreTrainedModel | nn.Module,
    encoder: PreTrainedModel,
    projector: Projector = "keep",
    *,
    processor: object | None = None,
    image_processor: object | None = None,
    feature_layer: int | None = None,
    projector_weights: str | Path | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Put an encoder into an MLLM. `model.save_pretrained` afterwards writes an ordinary MLLM folder.

    Args:
        model: the MLLM, changed in place; its device and precision stay. An object of another repository that a plugin
            knows too, whose projector is kept.
        encoder: stand-alone, as `extract_encoder` or `load_encoder` return it; not changed.
        projector: "keep": the encoder has the class and sizes of the tower, its weights take the tower's place. "new":
            any encoder a LLaVA-like model can read, with a new projector, to be trained. "first-layer": the same, but
            the projector begins with the first layer of the one the encoder was trained with, which is frozen (the
            paper's best variant, arXiv 2510.16333, table H, "1+1").
        processor: the model's, changed in place to prepare images for the encoder; needed unless "keep". Of another
            repository's object its tokenizer, where it does not know where it was loaded from.
        image_processor: the encoder's; found by where it was loaded from where None.
        feature_layer: hidden state that a new projector reads; what the encoder was trained at where None, else -2.
        projector_weights: `projector.safetensors` of the encoder; beside it where it was loaded from where None.
        seed: of a new projector's weights.

    Returns:
        The model in transformers' form. Its configuration names the encoder and the commit it was read at under
        `pivot_encoder`.

    Raises:
        EncoderError: with every mismatch; the model is unchanged then.
        ModelError: if the model has no vision tower, or no adapter knows it.
        SettingsError: for an unknown projector, or one without a processor.
    """
    if projector not in get_args(Projector):
        raise SettingsError(
            f"projector is {projector!r}.", f"Choose one of {', '.join(map(repr, get_args(Projector)))}."
        )
    if not isinstance(encoder, PreTrainedModel):
        raise SettingsError(
            f"encoder is a {type(encoder).__name__}, not a loaded model.", "Give what pivot.load_encoder(...) returns."
        )
    # not at the top: who grafts into a model of transformers loads none
    from pivot_plugin.models.loading import from_plugins

    foreign = from_plugins(model, processor)
    if foreign is not None:
        model = foreign[0]
        if projector != "keep":
            raise SettingsError(
                f"projector={projector!r} changes the modules of this {type(model).__name__}, and the object it was "
                "made of would not have them.",
                'Use projector="keep", or graft into the checkpoint by its folder.',
            )
    adapter = find_adapter(model)  # type: ignore[arg-type]
    if projector == "keep":
        adapter.graft(encoder)
        if foreign is not None:
            collect("pivot_model_trained", model=adapter.model)
    else:
        if processor is None:
            raise SettingsError(
                f"projector={projector!r} changes how images are prepared, and no processor is given.",
                "Pass processor=, the model's own, and save it with the model.",
            )
        first = _first_layer(adapter, encoder, projector_weights) if projector == "first-layer" else None
        images = image_processor or image_processor_of(encoder)
        adapter.replace_tower(copy.deepcopy(encoder), images, processor, _layer(encoder, feature_layer))
        _initialise(adapter, first, seed)
    note_origin(adapter.model, encoder)
    return adapter.model


def note_origin(model: PreTrainedModel, encoder: PreTrainedModel) -> None:
    """Have an MLLM's configuration say which encoder it has, where that is known.

    Args:
        model: with the encoder.
        encoder: as it was loaded.
    """
    origin = origin_of(encoder)
    if origin is not None:
        model.config.pivot_encoder = {"name": origin.name, "revision": origin.revision}


def _layer(encoder: PreTrainedModel, feature_layer: int | None) -> int:
    if feature_layer is not None:
        return feature_layer
    recorded = getattr(encoder.config, FEATURE_LAYER, DEFAULT_FEATURE_LAYER)
    # of a tower that was read at its own output, LLaVA reads the last hidden state
    return -1 if recorded is None else int(recorded)


def image_processor_of(encoder: PreTrainedModel) -> object:
    """The image processor that lies where an encoder was loaded from.

    Args:
        encoder: stand-alone.

    Raises:
        SettingsError: if there is none.
    """
    origin = origin_of(encoder)
    source = str(origin.folder) if origin else encoder.name_or_path
    try:
        return image_processor_in(source)
    except EncoderError as error:
        raise SettingsError(
            f"No image processor is known for this {type(encoder).__name__}.",
            "Pass image_processor=, or load the encoder by pivot.load_encoder.",
        ) from error


def _first_layer(
    adapter: VisionAdapter, encoder: PreTrainedModel, projector_weights: str | Path | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the first layer of the projector that the encoder was trained with.

    Raises:
        EncoderError: with everything that keeps it from being used in this model.
    """
    origin = origin_of(encoder)
    beside = origin.folder / PROJECTOR_FILE if origin else None
    file = Path(projector_weights) if projector_weights else beside
    if file is None or not file.is_file():
        raise EncoderError(
            "There is no projector to take the first layer of.",
            "Load the encoder by pivot.load_encoder, or pass projector_weights=.",
        )
    with foreign_code(f"{str(file)!r} holds no projector", "Save or download the encoder again.", EncoderError):
        tensors = load_file(file)
    recorded = origin.record.get("projector_first_layer") if origin else None
    # of weights without a record, the layer that is called as this projector's
    name = str(recorded or adapter.projector_first_layer or "").rpartition(".")[2]
    path = str(recorded or next((n.removesuffix(".weight") for n in tensors if n.endswith(f".{name}.weight")), ""))
    weight, bias = tensors.get(f"{path}.weight"), tensors.get(f"{path}.bias")
    problems = []
    if adapter.projector_first_layer is None:
        problems.append(f"the projector of family {adapter.family} cannot begin with the layer of another")
    if weight is None:
        problems.append(f"{file.name} has no first layer that another projector could begin with")
    else:
        width = adapter.model.config.get_text_config().hidden_size
        if weight.shape[0] != width:
            problems.append(f"the first layer gives {weight.shape[0]} numbers, the language model takes {width}")
        if weight.shape[1] != encoder.config.hidden_size:
            problems.append(
                f"the first layer takes {weight.shape[1]} numbers, the encoder gives {encoder.config.hidden_size}"
            )
    if problems or weight is None:
        raise EncoderError(f"The first layer cannot be reused: {'; '.join(problems)}.", 'Use projector="new".')
    return weight, bias


def draw_projector(adapter: VisionAdapter, seed: int) -> None:
    """Draw the weights of an MLLM's projector.

    Args:
        adapter: of the MLLM.
        seed: the same seed gives the same weights.
    """
    model = adapter.model
    layers = [module for path in adapter.projector_paths for module in model.get_submodule(path).modules()]
    draw([module for module in layers if isinstance(module, nn.Linear)], model, seed)


@torch.no_grad()
def draw(layers: Sequence[nn.Linear], model: PreTrainedModel, seed: int) -> None:
    """Draw the weights of linear layers as a model's language model is initialised; biases become zero.

    Args:
        layers: in the order in which they are drawn.
        model: whose `initializer_range` is the standard deviation.
        seed: the same seed gives the same weights.
    """
    spread = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    drawn = torch.Generator().manual_seed(seed)
    for layer in layers:
        layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0.0, spread, generator=drawn))
        if layer.bias is not None:
            layer.bias.zero_()


@torch.no_grad()
def _initialise(adapter: VisionAdapter, first: tuple[torch.Tensor, torch.Tensor | None] | None, seed: int) -> None:
    """Draw a new projector; put a reused first layer in and freeze it."""
    draw_projector(adapter, seed)
    model = adapter.model
    if first is None or adapter.projector_first_layer is None:
        return
    layer = model.get_submodule(adapter.projector_first_layer)
    layer.weight.copy_(first[0])
    if layer.bias is not None:
        layer.bias.copy_(torch.zeros_like(layer.bias) if first[1] is None else first[1])
    layer.requires_grad_(False)
