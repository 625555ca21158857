"""Probes by name: the built-in ones and those of plugins, with the data they are to be run on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pivot_plugin.errors import SettingsError
from pivot_plugin.hooks import hookimpl, named, offered
from pivot_plugin.hooks.types import Probe

from .gradients import pointing_game, saliency
from .knn import knn_probe
from .linear import linear_probe, prototype_probe
from .neighbours import alignment
from .questions import vqa
from .ravel import ravel
from .scores import ProbeResult, as_result
from .segmentation import segmentation_probe
from .subjects import Subject

NEED_MLLM = ("saliency", "pointing", "vqa")


@dataclass(frozen=True)
class ProbeTask:
    """A probe with its data: what `compare` and `optimize` run under a label.

    Attributes:
        probe: name of a probe, or a function of a `Subject`, data and options.
        data: for it.
        options: for it.
    """

    probe: str | Probe
    data: object = None
    options: Mapping[str, Any] = field(default_factory=dict)


Runner = Callable[[Subject], ProbeResult]


@hookimpl
def pivot_probes() -> Mapping[str, Probe]:
    return {
        "linear": linear_probe,
        "knn": knn_probe,
        "prototype": prototype_probe,
        "segmentation": segmentation_probe,
        "saliency": saliency,
        "pointing": pointing_game,
        "alignment": alignment,
        "ravel": ravel,
        "vqa": vqa,
    }


def available() -> dict[str, Probe]:
    """Every probe that can be named.

    Raises:
        PluginError: if a plugin offers no mapping.
    """
    return offered("pivot_probes")


def runners(probes: Mapping[str, object]) -> dict[str, Runner]:
    """Functions that run probes on a subject, by label.

    Args:
        probes: by label a `ProbeTask`; or data, the label naming the probe; or a function of a `Subject` alone.

    Raises:
        SettingsError: for a name nobody knows, with the nearest ones, or for none at all.
    """
    if not probes:
        raise SettingsError("No probe is given.", f"Give one or more of {', '.join(sorted(available()))} with data.")
    return {label: _runner(label, probe) for label, probe in probes.items()}


def needs_mllm(label: str, probe: object) -> bool:
    """Whether a probe, in any form that `runners` takes, looks at a whole MLLM."""
    name = probe.probe if isinstance(probe, ProbeTask) else label
    return isinstance(name, str) and name in NEED_MLLM


def _runner(label: str, probe: object) -> Runner:
    if callable(probe):
        return lambda subject: as_result(label, probe(subject))
    task = probe if isinstance(probe, ProbeTask) else ProbeTask(label, probe)
    run = named("pivot_probes", task.probe, "probe") if isinstance(task.probe, str) else task.probe
    return lambda subject: as_result(label, run(subject, task.data, **task.options))
