"""What a run costs: time, memory, and floating-point operations by the usual estimate.

A pass of T tokens through N parameters is 2NT operations forward and as many backward for the gradient of the
activations; where the weights themselves train, as many again (Kaplan et al. 2020, section 2.1). Attention's quadratic
part is left out.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pivot_plugin.adapters import VisionAdapter


@dataclass
class Cost:
    """What was spent, on this process.

    Attributes:
        seconds: from the first look at the data to the last measurement.
        tower_tokens: patches, class and register tokens that went through the vision tower.
        language_tokens: tokens that went through the language model.
        flops: floating-point operations of both, estimated.
        peak_memory: bytes; of the GPU where there is one, else of the process.
        device: "cuda" or "cpu".
    """

    seconds: float = 0.0
    tower_tokens: int = 0
    language_tokens: int = 0
    flops: float = 0.0
    peak_memory: int = 0
    device: str = "cpu"


@contextmanager
def metered(adapter: VisionAdapter) -> Iterator[Cost]:
    """Count what passes through a model meanwhile.

    Args:
        adapter: of the model.
    """
    cost, started = Cost(), time.monotonic()
    parts: list[tuple[str, nn.Module]] = [
        ("tower_tokens", adapter.tower),
        ("language_tokens", adapter.model.get_decoder()),
    ]
    # LoRA inside does not count, nor do embeddings, which are looked up
    sizes = {name: sum(p.numel() for p in module.parameters() if p.ndim > 1) for name, module in parts}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
            if not isinstance(hidden, torch.Tensor):
                return
            tokens = hidden.shape[:-1].numel()
            trains = any(p.requires_grad and p.ndim > 1 for n, p in module.named_parameters() if "lora_" not in n)
            passes = 1 if not torch.is_grad_enabled() else 3 if trains else 2
            setattr(cost, name, getattr(cost, name) + tokens)
            cost.flops += 2.0 * sizes[name] * tokens * passes

        return hook

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    hooks = [module.register_forward_hook(count(name)) for name, module in parts]
    try:
        yield cost
    finally:
        for hook in hooks:
            hook.remove()
        cost.seconds = time.monotonic() - started
        on_gpu = adapter.model.device.type == "cuda"
        cost.device = "cuda" if on_gpu else "cpu"
        # kilobytes everywhere but on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        cost.peak_memory = torch.cuda.max_memory_allocated() if on_gpu else of_process


def tower_facts(adapter: VisionAdapter) -> dict[str, object]:
    """Size and depth of a vision tower, for the account of what a run costs."""
    config = adapter.tower.config
    sizes = [getattr(config, name, None) for name in ("image_size", "patch_size")]
    image, patch = (size[0] if isinstance(size, list | tuple) else size for size in sizes)
    return {
        "parameters": sum(p.numel() for p in adapter.tower.parameters()),
        "model_type": config.model_type,
        "patches": (int(image) // int(patch)) ** 2 if image and patch else None,
    }
