"""Where a run comes from, in words that may be published: no path of the machine it ran on."""

from importlib.metadata import version
from pathlib import Path

from pivot_plugin import __version__
from pivot_plugin.adapters import VisionAdapter

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub")


def plain_name(source: object) -> str:
    """A Hub id as it is, of a local path its last part, and nothing for what has no name."""
    text = str(source) if isinstance(source, str | Path) else ""
    path = Path(text)
    if not text or path.is_absolute() or text.startswith((".", "~")) or path.exists():
        return path.name
    return text


def versions() -> dict[str, str]:
    """Of this package and of the libraries that decide what it computes."""
    return {"pivot_plugin": __version__} | {name: version(name) for name in LIBRARIES}


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
