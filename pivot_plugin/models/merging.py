"""LoRA folders and PEFT models, whoever trained them, as the plain models that they are.

A folder says which base it belongs to. What it holds is put into that base only where every tensor finds its place
there, in its size: names that transformers 4 gave to modules are known by a table, anything else is refused.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from pivot_plugin.errors import ModelError
from pivot_plugin.files import write_whole

from .fingerprints import weights_fingerprint

SHOWN = 3
# beside an adapter that a run of this package writes: the weights that its LoRA is on
ADAPTED_FILE = "adapted_weights.json"
_PREFIX = "base_model.model."
_WEIGHT = re.compile(r"(.+?)\.(?:lora_\w+|modules_to_save|token_adapter|weight|bias)(?:\..*)?")
# what modules were called by other releases, and what they are called by this one
_RENAMED = (
    (r"^vision_model\.", ""),
    (r"(^|\.)vision_tower\.vision_model\.", r"\1vision_tower."),
    (r"^(visual|vision_tower|multi_modal_projector|language_model)\.", r"model.\1."),
    (r"^model\.(layers|embed_tokens|norm)(?=\.|$)", r"model.language_model.\1"),
    (r"^(?:model\.)?language_model\.model\.", "model.language_model."),
    (r"^(?:model\.)?language_model\.lm_head(?=\.|$)", "lm_head"),
)


def is_lora(source: object) -> bool:
    """Whether a folder or Hub id holds the adapter of a model and no model.

    Args:
        source: anything; what is no name holds none.
    """
    if not isinstance(source, str | Path):
        return False
    folder = Path(source)
    try:
        if folder.is_dir():
            return (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors*"))
        return find_adapter_config_file(str(source)) is not None
    # neither a folder nor a possible Hub id: whoever loads it says so
    except (OSError, ValueError):
        return False


def base_of(source: str | Path) -> tuple[PeftConfig, str]:
    """The settings of an adapter and the name of its base.

    Args:
        source: folder or Hub id of the adapter.

    Raises:
        ModelError: if it names no base, or is of a kind that cannot be merged.
    """
    try:
        config = PeftConfig.from_pretrained(str(source))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"The adapter_config.json of {str(source)!r} cannot be read: {error}", "Save or download the adapter again."
        ) from error
    if config.is_prompt_learning:
        raise ModelError(
            f"{str(source)!r} holds {config.peft_type.value}, which no model can take into its weights.",
            "Only LoRA and its relatives can be merged.",
        )
    base = config.base_model_name_or_path
    if not base:
        raise ModelError(
            f"The adapter in {str(source)!r} names no base (base_model_name_or_path in adapter_config.json).",
            "Write the folder or Hub id of the model it was trained on there.",
        )
    return config, str(base)


def load_base(source: str | Path, load: Callable[[str], Any]) -> Any:
    """The base of an adapter, loaded, and refused where the adapter could not be merged into it.

    Args:
        source: folder or Hub id of the adapter.
        load: loads the base by its name.

    Raises:
        ModelError: if the base is missing, or quantised.
    """
    _, base = base_of(source)
    try:
        settings = AutoConfig.from_pretrained(base, trust_remote_code=False)
    # a base of another repository has no configuration of transformers; whoever loads it knows
    except ValueError:
        settings = None
    except OSError as error:
        raise ModelError(
            f"The base of the adapter in {str(source)!r} cannot be had: {base!r} is no folder here and no model of the "
            f"Hub that could be read ({type(error).__name__}).",
            "Download it, or write where it is as base_model_name_or_path into adapter_config.json.",
        ) from error
    quantised = getattr(settings, "quantization_config", None)
    if quantised is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise ModelError(
            f"The base of the adapter in {str(source)!r}, {base!r}, is quantised ({kind}): merged into rounded weights "
            "the adapter would not be what was trained.",
            "Write the folder or Hub id of the model before its quantisation as base_model_name_or_path.",
        )
    return load(base)


def note_adapted_weights(model: PeftModel, folder: Path) -> None:
    """Write a hash of the weights that a LoRA is on beside it, since PEFT notes no more than its base's name.

    A model that was trained further in memory, as by an earlier round, is another one than its name says.

    Args:
        model: in training, its LoRA not merged, its weights not divided among processes.
        folder: that the LoRA is written to.
    """
    layers = (layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
    found = [getattr(layer.get_base_layer(), "weight", None) for layer in layers]
    weights = [weight for weight in found if isinstance(weight, torch.Tensor) and weight.is_floating_point()]
    # of experts in one tensor, which have no such name, and of rounded weights there is nothing to compare with
    if weights and len(weights) == len(found):
        note = {"sha256": weights_fingerprint(weights)}
        write_whole(folder / ADAPTED_FILE, json.dumps(note) + "\n")


def adapted_weights_of(source: str | Path) -> str | None:
    """The hash that `note_adapted_weights` left in an adapter's folder; None where there is none.

    Args:
        source: folder or Hub id of the adapter.

    Raises:
        ModelError: if the note cannot be read.
    """
    file = Path(source) / ADAPTED_FILE
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{str(file)!r} cannot be read: {error}.", "Save the adapter again.") from error


def merge(model: PreTrainedModel, source: str | Path, adapted_weights: str | None = None) -> PreTrainedModel:
    """Put an adapter into the weights of its base.

    Args:
        model: the base, changed in place.
        source: folder or Hub id of the adapter.
        adapted_weights: hash of the weights that its LoRA was trained on, where that was recorded: PEFT does not, so
            that a base that was trained further cannot be told from the right one by an adapter of anybody.

    Returns:
        the model, without any layer of PEFT.

    Raises:
        ModelError: if a tensor of the adapter has no place in this model, or one of another size, or the weights are
            not those that were recorded.
    """
    config, base = base_of(source)
    expected = (config.auto_mapping or {}).get("base_model_class")
    trained_on = getattr(transformers, str(expected), None)
    if isinstance(trained_on, type) and not isinstance(model, trained_on):
        raise _of_another_base(source, base, [f"it was trained on a {expected}, this is a {type(model).__name__}"])
    try:
        weights = load_peft_weights(str(source), device="cpu")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"The weights of the adapter in {str(source)!r} cannot be read: {error}", "Save or download it again."
        ) from error
    renamed, targets, problems = _placed(model, weights)
    if not problems and adapted_weights is not None:
        here = weights_fingerprint(model.get_submodule(path).weight for path in targets)  # type: ignore[misc]
        if here != adapted_weights:
            problems.append(
                "the weights it was trained on are others, by the hash that was recorded of them: another base, or "
                "this one after an earlier round or run"
            )
    if problems:
        raise _of_another_base(source, base, problems)
    if not getattr(config, "target_parameters", None) and targets:
        # as they are called here, whatever pattern found them when they were trained
        config.target_modules = targets
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.inference_mode = True
    try:
        wrapped = get_peft_model(model, config)
        loaded = set_peft_model_state_dict(wrapped, renamed)
        unfilled = [name for name in loaded.missing_keys if ".lora_" in name]
        if unfilled or loaded.unexpected_keys:
            raise ValueError(
                f"{len(unfilled)} tensors are missing and {len(loaded.unexpected_keys)} left over, the first "
                f"{[*unfilled, *loaded.unexpected_keys][0]!r}"
            )
        merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"The adapter in {str(source)!r} cannot be merged into {base!r}: {error}",
            "Merge it where it was trained, and give the merged model.",
        ) from error
    # what transformers notes of an adapter it has no more
    merged._hf_peft_config_loaded = False  # type: ignore[attr-defined]
    merged.__dict__.pop("peft_config", None)
    return merged


def without_adapters(module: nn.Module) -> None:
    """Put every adapter inside a module into the weights it belongs to, and leave plain layers.

    Args:
        module: a copy, changed in place.

    Raises:
        ModelError: for layers whose weights are quantised.
    """
    for path, layer in list(module.named_modules()):
        if not isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        parent, _, name = path.rpartition(".")
        if isinstance(layer, BaseTunerLayer):
            if not layer.get_base_layer().weight.is_floating_point():
                raise _quantised(type(module).__name__)
            layer.merge(safe_merge=True)
            plain = layer.get_base_layer()
        else:
            (plain,) = (module for name, module in layer.named_children() if name == "original_module")
            active = layer.active_adapters
            if len(active) == 1 and active[0] in layer.modules_to_save:
                plain = layer.modules_to_save[active[0]]
        setattr(module.get_submodule(parent) if parent else module, name, plain)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        module.__dict__.pop(name, None)


def refuse_quantised(tower: nn.Module) -> None:
    """Refuse a tower whose weights are no numbers by themselves.

    Args:
        tower: to be extracted.

    Raises:
        ModelError: if any is quantised.
    """
    if any(not parameter.is_floating_point() for parameter in tower.parameters()):
        raise _quantised(type(tower).__name__)


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside a PEFT model, with the adapter's layers in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _quantised(name: str) -> ModelError:
    return ModelError(
        f"The weights of this {name} are quantised: rounded, and in a form that no other program reads as numbers.",
        "Load the model without quantisation (no load_in_4bit, no quantization_config), its adapter with it.",
    )


def _of_another_base(source: str | Path, base: str, problems: list[str]) -> ModelError:
    problems = list(dict.fromkeys(problems))
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return ModelError(
        f"The adapter in {str(source)!r} is not one of {base!r} as it is now: {'; '.join(problems[:SHOWN])}{more}.",
        "Give the base that it was trained on, in the revision it was trained on; of a run that has finished, take the "
        "encoder in its folder.",
    )


def _candidates(path: str) -> Iterator[str]:
    """A module's path, and what it may be called in this release."""
    found = [path]
    for name in found:
        yield name
        for pattern, replacement in _RENAMED:
            other = re.sub(pattern, replacement, name)
            if other not in found:
                found.append(other)


def _placed(
    model: PreTrainedModel, weights: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], set[str], list[str]]:
    """An adapter's weights by this model's names, the modules that its LoRA is on, and what has no place."""
    modules = dict(model.named_modules())
    renamed, targets, problems = {}, set(), []
    for name, tensor in weights.items():
        inner = name.removeprefix(_PREFIX)
        found = _WEIGHT.fullmatch(inner)
        path = found[1] if found else inner
        here = next((candidate for candidate in _candidates(path) if candidate in modules), None)
        if here is None:
            problems.append(f"it has a tensor for {path!r}, which this {type(model).__name__} has not")
            continue
        renamed[f"{_PREFIX}{here}{inner[len(path) :]}"] = tensor
        if ".lora_" in inner:
            targets.add(here)
        problem = _misfit(inner, tensor, modules[here])
        if problem:
            problems.append(problem)
    return renamed, targets, problems


def _misfit(name: str, tensor: torch.Tensor, module: nn.Module) -> str | None:
    """Why a matrix of a LoRA does not fit the linear layer it is for."""
    if not isinstance(module, nn.Linear):
        return None
    for kind, side, size in (("lora_A", 1, module.in_features), ("lora_B", 0, module.out_features)):
        if f".{kind}." in name and tensor.shape[side] != size:
            return f"{name!r} is for a layer of {tensor.shape[side]} numbers, the base has {size} there"
    return None
