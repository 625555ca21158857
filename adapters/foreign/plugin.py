"""The hooks that this folder implements: a model is read, what was trained goes back, a folder is written."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.errors import ModelError
from pivot_plugin.hooks import hookimpl

from .reading import layout_of, read
from .sharing import bring_back
from .writing import write_back


@hookimpl
def pivot_model(source: Any, processor: Any, weights: bool) -> tuple[PreTrainedModel, ProcessorMixin] | None:
    return read(source, processor, weights)


@hookimpl
def pivot_model_trained(model: PreTrainedModel) -> None:
    bring_back(model)


@hookimpl
def pivot_write_model(model: PreTrainedModel, template: str, target: str | None, folder: Path) -> Path | None:
    layout = layout_of(template)
    if layout is None:
        return None
    if target not in (None, layout.target):
        raise ModelError(
            f"{template!r} is a checkpoint of {layout.name}, and was to be written for {target}.",
            f"Write it for {layout.target}.",
        )
    return write_back(model, template, folder)
