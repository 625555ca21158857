"""What an encoder is in the form of a target, and what the targets share in making it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pivot_plugin.adapters.base import FEATURE_LAYER
from pivot_plugin.errors import EncoderError

Tensors = dict[str, torch.Tensor]
Settings = dict[str, Any]
# the number of a block, by the names that transformers gives its tensors
CLIP_BLOCK = r"encoder\.layers\.(\d+)"
INTERN_BLOCK = r"encoder\.layer\.(\d+)"


@dataclass(frozen=True)
class Form:
    """An encoder in the form of a target.

    Attributes:
        tensors: by the target's names.
        config: the target's `config.json`.
        settings: to set there beside the folder, by the names they have there.
        notes: what is otherwise to be known, in sentences.
        preprocessor: whether transformers' image processor goes with it.
    """

    tensors: Tensors
    config: Settings
    settings: Settings
    notes: tuple[str, ...] = ()
    preprocessor: bool = True


def refuse_unless(target: str, encoder: PreTrainedModel, problems: list[str], remedy: str) -> None:
    """Refuse an encoder that a target cannot hold.

    Raises:
        EncoderError: with every problem, if there is any.
    """
    if problems:
        raise EncoderError(f"{target} cannot hold this {type(encoder).__name__}: {'; '.join(problems)}.", remedy)


def edge(size: Any) -> int:
    """The edge of a square, in pixels, however a configuration writes it."""
    return int(size[0] if isinstance(size, list | tuple) else size)


def used_blocks(encoder: PreTrainedModel, depth: int) -> int:
    """How many blocks the features in use have passed; all of them where the tower's output is read."""
    layer = getattr(encoder.config, FEATURE_LAYER, None)
    if layer is None:
        return depth
    return int(layer) if layer >= 0 else depth + 1 + int(layer)


def fused(tensors: Tensors, path: str, parts: tuple[str, str, str], kind: str) -> torch.Tensor | None:
    """Weights or biases of several projections as one tensor, None where they have none."""
    found = [tensors.get(f"{path}.{part}.{kind}") for part in parts]
    return None if any(tensor is None for tensor in found) else torch.cat([t for t in found if t is not None])


def renamed(tensors: Tensors, table: Mapping[str, str]) -> Tensors:
    """The tensors that a table of patterns knows, under the names that it gives them."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in table.items():
            if match := re.fullmatch(pattern, name):
                found[match.expand(replacement)] = tensor
                break
    return found


def intern_problems(encoder: PreTrainedModel) -> list[str]:
    """What keeps an InternViT from being held by a class without a closing norm."""
    problems = []
    if not encoder.config.use_mean_pooling:
        problems.append("it has a norm behind its last block")
    if "embeddings.position_embeddings" not in encoder.state_dict():
        problems.append("it has no absolute position embeddings")
    return problems


def intern_blocks(tensors: Tensors, table: Mapping[str, str], qkv: str) -> Tensors:
    """The tensors of an InternViT by a table's names, queries, keys and values fused.

    Args:
        tensors: by transformers' names.
        table: patterns of these, and what they become.
        qkv: name of a block's fused projection, with {} for its number.
    """
    written = renamed(tensors, table)
    depth = 1 + max(int(found[1]) for name in tensors if (found := re.match(INTERN_BLOCK, name)))
    for index in range(depth):
        for kind in ("weight", "bias"):
            path = f"encoder.layer.{index}.attention"
            together = fused(tensors, path, ("q_proj", "k_proj", "v_proj"), kind)
            if together is not None:
                written[f"{qkv.format(index)}.{kind}"] = together
    return written
