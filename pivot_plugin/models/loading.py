"""Models by name: an MLLM and its processor, loaded where they are not."""

import json
import logging
from pathlib import Path

from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from pivot_plugin.errors import ModelError
from pivot_plugin.files import RUN_FILE
from pivot_plugin.hooks import ask

from .merging import adapted_weights_of, base_of, is_lora, load_base, merge

logger = logging.getLogger(__name__)


def empty_model(name: str) -> PreTrainedModel:
    """An MLLM as its configuration describes it, without weights.

    Args:
        name: folder or Hub id.

    Raises:
        ModelError: if there is none.
    """
    if is_lora(name):
        base = base_of(name)[1]
        try:
            return empty_model(base)
        except ModelError as error:
            raise ModelError(f"{name!r} is a LoRA of {base!r}. {error.finding}", error.remedy) from error
    foreign = from_plugins(name, None, weights=False)
    if foreign is not None:
        return foreign[0]
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with init_empty_weights():
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _other_kind(Path(name)) or ModelError(
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
    model: PreTrainedModel | str | Path, processor: ProcessorMixin | PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """An MLLM and its processor, loaded where they are not.

    Args:
        model: loaded, or a folder or Hub id; of transformers or of a repository that a plugin knows; of an adapter
            (LoRA), which is merged into the base that it names.
        processor: found by the model's name where None; the tokenizer of a repository's object will do.

    Raises:
        ModelError: if either cannot be loaded, weights are missing, or an adapter does not fit its base.
        PluginError: if a plugin raises.
    """
    if isinstance(model, str | Path) and is_lora(model):
        base, base_processor = load_base(model, lambda base: load_model(base, processor))
        return _merged(base, model), base_processor
    foreign = from_plugins(model, processor)
    if foreign is not None:
        return foreign[0], processor if isinstance(processor, ProcessorMixin) else foreign[1]
    name = model
    if isinstance(model, str | Path):
        try:
            model = _filled(model)
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise _not_loaded(Path(model), error) from error
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


def _merged(base: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """A base with an adapter in its weights.

    Raises:
        ModelError: if it does not fit; with a remedy of its own where the base is of another repository, whose names
            the adapter has.
    """
    try:
        return merge(base, adapter, adapted_weights_of(adapter))
    except ModelError as error:
        name = base_of(adapter)[1]
        if from_plugins(name, None, weights=False) is None:
            raise
        raise ModelError(
            error.finding,
            f"{name!r} is a checkpoint of another repository, whose names the adapter has: merge it there, by the "
            "repository's own means, and give the merged checkpoint.",
        ) from error


def is_mllm(name: str | Path) -> bool:
    """Whether a name is that of an MLLM and not of an encoder by itself; true also of one that cannot be read.

    Args:
        name: folder or Hub id; of another repository's model, or of an adapter, too.
    """
    if is_lora(name):
        return True
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # of another repository, or nothing: whoever loads it says so
    except (OSError, ValueError):
        return True
    return type(config) in AutoModelForImageTextToText._model_mapping


def load_processor(name: str | Path) -> ProcessorMixin:
    """The processor of an MLLM by the MLLM's name; none of its weights are read.

    Args:
        name: folder or Hub id of the MLLM; of transformers or of a repository that a plugin knows.

    Raises:
        ModelError: if there is none.
    """
    if is_lora(name):
        name = base_of(name)[1]
    foreign = from_plugins(name, None, weights=False)
    return foreign[1] if foreign is not None else _own_processor(name)


def _own_processor(name: str | Path) -> ProcessorMixin:
    """The processor that lies with a model of transformers."""
    try:
        return AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except ImportError as error:
        raise ModelError(
            f"The processor of {str(name)!r} needs a package that is not installed: {error}",
            f"Run: pip install {error.name}." if error.name else "Install it, or pass processor= explicitly.",
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No processor could be loaded from {str(name)!r}: {error}", "Pass processor= explicitly."
        ) from error


def _not_loaded(folder: Path, error: Exception) -> ModelError:
    """Why a model could not be loaded, and what is to be done about it."""
    finding = f"No MLLM could be loaded from {str(folder)!r}: {error}"
    if isinstance(error, ImportError):
        return ModelError(finding, "Install the package; or, of a quantised model, give the one before quantisation.")
    if (other := _other_kind(folder)) is not None:
        return other
    if not (folder / "config.json").is_file():
        return ModelError(finding, "Give a folder or Hub id of an image-text model.")
    damaged = _damaged_files(folder)
    if damaged:
        return ModelError(
            f"{str(folder)!r} is half downloaded or half written: {'; '.join(damaged)}.",
            "Download or save it again, whole: an interrupted download goes on where it stopped.",
        )
    return ModelError(finding, "Give the folder of an image-text model, with its weights.")


def _other_kind(source: Path) -> ModelError | None:
    """What a folder or Hub id holds in the place of an MLLM, and which command takes it; None where that is not plain.

    Args:
        source: of what transformers does not load as an MLLM.
    """
    name = str(source)
    if (source / RUN_FILE).is_file() and not (source / "config.json").is_file():
        left = [part for part in ("model", "encoder") if (source / part).is_dir()]
        named = " and ".join(f"its {part} in {str(source / part)!r}" for part in left)
        remedy = f"It left {named}." if left else "It left neither a model nor an encoder."
        return ModelError(f"{name!r} is the folder of a run, not of an MLLM.", remedy)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # whatever stands there in place of a configuration
    except Exception:
        return None
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return None
    if type(config) in AutoModelForCausalLM._model_mapping:
        return ModelError(
            f"{name!r} holds a language model ({config.model_type}), not an MLLM.",
            f"pivot assemble ENCODER {name} -o FOLDER makes an MLLM of it.",
        )
    if any(hasattr(config, setting) for setting in ("patch_size", "image_size", "vision_config")):
        return ModelError(
            f"{name!r} holds a vision encoder by itself ({config.model_type}), not an MLLM.",
            f"pivot verify, export and push take it; pivot graft MLLM {name} -o FOLDER puts it into an MLLM, and pivot "
            f"assemble {name} LANGUAGE_MODEL -o FOLDER makes one of it.",
        )
    return ModelError(
        f"{name!r} holds a model of type {config.model_type}, not an MLLM.",
        "Give a folder or Hub id of an image-text model.",
    )


def _damaged_files(folder: Path) -> list[str]:
    """What is wrong with the weight files of a folder, in words."""
    damaged = []
    for index in folder.glob("*.safetensors.index.json"):
        try:
            wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged.append(f"{index.name} cannot be read")
            continue
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            count = f"{len(missing)} of the {len(wanted)}"
            damaged.append(f"{count} files that {index.name} names are missing, the first {missing[0]}")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            damaged.append(f"{file.name} is cut short or no safetensors file ({error})")
    if not damaged and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        damaged.append("it has a config.json and no weights")
    return damaged


def _filled(name: str | Path) -> PreTrainedModel:
    """An MLLM all of whose weights are in its files.

    Raises:
        ModelError: with the number of tensors that are missing or left over, and the first of them.
    """
    model, loading = AutoModelForImageTextToText.from_pretrained(
        name, dtype="auto", output_loading_info=True, trust_remote_code=False
    )
    missing = sorted([*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])])
    left_over = sorted(loading["unexpected_keys"])
    beside = f"{len(left_over)} tensors are left over, the first {left_over[0]!r}" if left_over else ""
    if missing:
        raise ModelError(
            f"{str(name)!r} does not fill a {type(model).__name__}: {len(missing)} tensors are missing or of another "
            f"size, the first {missing[0]!r}{f'; {beside}' if beside else ''}.",
            "Download or save it again; with tensors left over, it was saved by another release under other names.",
        )
    if left_over:
        logger.warning("Of %r %s: no part of a %s.", str(name), beside, type(model).__name__)
    return model
