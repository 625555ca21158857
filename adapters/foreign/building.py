"""transformers' class around a repository's tensors, each in its place or a refusal: never a random weight."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from pivot_plugin.errors import ModelError

from .names import Binding, NameTable
from .weights import FolderWeights, ObjectWeights, Weights, some

_OF_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}


@dataclass(frozen=True)
class Elsewhere:
    """A part of a model whose tensors the repository does not keep in the checkpoint itself.

    Attributes:
        path: of it in the model.
        load: gives its tensors by their names within it.
    """

    path: str
    load: Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Plan:
    """What a repository's model is in transformers' words.

    Attributes:
        model_class: transformers' own.
        config: of it.
        table: of names.
        elsewhere: the part that the checkpoint does not hold, None where it is whole.
        back: settings that the repository's configuration needs in order to read all tensors that are written back.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    table: NameTable
    elsewhere: Elsewhere | None = None
    back: dict[str, Any] = field(default_factory=dict)


def build(plan: Plan, weights: Weights, filled: bool = True) -> tuple[PreTrainedModel, list[Binding]]:
    """The model around a repository's tensors, in eval mode.

    Args:
        plan: what it is.
        weights: its tensors. Those of an object become the model's own parameters; pieces of a fused one are views of
            its memory where they can be.
        filled: whether the tensors are wanted; without them the model stays on the meta device.

    Returns:
        the model, and which of its tensors are which of the repository's.

    Raises:
        ModelError: naming and counting tensors that are missing, left over or of another shape.
    """
    with init_empty_weights():
        model = plan.model_class(plan.config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    bindings = _bindings(plan, weights, expected, dict(model.all_tied_weights_keys))
    if filled:
        _fill(model, plan, weights, bindings, expected)
        still_empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if still_empty:
            raise ModelError(
                f"{len(still_empty)} tensors of {weights.label!r} did not reach the {plan.model_class.__name__}: "
                f"{some(still_empty)}.",
                "This is a fault of the name table; please report it.",
            )
    source = weights.label if isinstance(weights, FolderWeights) else weights.config.get("_name_or_path")
    model.config._name_or_path = model.name_or_path = str(source or "")
    if weights.folder is not None and weights.folder.parent.name == "snapshots":
        # of the Hub's cache, where a folder is called after its commit
        model.config._commit_hash = weights.folder.name
    _set_generation(model, weights)
    return model.eval(), bindings


def _bindings(
    plan: Plan, weights: Weights, expected: dict[str, tuple[int, ...]], tied: dict[str, str]
) -> list[Binding]:
    """Which tensors are which; all of them, or a refusal."""
    bindings, left_over = [], []
    for name in weights.names:
        if plan.table.is_computed(name):
            continue
        binding = plan.table.by_theirs(name)
        if binding is None or not all(ours in expected for ours in binding.ours):
            left_over.append(name)
        else:
            bindings.append(binding)
    reached = {ours for binding in bindings for ours in binding.ours}
    if plan.elsewhere is not None:
        reached |= {name for name in expected if name.startswith(f"{plan.elsewhere.path}.")}
    missing = [_their_name(plan.table, name) for name in expected if name not in reached and name not in tied]
    missing = list(dict.fromkeys(missing))
    if missing or left_over:
        findings = []
        if missing:
            findings.append(f"{len(missing)} tensors are missing: {some(missing)}")
        if left_over:
            findings.append(f"{len(left_over)} tensors are left over: {some(left_over)}")
        raise ModelError(
            f"The tensors of {weights.label!r} are not those of a {plan.model_class.__name__} with its configuration: "
            f"{'; '.join(findings)}.",
            "Download or save the checkpoint again, whole; if its class has parts of its own, write a plugin with the "
            "hook pivot_model.",
        )
    return bindings


def _their_name(table: NameTable, ours: str) -> str:
    binding = table.by_ours(ours)
    return binding.theirs if binding else ours


def _fill(
    model: PreTrainedModel,
    plan: Plan,
    weights: Weights,
    bindings: list[Binding],
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Put the tensors into the model."""
    state: dict[str, torch.Tensor] = {}
    if plan.elsewhere is not None:
        state = {f"{plan.elsewhere.path}.{name}": tensor for name, tensor in plan.elsewhere.load().items()}
    flags: dict[str, bool] = {}
    wrong_shapes = []
    is_object = isinstance(weights, ObjectWeights)
    with weights.reading() as get:
        for binding in bindings:
            tensor = get(binding.theirs)
            try:
                pieces = (tensor,) if len(binding.ours) == 1 else binding.cut.pieces(tensor.detach())
            except RuntimeError:
                wrong_shapes.append(f"{binding.theirs} has shape {tuple(tensor.shape)}")
                continue
            for ours, piece in zip(binding.ours, pieces, strict=True):
                if tuple(piece.shape) != expected[ours]:
                    wrong_shapes.append(
                        f"{binding.theirs} has shape {tuple(tensor.shape)}, its share {ours} should have "
                        f"{expected[ours]}"
                        if len(pieces) > 1
                        else f"{binding.theirs} has shape {tuple(tensor.shape)} instead of {expected[ours]}"
                    )
                flags[ours] = tensor.requires_grad
                # tensors that were read from a file have their memory to themselves
                state[ours] = piece if is_object or piece is tensor else piece.clone()
    if wrong_shapes:
        raise ModelError(
            f"{len(wrong_shapes)} tensors of {weights.label!r} have other shapes than its configuration says: "
            f"{some(wrong_shapes)}.",
            "Look whether config.json belongs to these weights.",
        )
    if not is_object:
        dtype = _precision(plan.config, state)
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if is_object:
        # assigning switches gradients on, also on the object's own parameters
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))
    device = next(model.parameters()).device
    move_buffers(model, device)
    for config in (model.config, model.config.get_text_config(), getattr(model.config, "vision_config", None)):
        if config is not None:
            config.dtype = model.dtype


def _precision(config: PreTrainedConfig, state: dict[str, torch.Tensor]) -> torch.dtype:
    """What the configuration says, else that of the first weight."""
    named = getattr(config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named, None)
    if isinstance(named, torch.dtype):
        return named
    return next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put what the classes compute themselves beside the weights."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _set_generation(model: PreTrainedModel, weights: Weights) -> None:
    """How the repository's model generates, where it says so."""
    generation: Any = getattr(getattr(weights, "model", None), "generation_config", None)
    folder: Path | None = weights.folder
    if generation is None and folder is not None and (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    if not isinstance(generation, GenerationConfig):
        return
    settings = generation.to_dict()
    if not settings.get("do_sample"):
        # published checkpoints have a temperature and take the likeliest token; such settings cannot be saved
        settings = {name: value for name, value in settings.items() if name not in _OF_SAMPLING}
    model.generation_config = GenerationConfig.from_dict(settings)
