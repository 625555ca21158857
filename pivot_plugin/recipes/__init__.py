"""Recipes: several runs one after another, each in a folder of its own, resumable and skippable.

arms.py                              objectives on the same pairs, over seeds
cold_start.py                        GRPO, self-distilled pairs, cold start, GRPO (arXiv 2510.25801)
pipeline.py rates.py evaluation.py   a bare encoder in, a better one out, proved in a new MLLM (arXiv 2510.16333)
transplant.py results.py             its new MLLM, and its tables
post_training.py                     an MLLM in; arms, and their towers taken out and compared (arXiv 2512.23592)
sections.py door.py file.py *.yaml   the latter in types, from mappings and from files
inputs.py plan.py                    what it names, opened, and what it costs
stages.py runs.py tables.py          what all of them share: stages, runs as stages, mean and spread
"""

from .cold_start import SpecsResult, specs
from .file import load_recipe, ready_recipe
from .pipeline import pivot, run_recipe
from .plan import RecipePlan, plan_recipe
from .post_training import PostTraining, PostTrainingResult
from .results import EncoderScore, RecipeResult
from .sections import PivotRecipe
from .stages import Stage

__all__ = [
    "EncoderScore",
    "PivotRecipe",
    "PostTraining",
    "PostTrainingResult",
    "RecipePlan",
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
