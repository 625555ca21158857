"""Looking at a model without leaving traces: its mode, its device and the random numbers are put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Put a model into eval mode meanwhile; every module is as it was afterwards, also after an exception.

    Args:
        model: to be looked at.
        device: to move it to and leave it on; where it is if None.
    """
    training = {module: module.training for module in model.modules()}
    try:
        if device is not None and model_device(model) != device:
            model.to(device)
        model.eval()
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def model_device(model: nn.Module) -> torch.device | None:
    """Where a model's first parameter is, None where it has none; one that an engine has divided stays there."""
    first = next(model.parameters(), None)
    return None if first is None else first.device


@contextmanager
def undisturbed(seed: int | None = None) -> Iterator[None]:
    """Keep the random numbers that training draws as they would have been: Python's, numpy's, torch's, CUDA's.

    Args:
        seed: of torch's generators meanwhile; they go on from where they are if None.
    """
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
