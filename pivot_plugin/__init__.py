"""Make the vision encoder of a multimodal language model better by preference optimisation.

    import pivot_plugin as pivot

    result = pivot.optimize(model, prefs)
    result.save("better-encoder")
    encoder = pivot.load_encoder("better-encoder")
    pivot.graft(other_model, encoder)

Importing this package loads no torch; a verb loads what it needs when it is first used.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING


class _SourceTree(MetaPathFinder):
    """In the source tree hooks/ and adapters/ stand beside this folder; the wheel has them inside it."""

    root = Path(__file__).resolve().parent.parent
    beside = ("pivot_plugin.hooks", "pivot_plugin.adapters")

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(self.root)]) if name in self.beside else None


if not (Path(__file__).parent / "hooks").exists():
    # in front: another tree may be installed, and what stands beside this package belongs to it
    sys.meta_path.insert(0, _SourceTree())

if TYPE_CHECKING:
    from pivot_plugin.config import PivotConfig, PivotGRPOConfig, PivotRLOOConfig
    from pivot_plugin.encoders import extract_encoder, graft, list_encoders, load_encoder, publish, verify
    from pivot_plugin.encoders.assemble import assemble
    from pivot_plugin.errors import PivotError
    from pivot_plugin.probes.comparison import Comparison, compare
    from pivot_plugin.recipes.arms import ArmsComparison, compare_arms
    from pivot_plugin.runs.instruct import InstructResult, align, instruct
    from pivot_plugin.runs.optimize import optimize
    from pivot_plugin.runs.planning import RunPlan, plan
    from pivot_plugin.runs.result import PivotResult
    from pivot_plugin.training.pair_trainer import PivotTrainer
    from pivot_plugin.training.rollout_trainer import PivotGRPOTrainer, PivotRLOOTrainer

    __version__: str

# where each public name lives; the block above and the list below repeat it for type checkers and a
# test compares the three
_HOME = {
    "config": ("PivotConfig", "PivotGRPOConfig", "PivotRLOOConfig"),
    "encoders": ("extract_encoder", "graft", "list_encoders", "load_encoder", "publish", "verify"),
    "encoders.assemble": ("assemble",),
    "errors": ("PivotError",),
    "probes.comparison": ("Comparison", "compare"),
    "recipes.arms": ("ArmsComparison", "compare_arms"),
    "runs.instruct": ("InstructResult", "align", "instruct"),
    "runs.optimize": ("optimize",),
    "runs.planning": ("RunPlan", "plan"),
    "runs.result": ("PivotResult",),
    "training.pair_trainer": ("PivotTrainer",),
    "training.rollout_trainer": ("PivotGRPOTrainer", "PivotRLOOTrainer"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_PACKAGES = ("preferences", "probes", "recipes", "rewards")
__all__ = [
    "ArmsComparison",
    "Comparison",
    "InstructResult",
    "PivotConfig",
    "PivotError",
    "PivotGRPOConfig",
    "PivotGRPOTrainer",
    "PivotRLOOConfig",
    "PivotRLOOTrainer",
    "PivotResult",
    "PivotTrainer",
    "RunPlan",
    "align",
    "assemble",
    "compare",
    "compare_arms",
    "extract_encoder",
    "graft",
    "instruct",
    "list_encoders",
    "load_encoder",
    "optimize",
    "plan",
    "publish",
    "verify",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            # of the tag it was built from
            return version("pivot-plugin")
        except PackageNotFoundError:
            # a source tree that was never installed
            return "0+unknown"
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
