"""A recipe small enough to be run in seconds: a random encoder, a random language model, rows about noise."""

from pathlib import Path
from typing import Any

from pivot_plugin.recipes import PivotRecipe
from tests.helpers import picture, row
from tests.helpers.encoders import encoder, language_model

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


def small_recipe(output_dir: Path, size: int = 4, **replaced: Any) -> PivotRecipe:
    """The small recipe, with sections replaced, in batches of so many for each process."""
    quick = QUICK | {"per_device_train_batch_size": size}
    tower, images, _ = encoder("siglip")
    # with its picture alone: the control without pictures has tests of its own
    options = {"rewards": "exact_match", "max_new_tokens": 2, "without": []}
    answers = {"probe": "vqa", "data": questions(), "options": options}
    sections: dict[str, Any] = {
        "encoder": (tower, images),
        "language_model": language_model("qwen2"),
        "align": {"data": captions(), **quick},
        "instruct": {"data": conversations(), **quick},
        "optimize": {"data": pairs(), "eval_data": pairs(4), "arms": {"sft": {}, "dpo": {}}, **quick},
        "transplant": {
            "language_model": language_model("llama"),
            "projectors": ["0"],
            "align": quick,
            "instruct": quick,
        },
        "evaluate": {"answers": answers},
        "output_dir": str(output_dir),
    }
    return PivotRecipe(**{**sections, **replaced})
