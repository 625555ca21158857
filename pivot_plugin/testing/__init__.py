"""What tests of this package, and of plugins for it, share: tiny models of every family with their real processors."""

from .families import FAMILIES, TinyFamily, build

__all__ = ["FAMILIES", "TinyFamily", "build"]
