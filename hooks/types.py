"""Small shared types: what hooks and callers may bring themselves."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pivot_plugin.probes.scores import ProbeResult

Layout = Callable[[Mapping[str, object]], Mapping[str, object]]
ObjectivePreset = Mapping[str, object]
# what is examined (a `probes.Subject`), data and options in, scores out
Probe = Callable[..., "ProbeResult | Mapping[str, float]"]


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
