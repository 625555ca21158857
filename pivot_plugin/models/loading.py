"""Models by name: an MLLM and its processor, loaded where they are not."""

from pathlib import Path

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from pivot_plugin.errors import ModelError


def empty_model(name: str) -> PreTrainedModel:
    """An MLLM as its configuration describes it, without weights.

    Args:
        name: folder or Hub id.

    Raises:
        ModelError: if there is none.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        with init_empty_weights():
            return AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No MLLM could be found at {name!r}: {error}", "Give a folder or Hub id of an image-text model."
        ) from error


def load_model(
    model: PreTrainedModel | str | Path, processor: ProcessorMixin | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """An MLLM and its processor, loaded where they are not.

    Args:
        model: loaded, or a folder or Hub id.
        processor: found by the model's name where None.

    Raises:
        ModelError: if either cannot be loaded.
    """
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
    try:
        return model, AutoProcessor.from_pretrained(name)
    except ImportError as error:
        raise ModelError(
            f"The processor of {str(name)!r} needs a package that is not installed: {error}",
            f"Run: pip install {error.name}." if error.name else "Install it, or pass processor= explicitly.",
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No processor could be loaded from {str(name)!r}: {error}", "Pass processor= explicitly."
        ) from error
