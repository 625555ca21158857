"""Encoders: out of an MLLM, onto disk, onto the Hub, back, and into another MLLM."""

from .listing import list_encoders
from .loading import load_encoder
from .publishing import Publication, publish
from .record import Origin
from .store import save_encoder, save_lora
from .towers import extract_encoder, graft
from .verification import Verification, verify

__all__ = [
    "Origin",
    "Publication",
    "Verification",
    "extract_encoder",
    "graft",
    "list_encoders",
    "load_encoder",
    "publish",
    "save_encoder",
    "save_lora",
    "verify",
]
