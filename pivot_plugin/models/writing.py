"""An MLLM on disk again, in transformers' form or in that of the checkpoint it was read from."""

from pathlib import Path

from transformers import PreTrainedModel

from pivot_plugin.errors import ModelError
from pivot_plugin.hooks import ask


def write_like(model: PreTrainedModel, template: str | Path, folder: str | Path, target: str | None = None) -> Path:
    """Write a model as a checkpoint of another repository, in the form of the one it was read from.

    Args:
        model: in transformers' form.
        template: folder or Hub id of the checkpoint it was read from: names, configuration, tokenizer and code are
            its own, the numbers are the model's.
        folder: to write; must be empty or absent.
        target: what the form is called ("llava-next", "internvl"), checked where it is given.

    Raises:
        ModelError: if no plugin knows the form of the template, or the model does not fit it.
        PluginError: if a plugin raises.
    """
    written = ask("pivot_write_model", model=model, template=str(template), target=target, folder=Path(folder))
    if written is None:
        raise ModelError(
            f"{str(template)!r} is no checkpoint of a repository whose form is known.",
            "A model of transformers' own classes is written by save_pretrained; for another form write a plugin with "
            "the hook pivot_write_model.",
        )
    return Path(str(written))
