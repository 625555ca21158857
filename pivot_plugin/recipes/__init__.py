"""Recipes: several runs one after another, each in a folder of its own, resumable and skippable.

specs.py                        GRPO, self-distilled pairs, cold start, GRPO (arXiv 2510.25801)
pipeline.py                     a bare encoder in, a better one out, proved in a new MLLM (arXiv 2510.16333)
file.py inputs.py *.yaml        the latter as a file
plan.py stages.py transplant.py what it costs, a stage's folder, and the encoder in a new MLLM
"""

from .cold_start import SpecsResult, Stage, specs
from .file import PivotRecipe, load_recipe, ready_recipe
from .pipeline import EncoderScore, RecipeResult, pivot, run_recipe
from .plan import Plan, plan_recipe

__all__ = [
    "EncoderScore",
    "PivotRecipe",
    "Plan",
    "RecipeResult",
    "SpecsResult",
    "Stage",
    "load_recipe",
    "pivot",
    "plan_recipe",
    "ready_recipe",
    "run_recipe",
    "specs",
]
