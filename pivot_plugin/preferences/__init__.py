"""Preference pairs in one normal form, TRL's conversational vision layout, checked before anything expensive."""

from .images import open_image
from .pairs import PairDataset, PairStream, load_pairs
from .split import hold_out

__all__ = ["PairDataset", "PairStream", "hold_out", "load_pairs", "open_image"]
