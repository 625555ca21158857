"""What the family adapter sees in a model, from its configuration alone."""

from typing import Any

from PIL import Image

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.errors import ModelError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.image_tokens import ImageTokens
from pivot_plugin.models.loading import empty_model, load_processor

from .forward import reading_of
from .plan import count_parameters, places_of_parts


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
    counts = count_parameters(adapter, model)
    reason = reading_of(model).no_trees
    return {
        "model": type(model).__name__,
        "family": adapter.family,
        "vision tower": f"{type(adapter.tower).__name__} at {adapter.tower_path}",
        "tower parameters": f"{counts['encoder'][1]:,}",
        "counts as": [f"{part}: {paths}" for part, paths in places_of_parts(adapter).items()],
        "other towers": list(adapter.other_tower_paths) or "none",
        "features in use": "the tower's output" if layer is None else f"hidden state {layer} of {len(blocks)} blocks",
        "never reached": list(adapter.unread_paths()) or "nothing",
        "LoRA": _by_kind(targets, blocks),
        "projector": list(adapter.projector_paths) or "none found",
        "language model": f"{sum(p.numel() for p in model.get_decoder().parameters()):,} parameters",
        "image tokens": _image_tokens(name, adapter),
        "prefix forest": "yes" if reason is None else f"no, one sequence per row: {reason}",
    }


def _by_kind(targets: list[str], blocks: list[str]) -> list[str]:
    """LoRA targets, those that differ only in their block on one line."""
    counts: dict[str, int] = {}
    for target in targets:
        block = next((path for path in blocks if target.startswith(f"{path}.")), None)
        pattern = target if block is None else f"{block.rpartition('.')[0]}.*{target.removeprefix(block)}"
        counts[pattern] = counts.get(pattern, 0) + 1
    return [f"{pattern} ({count})" for pattern, count in counts.items()]


def _image_tokens(name: str, adapter: VisionAdapter) -> list[str] | str:
    try:
        processor = load_processor(name)
    except ModelError:
        return "unknown: no processor found"
    image_tokens = ImageTokens(processor, adapter.image_token_id)
    facts = []
    for size in ((336, 336), (672, 336), (1024, 768)):
        counts = image_tokens.process_images([[Image.new("RGB", size)]]).counts[0]
        facts.append(f"{sum(counts)} for {size[0]}x{size[1]} px")
    return facts
