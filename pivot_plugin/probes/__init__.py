"""Probes: what a frozen encoder's features make easy to tell, and what training does to a model beyond its own data."""

from .exploration import candidate_set_sizes, pass_at_k, rollout_branching_factor
from .generalization import generalization_factor, plot_generalization
from .patches import PatchProbe, probe_patches

__all__ = [
    "PatchProbe",
    "candidate_set_sizes",
    "generalization_factor",
    "pass_at_k",
    "plot_generalization",
    "probe_patches",
    "rollout_branching_factor",
]
