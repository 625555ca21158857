"""What tests of this package, and of plugins for it, share.

families.py       tiny models of the families that have adapters here, with their real processors
zoo.py, zoo_*.py  tiny models of all other families of transformers, and what was found of each
kit.py            the conformance kit: every promise of the adapter contract, tried on a model
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .families import FAMILIES, TinyFamily, build

if TYPE_CHECKING:
    from .kit import Check, conformance

__all__ = ["FAMILIES", "Check", "TinyFamily", "build", "conformance"]


def __getattr__(name: str) -> object:
    # the kit uses trainers and probes, which tiny models do not need
    if name in ("Check", "conformance"):
        return getattr(import_module(".kit", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
