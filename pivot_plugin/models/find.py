"""The adapter of a model's family, and whether a processor and a tower belong to a model."""

import gc

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.adapters.unserved import REMEDY, why_unserved
from pivot_plugin.errors import ModelError
from pivot_plugin.hooks import ask, collect


def find_adapter(model: PreTrainedModel, encoder: bool = False) -> VisionAdapter:
    """The adapter of a model's family, from the newest plugin that knows it.

    Args:
        model: the MLLM.
        encoder: whether a stand-alone encoder will do.

    Raises:
        ModelError: if no plugin knows the model, or it is an encoder where an MLLM is wanted.
        PluginError: if a plugin raises.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"The model is a {type(model).__name__}, not a transformers PreTrainedModel.",
            "Load it with a transformers class such as LlavaForConditionalGeneration.",
        )
    adapter = ask("pivot_adapter", model=model)
    if adapter is None:
        raise ModelError(
            f"No adapter knows {type(model).__name__}.", "Install a plugin for its family; `pivot adapters` lists them."
        )
    if not isinstance(adapter, VisionAdapter):
        raise ModelError(
            f"A plugin answered pivot_adapter with a {type(adapter).__name__}.",
            "It should return a VisionAdapter or None.",
        )
    if not encoder and (reason := why_unserved(model)) is not None:
        raise ModelError(f"{type(model).__name__} {reason}.", REMEDY)
    if not adapter.tower_path and not encoder:
        raise ModelError(
            f"{type(model).__name__} is an encoder by itself and has no language model.",
            "Pass a multimodal model such as LlavaForConditionalGeneration.",
        )
    return adapter


def find_adapters(model: PreTrainedModel) -> list[VisionAdapter]:
    """Every adapter that knows a model, those of the newest plugins first.

    Args:
        model: an MLLM, or a stand-alone encoder.

    Raises:
        ModelError, PluginError: as `find_adapter`.
    """
    find_adapter(model, encoder=True)
    newest_first = reversed(collect("pivot_adapter", model=model))
    return [adapter for _, adapter in newest_first if isinstance(adapter, VisionAdapter)]


def _makes_image_token(processor: ProcessorMixin, image_token_id: int) -> bool:
    """Whether a processor whose marker is another token makes the model's image token of a picture."""
    # not at the top: who looks for an adapter needs no TRL
    from .image_tokens import PROBE, ImageTokens

    try:
        counts = ImageTokens(processor, image_token_id).process_images([[PROBE]]).counts
    except ImportError as error:
        raise ModelError(
            f"{type(processor).__name__} needs {error.name or 'a package'}, which is not installed: {error}",
            f"Run: pip install {error.name}." if error.name else "Install it.",
        ) from error
    # whatever a processor of another model raises of a picture says that it is one
    except Exception:
        return False
    return sum(counts[0]) > 0


def check_processor(model: PreTrainedModel, processor: object, adapter: VisionAdapter) -> None:
    """Refuse a processor that does not belong to a model.

    Raises:
        ModelError: naming what does not fit.
    """
    remedy = "Pass the processor the model was published with: AutoProcessor.from_pretrained(<same id>)."
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ModelError(f"The processor is a {type(processor).__name__}, without an image processor.", remedy)
    marker = getattr(processor, "image_token", None)
    token = processor.tokenizer.convert_tokens_to_ids(str(marker)) if marker else None
    if token != adapter.image_token_id and not _makes_image_token(processor, adapter.image_token_id):
        raise ModelError(
            f"{type(processor).__name__} does not belong to {type(model).__name__}: its image token {marker!r} is "
            f"{token}, the model's is {adapter.image_token_id}, and it makes none of these of a picture.",
            remedy,
        )
    embeddings = model.get_input_embeddings().num_embeddings
    if len(processor.tokenizer) > embeddings:
        raise ModelError(
            f"The tokenizer of {type(processor).__name__} has {len(processor.tokenizer)} tokens, "
            f"{type(model).__name__} embeds only {embeddings}.",
            remedy,
        )


def check_tower(adapter: VisionAdapter) -> None:
    """Refuse to train a tower that another model holds as well, and that would change there without a word.

    Args:
        adapter: of the model that is to be trained.

    Raises:
        ModelError: naming the other model.
    """
    if not _other_holders(adapter):
        return
    # one that nobody can reach any more may still be there
    gc.collect()
    if holders := _other_holders(adapter):
        raise ModelError(
            f"The vision tower of this {type(adapter.model).__name__} is shared: a {type(holders[0]).__name__} outside "
            "of it holds the same modules, and would change with them.",
            "Give each model a tower of its own (copy.deepcopy), or delete the other model.",
        )


def _other_holders(adapter: VisionAdapter) -> list[nn.Module]:
    """Modules outside of a model that have its tower as a part."""
    inside = {id(module) for module in adapter.model.modules()}
    tower = adapter.tower
    return [
        module
        for module in gc.get_objects()
        # of foreign objects nothing is asked but their type
        if issubclass(type(module), nn.Module)
        and id(module) not in inside
        and any(child is tower for child in module.__dict__.get("_modules", {}).values())
    ]
