"""Can the transplant see? Towers of which it is known which is better, before the same new language models.

Worse: weights disturbed by noise. Better: the original trained on the true shape and colour of every patch, a little
(a tenth of the steps) and more.
"""

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pivot_plugin.quickstart import miniature, scenes

from .world import PATCHES, features, pictures

COLOURS = list(scenes.COLOURS)
# of the towers that are known to be better and worse: optimiser steps, and the share of noise in every matrix
PATCH_STEPS, NOISE = 300, 0.6


def patch_labels(shown: list[scenes.Scene]) -> torch.Tensor:
    """What every patch shows, (pictures, patches): 0 for background, else shape and colour in one number."""
    labels = []
    side = scenes.IMAGE_SIZE // miniature.PATCH_SIZE
    for scene in shown:
        kinds = np.zeros((scenes.IMAGE_SIZE, scenes.IMAGE_SIZE), dtype=int)
        for item in scene.objects:
            here = scene.mask([item]) > 0
            kinds[here] = 1 + scenes.SHAPES.index(item.shape) * len(COLOURS) + COLOURS.index(item.colour)
        patches = kinds.reshape(side, miniature.PATCH_SIZE, side, miniature.PATCH_SIZE).swapaxes(1, 2)
        labels.append([_shown_most(patch) for patch in patches.reshape(side * side, -1)])
    return torch.tensor(labels)


def _shown_most(patch: np.ndarray) -> int:
    """The object with the most pixels, where a quarter of the patch shows it."""
    counts = np.bincount(patch[patch > 0], minlength=1)
    return int(counts.argmax()) if counts.max() * 4 >= patch.size else 0


def taught_on_patches(tower: Any, steps: int, seed: int, rate: float = 3e-4) -> Any:
    """A copy of a tower, trained to tell shape and colour of every patch.

    Args:
        tower: left as it is.
        steps: of 32 pictures.
        seed: of pictures, order, and the head that reads the labels.
        rate: of learning.
    """
    better = copy.deepcopy(tower)
    shown = pictures(2000, PATCHES + 1000 * seed, questions=0)
    labels = patch_labels(shown.scenes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(miniature.WIDTH, 1 + len(scenes.SHAPES) * len(COLOURS))
    # the head alone first, or it spoils the tower
    kept = features(better, shown.pixels).flatten(0, 1)
    quick = torch.optim.AdamW(head.parameters(), lr=1e-2)
    rng = random.Random(seed)
    for _ in range(60):
        chosen = rng.sample(range(len(kept)), 1024)
        quick.zero_grad()
        F.cross_entropy(head(kept[chosen]), labels.flatten()[chosen]).backward()
        quick.step()
    optimizer = torch.optim.AdamW([*better.parameters(), *head.parameters()], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        chosen = rng.sample(range(len(shown.scenes)), 32)
        states = better(shown.pixels[chosen], output_hidden_states=True).hidden_states[-1]
        optimizer.zero_grad()
        F.cross_entropy(head(states).flatten(0, 1), labels[chosen].flatten()).backward()
        nn.utils.clip_grad_norm_(better.parameters(), 1.0)
        optimizer.step()
    better.zero_grad(set_to_none=True)
    return better.eval()


def disturbed(tower: Any, share: float, seed: int) -> Any:
    """A copy of a tower with noise on every matrix, of a share of its own spread."""
    worse = copy.deepcopy(tower)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in worse.parameters():
            if weight.dim() > 1:
                weight += share * weight.std() * torch.randn(weight.shape, generator=noise)
    return worse.eval()
