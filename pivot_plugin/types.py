"""Small shared types: what hooks and callers may bring themselves."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

Layout = Callable[[Mapping[str, object]], Mapping[str, object]]
ObjectivePreset = Mapping[str, object]
Probe = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]


class RewardFunction(Protocol):
    """A reward with TRL's signature: lists of equal length in, one float (or None) per completion out."""

    def __call__(
        self, prompts: Sequence[object], completions: Sequence[object], **columns: object
    ) -> Sequence[float | None]: ...


class Run(Protocol):
    """What a plugin is told of a run that starts."""

    @property
    def family(self) -> str: ...

    @property
    def output_dir(self) -> Path: ...


class Result(Protocol):
    """What a plugin is told of a run that finished."""

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]: ...

    @property
    def output_dir(self) -> Path: ...
