"""Probes: what a frozen encoder's features make easy to tell."""

from .patches import PatchProbe, probe_patches

__all__ = ["PatchProbe", "probe_patches"]
