"""Make the vision encoder of a multimodal language model better by preference optimisation.

    import pivot_plugin as pivot

    result = pivot.optimize(model, prefs)
    result.save("better-encoder")
    encoder = pivot.load_encoder("better-encoder")
    pivot.graft(other_model, encoder)

Importing this package loads no torch; a verb loads what it needs when it is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# In the source tree hooks/ and adapters/ stand beside this folder; the wheel has them inside it.
_source_tree = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "hooks").exists() and (_source_tree / "hooks" / "specs.py").exists():
    __path__.append(str(_source_tree))

if TYPE_CHECKING:
    from pivot_plugin._arms import ArmsComparison, compare_arms
    from pivot_plugin._assemble import assemble
    from pivot_plugin._compare import Comparison, compare
    from pivot_plugin._instruct import InstructResult, align, instruct
    from pivot_plugin._optimize import PivotResult, optimize
    from pivot_plugin.config import PivotConfig, PivotGRPOConfig, PivotRLOOConfig
    from pivot_plugin.encoders import extract_encoder, graft, list_encoders, load_encoder, publish, verify
    from pivot_plugin.errors import PivotError
    from pivot_plugin.training.rollouts import PivotGRPOTrainer, PivotRLOOTrainer
    from pivot_plugin.training.trainer import PivotTrainer

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
    "publish",
    "verify",
]

_HOME = {
    "ArmsComparison": "_arms",
    "InstructResult": "_instruct",
    "align": "_instruct",
    "instruct": "_instruct",
    "assemble": "_assemble",
    "Comparison": "_compare",
    "compare": "_compare",
    "PivotGRPOConfig": "config",
    "PivotGRPOTrainer": "training.rollouts",
    "PivotRLOOConfig": "config",
    "PivotRLOOTrainer": "training.rollouts",
    "compare_arms": "_arms",
    "PivotConfig": "config",
    "PivotError": "errors",
    "PivotResult": "_optimize",
    "PivotTrainer": "training.trainer",
    "extract_encoder": "encoders",
    "graft": "encoders",
    "list_encoders": "encoders",
    "load_encoder": "encoders",
    "publish": "encoders",
    "verify": "encoders",
    "optimize": "_optimize",
}

_PACKAGES = ("preferences", "probes", "recipes", "rewards")


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
