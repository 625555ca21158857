"""Encoders: out of an MLLM, onto disk, back, and into another MLLM."""

from .graft import extract_encoder, graft
from .store import load_encoder, save_encoder

__all__ = ["extract_encoder", "graft", "load_encoder", "save_encoder"]
