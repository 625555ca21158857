"""Recipes: several runs one after another, each in a folder of its own, resumable and skippable."""

from .specs import SpecsResult, Stage, specs

__all__ = ["SpecsResult", "Stage", "specs"]
