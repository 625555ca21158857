"""A model before training: the weights that may change, and the state that training switches."""

from collections.abc import Mapping

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from pivot_plugin.adapters import VisionAdapter

from .plan import TrainingPlan

# a setting that a configuration does not have, which is another than None in its fingerprint
_ABSENT = object()


@torch.no_grad()
def put_back(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a model weights that it had before; its parameters stay the same tensors.

    Args:
        model: changed in place.
        weights: by the names of its parameters, of their shapes; on any device.
    """
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)


class Snapshot:
    """A model as it is before training, to be settled after success and restored after a failure.

    Args:
        adapter: of the model.
        plan: what trains.

    Attributes:
        weights: copies, on the host, of the model's own weights that a run may change, by name.
    """

    def __init__(self, adapter: VisionAdapter, plan: TrainingPlan) -> None:
        model = adapter.model
        self.weights = trainable_weights(adapter, plan)
        self._model = model
        self._requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._training = {name: module.training for name, module in model.named_modules()}
        self._dropout = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
        self._forward = model.__dict__.get("forward")
        self._checkpointing = is_checkpointing(model)
        text_config = model.config.get_text_config()
        self._pads = (getattr(text_config, "pad_token_id", None), model.generation_config.pad_token_id)
        # a trainer that checkpoints switches the cache off, in the configuration of the whole model as well
        self._use_cache = [(config, vars(config).get("use_cache", _ABSENT)) for config in (text_config, model.config)]
        self._tags, self._device = model.model_tags, model.device
        self._modules = dict(model.named_modules())
        self._wrapped = hasattr(model, "peft_config")
        inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        configs = {id(config): config for config in (text_config, *(module.config for module in inner))}
        self._attention = [(config, config._attn_implementation) for config in configs.values()]

    def settle(self) -> None:
        """Switch back what training has switched; weights, modules and device stay as training left them."""
        self._unpatch()
        self._switch_back()

    def restore(self) -> None:
        """Make the model exactly what it was: weights, modules and device as well as what training has switched."""
        self._unpatch()
        self._put_modules_back()
        if not self._wrapped:
            # peft's mark on a model that it has wrapped
            self._model.__dict__.pop("peft_config", None)
        self._model.to(self._device)
        put_back(self._model, self.weights)
        self._switch_back()

    def _unpatch(self) -> None:
        """Take away what wraps the forward pass; while the modules are still those that were trained."""
        model = self._model
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        if self._forward is not None:
            model.forward = self._forward
        if not self._checkpointing and is_checkpointing(model):
            # transformers 5.23 renamed gradient to activation checkpointing
            getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        model.disable_input_require_grads()

    def _put_modules_back(self) -> None:
        """Undo whatever has wrapped or replaced modules of the model."""
        for path, module in self._modules.items():
            parent, _, child = path.rpartition(".")
            if path and self._modules[parent]._modules.get(child) is not module:
                self._modules[parent]._modules[child] = module

    def _switch_back(self) -> None:
        """Put gradient flags, modes, dropout, pad tokens, the cache switch, tags and attention back."""
        model = self._model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, True))
        for name, module in model.named_modules():
            module.training = self._training.get(name, False)
            if name in self._dropout:
                module.p = self._dropout[name]
        text_config = model.config.get_text_config()
        text_config.pad_token_id, model.generation_config.pad_token_id = self._pads
        for config, use_cache in self._use_cache:
            if use_cache is not _ABSENT:
                config.use_cache = use_cache
            else:
                vars(config).pop("use_cache", None)
        model.model_tags = self._tags
        for config, implementation in self._attention:
            # not by set_attn_implementation, which would look for the package of flash attention
            config._attn_implementation_internal = implementation


def trainable_weights(adapter: VisionAdapter, plan: TrainingPlan) -> dict[str, torch.Tensor]:
    """Copies, on the host, of the model's own weights that a run may change."""
    trained = set(plan.parameters)

    def may_change(name: str) -> bool:
        if plan.lora is None:
            return name in trained
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
