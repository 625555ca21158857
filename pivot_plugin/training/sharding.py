"""In and out of models whose weights are divided among processes, and what every process must do alike.

Engines are accelerate's: DDP, FSDP2 and DeepSpeed's ZeRO-1 to 3. Under FSDP2 and ZeRO-3 a weight is whole only inside
a forward pass. Before training the model is whole in every process (`undivided`), for the forest check, the reference
pass and the fingerprint. After it `gather` makes an ordinary model of it again, whose weights are in the main process
alone, one parameter at a time.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import TowerConfig
from pivot_plugin.errors import SettingsError, unknown

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)
_OF_ENGINES = ("torch.distributed.fsdp", "torch.distributed._composable", "deepspeed")


def check_engine(config: TowerConfig) -> None:
    """Refuse a launch whose engine would not run as it was asked for.

    Args:
        config: of the trainer, made in the process that was launched.

    Raises:
        SettingsError: for FSDP 1, and for FSDP or DeepSpeed where plain data parallelism would run in their place.
    """
    state = config.distributed_state
    if state is None or state.num_processes == 1:
        return
    fsdp = _says("ACCELERATE_USE_FSDP")
    deepspeed = _says("ACCELERATE_USE_DEEPSPEED")
    if fsdp and os.environ.get("FSDP_VERSION", "1") == "1":
        raise SettingsError(
            "FSDP 1 is asked for, which gives no whole encoder.", "Use fsdp_version: 2 (TRL's fsdp2), zero2 or zero3."
        )
    if (fsdp or deepspeed) and (config.use_cpu or state.distributed_type == DistributedType.MULTI_CPU):
        raise SettingsError(
            f"{'FSDP' if fsdp else 'DeepSpeed'} is asked for, and with use_cpu accelerate runs DDP instead.",
            "Leave use_cpu out, or launch with multi_cpu.",
        )


def check_divisible(model: PreTrainedModel) -> None:
    """Refuse a model that the launch's engine cannot take.

    Args:
        model: whole, before training.

    Raises:
        SettingsError: for one that a device map has spread, for quantised weights under an engine that divides them,
            and for layers to be divided that the model does not have.
    """
    devices = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if len(devices) > 1:
        raise SettingsError(
            f"A device map has spread {type(model).__name__} over {', '.join(sorted(devices))}, and every process "
            "needs a whole one.",
            "Load it without device_map, or start one process.",
        )
    fsdp = _says("ACCELERATE_USE_FSDP")
    zero3 = _says("ACCELERATE_USE_DEEPSPEED") and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    if (fsdp or zero3) and getattr(model, "is_quantized", False):
        raise SettingsError(
            f"{type(model).__name__} has quantised weights, which {'FSDP2' if fsdp else 'ZeRO-3'} does not divide.",
            "Load it in bfloat16, or launch with multi_gpu (DDP) or zero2.",
        )
    wrapped = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "") if fsdp else ""
    classes = {type(module).__name__ for module in model.modules()}
    for name in filter(None, (name.strip() for name in wrapped.split(","))):
        if name not in classes:
            raise unknown(
                "class of layers",
                name,
                sorted(classes),
                f"fsdp_transformer_layer_cls_to_wrap names {name!r}, and {type(model).__name__} has no layers of it.",
            )


def _says(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights are divided among processes (FSDP, ZeRO-3)."""
    deepspeed = accelerator.state.deepspeed_plugin
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    return fsdp is not None or (deepspeed is not None and deepspeed.zero_stage == 3)


def as_it_is(model: nn.Module) -> AbstractContextManager[None]:
    """Compute with a model meanwhile, whether an engine has divided it by now or not."""
    return nullcontext() if is_divided(model) else undivided()


def is_divided(model: nn.Module) -> bool:
    """Whether this process lacks weights of a model, because an engine has divided or the main process gathered it."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") or p.is_meta for p in model.parameters())


@contextmanager
def undivided() -> Iterator[None]:
    """Load and build models meanwhile as a process by itself does: whole, with all their weights."""
    from transformers.integrations import deepspeed

    name, before = "FSDP_CPU_RAM_EFFICIENT_LOADING", os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    reference = deepspeed._hf_deepspeed_config_weak_ref
    if before is not None:
        os.environ[name] = "false"
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        deepspeed._hf_deepspeed_config_weak_ref = reference


def wrap_layers(accelerator: Accelerator, adapter: VisionAdapter) -> None:
    """Tell FSDP which layers to divide by themselves, where the launch does not say: transformer blocks.

    transformers' own list of a composed model may name classes that the model does not have.

    Args:
        accelerator: of the trainer.
        adapter: of the model's family.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    # every process has the whole model, so that none need be sent it
    plugin.cpu_ram_efficient_loading = False
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layer_classes(adapter)


def layer_classes(adapter: VisionAdapter) -> list[str]:
    """Names of the classes of transformer blocks, of the tower and of the language model."""
    blocks = [adapter.model.get_submodule(path) for path in adapter.blocks()]
    return sorted({type(block).__name__ for block in [*blocks, *decoder_blocks(adapter.model)]})


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks of a model's language model."""
    layers = [module for module in model.get_decoder().children() if isinstance(module, nn.ModuleList)]
    return [block for one in layers for block in one]


# In a forward pass


@contextmanager
def whole_head(model: PreTrainedModel) -> Iterator[None]:
    """Have the language model's head whole meanwhile, with a gradient that is averaged over processes.

    TRL's fused head reads the head's weight without calling the head, so that FSDP2 does not gather it, and gathers it
    by `full_tensor()`, which takes every process's gradient for the gradient of all.

    Args:
        model: in whose forward pass the head is read.
    """
    head = model.get_output_embeddings()
    divided = {
        name: parameter
        for name, parameter in (head._parameters.items() if head is not None else ())
        if isinstance(parameter, DTensor)
    }
    for name, parameter in divided.items():
        # found before the module's parameters are looked at
        head.__dict__[name] = _Averaged.apply(parameter.full_tensor(grad_placements=[Partial()]))
    try:
        yield
    finally:
        for name in divided:
            del head.__dict__[name]


class _Averaged(torch.autograd.Function):
    """A tensor as it is, its gradient divided by the number of processes that will be summed."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient / torch.distributed.get_world_size()


@contextmanager
def through_tower(model: PreTrainedModel, blank: Mapping[str, Any]) -> Iterator[None]:
    """Send a blank image through tower and projector meanwhile, and add zero times what comes out to the embeddings.

    A process whose batch shows no image would leave out what the others compute: FSDP and ZeRO wait for it to take part
    in gathering the tower's weights, DDP for its gradients, all in the same order. MLLMs embed their tokens, encode
    their images and put both together; so it is done here, which gives backward passes one order too.

    Args:
        model: the MLLM.
        blank: processor outputs of a blank image, where the model is and in its precision; empty for nothing.
    """
    if not blank:
        yield
        return
    encode = model.base_model.get_image_features
    names = inspect.signature(encode).parameters

    def add(module: nn.Module, args: Any, embeddings: torch.Tensor) -> torch.Tensor:
        features = encode(**{name: value for name, value in blank.items() if name in names})
        for tensor in _tensors([features.pooler_output, getattr(features, "deepstack_features", None)]):
            embeddings = embeddings + (0.0 * tensor).sum().to(embeddings.dtype)
        return embeddings

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


# Gradients


def total_norm(gradients: Sequence[torch.Tensor]) -> float:
    """Norm of gradients, over all processes where they are divided; every process takes part."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def has_gradient(parameter: nn.Parameter) -> bool:
    """Whether any number of this process's share of a gradient is not zero."""
    if parameter.grad is None:
        return False
    local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
    return bool(local.numel()) and bool(local.abs().max() > 0)


def anywhere(flags: Sequence[bool], accelerator: Accelerator) -> list[bool]:
    """For each flag, whether it is set in any process; to be called by all of them."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = accelerator.reduce(torch.tensor([float(flag) for flag in flags], device=accelerator.device), "sum")
    return [bool(count > 0) for count in counts.tolist()]


# After training


def gather(model: nn.Module, accelerator: Accelerator, engine: Any = None) -> None:
    """Make an ordinary model, on the host, of one whose weights are divided; one parameter is whole at a time.

    In the main process it has its weights, elsewhere it is empty (on the meta device). To be called by every process.

    Args:
        model: in training so far.
        accelerator: of its trainer.
        engine: DeepSpeed's, where it trains with it.
    """
    sharded = is_sharded(accelerator)
    if engine is not None and hasattr(engine, "destroy"):
        # its hooks would gather and divide what is plain by then
        engine.destroy()
    if not sharded:
        return
    _unwrap(model)
    plain: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in plain:
                plain[id(parameter)] = nn.Parameter(
                    _full(parameter, accelerator.is_main_process), requires_grad=parameter.requires_grad
                )
                # its number belongs to it while it lives
                plain[id(parameter)]._divided = parameter  # type: ignore[attr-defined]
            module._parameters[name] = plain[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("cpu" if accelerator.is_main_process else "meta")
    for parameter in plain.values():
        del parameter._divided  # type: ignore[attr-defined]


def refuse_use(model: PreTrainedModel) -> None:
    """Have a model whose weights the main process has say so, instead of computing or saving nothing.

    Args:
        model: gathered and merged; one that has its weights stays as it is.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise SettingsError(
            f"This process has no weights of the trained {type(model).__name__}: an engine had divided them, and the "
            "main process has put them together.",
            "Use the result in the main process (accelerate's is_main_process), or load what it has saved.",
        )

    for module in model.modules():
        module.register_forward_pre_hook(refuse)
        module.register_state_dict_pre_hook(refuse)


def _full(parameter: torch.Tensor, keep: bool) -> torch.Tensor:
    """The whole of one parameter on the host where it is kept, an empty one elsewhere."""
    with _partitioned(parameter):
        value = parameter.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.to("cpu", copy=True) if keep else torch.empty_like(whole, device="meta")


def _partitioned(parameter: torch.Tensor) -> Any:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed  # type: ignore[import-untyped,import-not-found,unused-ignore]

    return deepspeed.zero.GatheredParameters([parameter])


def _unwrap(model: nn.Module) -> None:
    """Take away the classes and hooks that FSDP2 and DeepSpeed have given to modules."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__mro__[2]  # type: ignore[assignment]
        for name in _HOOKS:
            hooks = getattr(module, name)
            for key in [key for key, hook in hooks.items() if _is_of_engine(hook)]:
                del hooks[key]
        module._parameters = dict(module._parameters)
        # what composable APIs keep of a module, and the methods that FSDP2 has wrapped
        for name in [name for name in module.__dict__ if name.startswith("__composable")]:
            del module.__dict__[name]
        for name, value in list(module.__dict__.items()):
            if callable(value) and _is_of_engine(getattr(value, "__func__", value)):
                del module.__dict__[name]


def _is_of_engine(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    inner = getattr(hook, "hook", hook)
    owner = getattr(inner, "__module__", "") or ""
    return owner.startswith(_OF_ENGINES)
