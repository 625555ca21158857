"""A model before training: the weights that may change, and the state that training switches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from pivot_plugin.adapters import VisionAdapter

from .plan import TrainingPlan


def trainable_weights(adapter: VisionAdapter, plan: TrainingPlan) -> dict[str, torch.Tensor]:
    """Copies, on the host, of the model's own weights that a run may change."""
    own = set(plan.parameters)

    def may_change(name: str) -> bool:
        if plan.lora is None:
            return name in own
        saved = plan.lora.modules_to_save or []
        # target_modules may be a user's: full names, ends of names, or a pattern, as peft understands them
        in_target = check_target_module_exists(plan.lora, name.rpartition(".")[0])
        return bool(in_target) or any(f".{path}." in f".{name}" for path in saved)

    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in adapter.model.named_parameters()
        if may_change(name)
    }


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether a model recomputes its activations in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def restored_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """Leave a model in the state a user expects: trained after success, exactly as it was after a failure.

    What training switches on (patched forward, gradient flags, dropout, pad tokens, checkpointing) is switched back in
    both cases. Weights are the caller's to put back.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    dropout = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    forward = model.__dict__.get("forward")
    checkpointing = is_checkpointing(model)
    text_config = model.config.get_text_config()
    pads = (text_config.pad_token_id, model.generation_config.pad_token_id)
    use_cache = getattr(text_config, "use_cache", None)
    tags, device = model.model_tags, model.device
    modules = dict(model.named_modules())
    wrapped = hasattr(model, "peft_config")
    failed = True
    try:
        yield
        failed = False
    finally:
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        if forward is not None:
            model.forward = forward
        if not checkpointing and is_checkpointing(model):
            # transformers 5.23 renamed gradient to activation checkpointing
            getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        model.disable_input_require_grads()
        if failed:
            _put_back(modules)
            if not wrapped:
                # peft's mark on a model that it has wrapped
                model.__dict__.pop("peft_config", None)
            model.to(device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, True))
        for name, module in model.named_modules():
            module.training = training.get(name, False)
            if name in dropout:
                module.p = dropout[name]
        text_config.pad_token_id, model.generation_config.pad_token_id = pads
        if use_cache is not None:
            text_config.use_cache = use_cache
        model.model_tags = tags


def _put_back(modules: dict[str, nn.Module]) -> None:
    """Undo whatever wrapped or replaced modules of a model, given all of them by path as they were."""
    for path, module in modules.items():
        parent, _, child = path.rpartition(".")
        if path and modules[parent]._modules.get(child) is not module:
            modules[parent]._modules[child] = module
