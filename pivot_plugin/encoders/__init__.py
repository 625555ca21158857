"""Encoders: out of an MLLM, onto disk, onto the Hub, back, and into another MLLM.

towers.py extraction.py              extract and graft, in memory; extract into a folder, compared with a base
assemble.py                          an MLLM made of an encoder and a language model
store.py record.py signature.py      the folder: written, its provenance, and how a copy is known
compatibility.py                     names and settings that every release of transformers reads
exporting/                           the encoder as timm, LLaVA-NeXT and InternVL read it
card.py                              the model card
contents.py plain.py                 what of a folder is read, and what its plain values may be
loading.py verification.py           read and checked
outgoing.py publishing.py hub.py     what goes out, and onto the Hub
downloading.py listing.py            from the Hub
secrets.py                           what is shown of its errors

A name is imported when it is first used: who loads an encoder needs nothing of what publishes one.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .exporting import Exported, export
    from .extraction import Extraction, TowerChange, extract
    from .listing import list_encoders
    from .loading import load_encoder
    from .publishing import Publication, PublishOptions, publish
    from .record import Origin
    from .store import save_encoder, save_lora
    from .towers import extract_encoder, graft
    from .verification import Verification, verify

__all__ = [
    "Exported",
    "Extraction",
    "Origin",
    "Publication",
    "PublishOptions",
    "TowerChange",
    "Verification",
    "export",
    "extract",
    "extract_encoder",
    "graft",
    "list_encoders",
    "load_encoder",
    "publish",
    "save_encoder",
    "save_lora",
    "verify",
]

_MODULE_OF = {
    "Exported": "exporting",
    "Extraction": "extraction",
    "TowerChange": "extraction",
    "extract": "extraction",
    "Origin": "record",
    "Publication": "publishing",
    "PublishOptions": "publishing",
    "Verification": "verification",
    "export": "exporting",
    "extract_encoder": "towers",
    "graft": "towers",
    "list_encoders": "listing",
    "load_encoder": "loading",
    "publish": "publishing",
    "save_encoder": "store",
    "save_lora": "store",
    "verify": "verification",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
