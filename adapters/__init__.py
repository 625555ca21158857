"""Family adapters: what teaches this package one MLLM family. The built-in ones come in through the same hook as yours.

Read `VisionAdapter` in `base.py`: it is the whole contract.
"""

from .base import VisionAdapter
from .grids import ImageFeatures

__all__ = ["ImageFeatures", "VisionAdapter"]
