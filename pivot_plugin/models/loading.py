"""Models by name: an MLLM and its processor, loaded where they are not."""

from pathlib import Path

from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from pivot_plugin.errors import ModelError
from pivot_plugin.hooks import ask


def empty_model(name: str) -> PreTrainedModel:
    """An MLLM as its configuration describes it, without weights.

    Args:
        name: folder or Hub id.

    Raises:
        ModelError: if there is none.
    """
    foreign = from_plugins(name, None, weights=False)
    if foreign is not None:
        return foreign[0]
    try:
        config = AutoConfig.from_pretrained(name)
        with init_empty_weights():
            return AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No MLLM could be found at {name!r}: {error}", "Give a folder or Hub id of an image-text model."
        ) from error


def from_plugins(
    source: object, processor: object, weights: bool = True
) -> tuple[PreTrainedModel, ProcessorMixin] | None:
    """What plugins make of a folder, a Hub id or an object that is not of transformers' classes.

    Args:
        source: to be read.
        processor: what the user gave with it: a tokenizer, a processor, or None.
        weights: whether a checkpoint's weights are wanted, or its structure alone.

    Returns:
        a transformers model and its processor, or None if no plugin answers.

    Raises:
        ModelError: for a checkpoint that a plugin knows and cannot read, or an answer of another kind.
        PluginError: if a plugin raises.
    """
    if type(source).__module__.partition(".")[0] == "transformers":
        return None
    answer = ask("pivot_model", source=source, processor=processor, weights=weights)
    if answer is None:
        return None
    match answer:
        case (PreTrainedModel() as model, ProcessorMixin() as made):
            return model, made
    raise ModelError(
        f"A plugin answered pivot_model with a {type(answer).__name__}.",
        "It should return a transformers model and its processor, or None.",
    )


def load_model(
    model: PreTrainedModel | str | Path, processor: ProcessorMixin | PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """An MLLM and its processor, loaded where they are not.

    Args:
        model: loaded, or a folder or Hub id; of transformers or of a repository that a plugin knows.
        processor: found by the model's name where None; the tokenizer of a repository's object will do.

    Raises:
        ModelError: if either cannot be loaded.
        PluginError: if a plugin raises.
    """
    foreign = from_plugins(model, processor)
    if foreign is not None:
        return foreign[0], processor if isinstance(processor, ProcessorMixin) else foreign[1]
    name = model
    if isinstance(model, str | Path):
        try:
            model = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
        except (OSError, ValueError) as error:
            raise ModelError(
                f"No MLLM could be loaded from {str(name)!r}: {error}",
                "Give a folder or Hub id of an image-text model.",
            ) from error
    elif isinstance(model, PreTrainedModel):
        name = model.name_or_path
    if processor is not None:
        return model, processor
    if not name or not isinstance(name, str | Path):
        raise ModelError(
            f"No processor was given, and this {type(model).__name__} has no name_or_path to find one by.",
            "Pass processor=AutoProcessor.from_pretrained(...).",
        )
    return model, _own_processor(name)


def load_processor(name: str | Path) -> ProcessorMixin:
    """The processor of an MLLM by the MLLM's name; none of its weights are read.

    Args:
        name: folder or Hub id of the MLLM; of transformers or of a repository that a plugin knows.

    Raises:
        ModelError: if there is none.
    """
    foreign = from_plugins(name, None, weights=False)
    return foreign[1] if foreign is not None else _own_processor(name)


def _own_processor(name: str | Path) -> ProcessorMixin:
    """The processor that lies with a model of transformers."""
    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No processor could be loaded from {str(name)!r}: {error}", "Pass processor= explicitly."
        ) from error
