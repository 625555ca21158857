"""Encoders: out of an MLLM, onto disk, back, and into another MLLM."""

from .store import load_encoder, save_encoder
from .towers import extract_encoder, graft

__all__ = ["extract_encoder", "graft", "load_encoder", "save_encoder"]
