"""A recipe small enough to be run in seconds: a random encoder, a random language model, rows about noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pivot_plugin.recipes import PivotRecipe

from ..conftest import picture, row
from ..test_assemble import encoder, language_model

QUICK = {
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "batch": 4,
    "max_steps": 2,
}


def captions(count: int = 8) -> list[dict[str, Any]]:
    return [{"image": picture(40, 50, n), "caption": f"picture {n}"} for n in range(count)]


def conversations(count: int = 8) -> list[dict[str, Any]]:
    return [
        {
            "image": picture(40, 50, n),
            "conversations": [
                {"from": "human", "value": f"<image>\nnumber {n}?"},
                {"from": "gpt", "value": f"it is {n}"},
                {"from": "human", "value": "sure?"},
                {"from": "gpt", "value": "yes"},
            ],
        }
        for n in range(count)
    ]


def pairs(count: int = 8) -> list[dict[str, Any]]:
    return [row(f"number {n}?", f"it is {n}", "no no", picture(40, 50, n)) for n in range(count)]


def questions(count: int = 6) -> list[dict[str, Any]]:
    return [{"images": [picture(40, 50, n)], "question": f"number {n}?", "answer": "yes"} for n in range(count)]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., PivotRecipe]:
    """The small recipe, with sections replaced."""

    def made(**replaced: Any) -> PivotRecipe:
        tower, images, _ = encoder("siglip")
        sections: dict[str, Any] = {
            "encoder": (tower, images),
            "language_model": language_model("qwen2"),
            "align": {"data": captions(), **QUICK},
            "instruct": {"data": conversations(), **QUICK},
            "optimize": {"data": pairs(), "eval_data": pairs(4), "arms": {"sft": {}, "dpo": {}}, **QUICK},
            "transplant": {
                "language_model": language_model("llama"),
                "projectors": ["0"],
                "align": QUICK,
                "instruct": QUICK,
            },
            "evaluate": {
                "answers": {
                    "probe": "vqa",
                    "data": questions(),
                    "options": {"rewards": "exact_match", "max_new_tokens": 2},
                }
            },
            "output_dir": str(tmp_path / "recipe"),
        }
        return PivotRecipe(**{**sections, **replaced})

    return made
