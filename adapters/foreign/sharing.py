"""An object of another repository, trained through transformers' class around its parameters.

Most parameters are the object's own, and views of its fused ones lie in its memory: training changes the object.
Three things part them: a copy where no view can be (InternLM2's wqkv), a module that peft replaces by the copy it
trained, and a move to another device. `bring_back` brings what was trained back into the object, and lets both share
memory again.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .building import move_buffers
from .names import Binding

LINK = "_shares_with"


@dataclass
class Link:
    """What a model shares with an object of another repository.

    Attributes:
        origin: the object; None in copies of the model, which share nothing.
        bindings: which tensors of the model are which of the object.
    """

    origin: nn.Module | None = None
    bindings: list[Binding] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Link":
        return Link()

    def __reduce__(self) -> tuple[type["Link"], tuple[()]]:
        return Link, ()


def link(model: nn.Module, origin: nn.Module, bindings: list[Binding]) -> None:
    """Keep in mind that a model was built around an object's parameters."""
    model.__dict__[LINK] = Link(origin, bindings)


@torch.no_grad()
def bring_back(model: nn.Module) -> list[str]:
    """Bring everything trained in a model back into the object around whose parameters it was built.

    Args:
        model: built around an object; any other is left alone.

    Returns:
        names of the object's tensors that no longer shared memory, and do again now where they can.
    """
    shared = model.__dict__.get(LINK)
    if not isinstance(shared, Link) or shared.origin is None:
        return []
    device = next(model.parameters()).device
    theirs = dict(shared.origin.named_parameters(remove_duplicate=False))
    ours = dict(model.named_parameters(remove_duplicate=False))
    parted = []
    for binding in shared.bindings:
        origin = theirs.get(binding.theirs)
        parts = [ours.get(name) for name in binding.ours]
        if origin is None or any(part is None for part in parts):
            continue
        present = [part for part in parts if part is not None]
        pieces = binding.cut.pieces(origin.data)
        if binding.cut.views and all(map(_same_memory, pieces, present)):
            continue
        parted.append(binding.theirs)
        origin.data = binding.cut.whole([part.data for part in present])
        if binding.cut.views:
            for part, piece in zip(present, binding.cut.pieces(origin.data), strict=True):
                part.data = piece
    if all(parameter.device == device for parameter in shared.origin.parameters()):
        move_buffers(shared.origin, device)
    return parted


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.device == other.device and one.data_ptr() == other.data_ptr() and one.shape == other.shape
