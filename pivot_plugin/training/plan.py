"""What trains: LoRA where it goes, weights that train themselves, and the account of both."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import PARTS, Train
from pivot_plugin.errors import ModelError, SettingsError

TRAINED_PARTS: dict[str, tuple[str, ...]] = {
    "encoder": ("encoder",),
    "encoder+projector": ("encoder", "projector"),
    "language_model": ("language_model",),
    "projector": ("projector",),
    "projector+language_model": ("projector", "language_model"),
    "all": PARTS,
}


@dataclass(frozen=True)
class TrainingPlan:
    """What trains in a run.

    Attributes:
        parts: names of the parts that train.
        lora: where LoRA goes, None where weights train themselves.
        parameters: names of the model's own parameters that train themselves.
    """

    parts: tuple[str, ...]
    lora: LoraConfig | None
    parameters: tuple[str, ...]


def plan(
    adapter: VisionAdapter, train: Train, lora: int | LoraConfig | None, frozen: Sequence[str] = ()
) -> TrainingPlan:
    """Decide what trains.

    With LoRA, the tower (and under "all" the language model) take low-rank updates on their linear layers, and the
    projector, where it trains, trains its own weights: it is small.

    Args:
        adapter: of the model's family.
        train: which parts.
        lora: a rank, a peft config (its `target_modules` are filled in where it has none), or None.
        frozen: paths of modules that stay as they are.

    Raises:
        ModelError: if a part has nothing that could train.
        SettingsError: for a rank below 1, or a frozen module that is not there.
    """
    modules = {path for path, _ in adapter.model.named_modules()}
    if absent := [path for path in frozen if path not in modules]:
        raise SettingsError(
            f"frozen names {absent[0]!r}, which {type(adapter.model).__name__} does not have.",
            f"Its projector is {', '.join(adapter.projector_paths) or 'unknown'}; model.named_modules() lists all.",
        )
    _refuse_quantised(adapter, TRAINED_PARTS[train])
    # the projector alone is small, and trains its own weights whatever rank is given
    if lora is None or train == "projector":
        return _of_weights(adapter, train, frozen)
    if isinstance(lora, bool) or (isinstance(lora, int) and lora < 1):
        raise SettingsError(f"lora is {lora!r}.", "Give a rank of 1 or more, a peft LoraConfig, or None.")
    return _of_lora(adapter, train, lora, frozen)


def _refuse_quantised(adapter: VisionAdapter, parts: Sequence[str]) -> None:
    """Refuse to train what is quantised: a LoRA could not be merged into it, nor an encoder be made of it."""
    for name, parameter in adapter.model.named_parameters():
        part = adapter.part_of(name)
        if part in parts and not parameter.is_floating_point():
            path = adapter.tower_path if part == "encoder" else name.rpartition(".")[0]
            raise ModelError(
                f"The {part.replace('_', ' ')} of this {type(adapter.model).__name__} should train and is quantised "
                f"({name} is {parameter.dtype}).",
                f"Load it as it is: with bitsandbytes llm_int8_skip_modules=[{path!r}, ...] of the BitsAndBytesConfig. "
                "Parts that do not train may stay quantised.",
            )


def _of_weights(adapter: VisionAdapter, train: Train, frozen: Sequence[str]) -> TrainingPlan:
    """The plan in which weights train themselves."""
    parts = TRAINED_PARTS[train]
    parameters = [
        name
        for name, _ in adapter.model.named_parameters()
        if adapter.part_of(name) in parts and adapter.is_trainable(name) and not is_inside(name, frozen)
    ]
    if not parameters:
        raise ModelError(
            f"Nothing of {type(adapter.model).__name__} trains with train={train!r}.", "Train another part."
        )
    return TrainingPlan(parts, None, tuple(parameters))


def _of_lora(adapter: VisionAdapter, train: Train, lora: int | LoraConfig, frozen: Sequence[str]) -> TrainingPlan:
    """The plan in which LoRA trains, and beside it the projector where it is asked for."""
    parts = TRAINED_PARTS[train]
    targets = adapter.lora_targets() if "encoder" in parts else []
    if "language_model" in parts:
        head = adapter.model.get_output_embeddings()
        targets += [
            path
            for path, module in adapter.model.named_modules()
            if isinstance(module, nn.Linear) and module is not head and adapter.part_of(path) == "language_model"
        ]
    saved = _trained_modules(adapter, frozen) if "projector" in parts else []
    if "projector" in parts and not saved:
        raise ModelError(
            f"No projector is known in {type(adapter.model).__name__}.",
            'Use train="encoder", or an adapter that names it in projector_names.',
        )
    config = LoraConfig(r=lora, lora_alpha=2 * lora) if isinstance(lora, int) else copy.deepcopy(lora)
    if config.target_modules is None:
        config.target_modules = [path for path in targets if adapter.is_trainable(path) and not is_inside(path, frozen)]
    if config.modules_to_save is None and saved:
        config.modules_to_save = saved
    return TrainingPlan(parts, config, ())


def lora_settings(lora: LoraConfig) -> dict[str, Any]:
    """The settings of a LoRA as JSON has them; its sets in order, which differs from process to process."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in lora.to_dict().items()}


def is_inside(name: str, paths: Sequence[str]) -> bool:
    """Whether a module or parameter is one of some modules, or a part of one."""
    return any(f"{name}.".startswith(f"{path}.") for path in paths)


def _trained_modules(adapter: VisionAdapter, frozen: Sequence[str]) -> list[str]:
    """The projector's modules that train: whole ones, or the parts of one in which something is frozen."""
    if not frozen:
        return list(adapter.projector_paths)
    return [
        path
        for path, module in adapter.model.named_modules()
        if adapter.part_of(path) == "projector"
        and is_inside(path, adapter.projector_paths)
        and next(module.parameters(recurse=False), None) is not None
        and not is_inside(path, frozen)
    ]


def count_parameters(adapter: VisionAdapter, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Per part, how many parameters train and how many there are (LoRA counted in both).

    Args:
        adapter: of the model's family.
        model: the model, or the peft model around it.
    """
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        part = adapter.part_of(original_name(name))
        trained, total = counts[part]
        counts[part] = (trained + parameter.numel() * parameter.requires_grad, total + parameter.numel())
    return counts


def places_of_parts(adapter: VisionAdapter) -> dict[str, str]:
    """Per part, which modules of a model count as it; a projector inside the tower is named as left out of that.

    Args:
        adapter: of the model's family.

    Returns:
        paths of the outermost modules, and names of parameters that stand beside them, "none" where there are none.
    """
    model, tower = adapter.model, adapter.tower_path
    places: dict[str, list[str]] = {part: [] for part in PARTS}
    whole: list[str] = []
    for path, module in model.named_modules():
        if not path or is_inside(path, whole):
            continue
        parts = {adapter.part_of(original_name(f"{path}.{name}")) for name, _ in module.named_parameters()}
        if len(parts) == 1:
            whole.append(path)
            places[parts.pop()].append(path)
    for name, _ in model.named_parameters():
        if not is_inside(name, whole):
            places[adapter.part_of(name)].append(name)
    inside = [path for part in PARTS if part != "encoder" for path in places[part] if is_inside(path, [tower])]
    if inside:
        outside = [path for path in places["encoder"] if not is_inside(path, [tower])]
        places["encoder"] = [f"{tower} without {' and '.join(inside)}", *outside]
    return {part: ", ".join(paths) or "none" for part, paths in places.items()}


def original_name(name: str) -> str:
    """The name a parameter of a peft model had, or that of the layer its LoRA belongs to."""
    name = name.removeprefix("base_model.model.")
    for wrapper in (".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(wrapper, "")
    return name.split(".lora_")[0]


def weight_change(adapter: VisionAdapter, before: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative change of the tower's weights, ||after - before|| / ||before||, per block in order.

    Args:
        adapter: of the model, whose weights are those after.
        before: tensors of the tower as they were, by full parameter name; one that is missing did not change.
    """
    blocks = adapter.blocks()
    change: dict[str, list[float]] = {}
    for name, parameter in adapter.model.named_parameters():
        if adapter.part_of(name) != "encoder":
            continue
        block = next((path for path in blocks if name.startswith(f"{path}.")), f"{adapter.tower_path} (other)")
        squares = change.setdefault(block, [0.0, 0.0])
        old = before.get(name, parameter.detach()).to(device=parameter.device, dtype=torch.float32)
        squares[0] += (parameter.detach().float() - old).square().sum().item()
        squares[1] += old.square().sum().item()
    return {block: (moved / size) ** 0.5 if size else 0.0 for block, (moved, size) in change.items()}


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
