"""What the family adapter sees in a model, from its configuration alone."""

from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.data.layout import normalise
from pivot_plugin.errors import ModelError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import empty_model, load_processor

from .batch import ForestCollator
from .forward import takes_trees


def inspect_model(name: str) -> dict[str, Any]:
    """Facts about a model that matter for training its vision tower. No weights are loaded.

    Args:
        name: folder or Hub id.

    Returns:
        Readable facts by name; lists where there are several.

    Raises:
        ModelError: if there is no such model, or no adapter knows it.
    """
    model = empty_model(name)
    adapter = find_adapter(model)
    targets = adapter.lora_targets()
    layer = adapter.feature_layer
    blocks = adapter.blocks()
    reason = takes_trees(model)
    return {
        "model": type(model).__name__,
        "family": adapter.family,
        "vision tower": f"{type(adapter.tower).__name__} at {adapter.tower_path}",
        "tower parameters": f"{sum(p.numel() for p in adapter.tower.parameters()):,}",
        "features in use": "the tower's output" if layer is None else f"hidden state {layer} of {len(blocks)} blocks",
        "never reached": list(adapter.unread_paths()) or "nothing",
        "LoRA": _by_kind(targets, blocks),
        "projector": list(adapter.projector_paths) or "none found",
        "language model": f"{sum(p.numel() for p in model.get_decoder().parameters()):,} parameters",
        "image tokens": _image_tokens(name, model, adapter),
        "prefix forest": "yes" if reason is None else f"no, one sequence per row: {reason}",
    }


def _by_kind(targets: list[str], blocks: list[str]) -> list[str]:
    """LoRA targets, those that differ only in their block on one line."""
    kinds: dict[str, int] = {}
    for target in targets:
        block = next((path for path in blocks if target.startswith(f"{path}.")), None)
        kind = target if block is None else f"{block.rpartition('.')[0]}.*{target.removeprefix(block)}"
        kinds[kind] = kinds.get(kind, 0) + 1
    return [f"{kind} ({count})" for kind, count in kinds.items()]


def _image_tokens(name: str, model: PreTrainedModel, adapter: VisionAdapter) -> list[str] | str:
    try:
        processor = load_processor(name)
    except ModelError:
        return "unknown: no processor found"
    facts = []
    for size in ((336, 336), (672, 336), (1024, 768)):
        row = {"images": [Image.new("RGB", size)], "prompt": "?", "chosen": "a", "rejected": "b"}
        pair = {**normalise(row, "probe"), "image_key": "probe"}
        with torch.no_grad():
            batch = ForestCollator(processor, adapter.image_token_id)([pair])
        facts.append(f"{sum(batch['forest'].image_tokens)} for {size[0]}x{size[1]} px")
    return facts
