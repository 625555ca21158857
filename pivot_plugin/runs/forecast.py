"""What a run would do and cost, from the model's configuration and the data alone: no weights are loaded."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivot_plugin.config import RolloutConfig
from pivot_plugin.data.pairs import load_pairs
from pivot_plugin.data.questions import load_questions
from pivot_plugin.data.split import LARGEST, LARGEST_SHARE, SMALLEST
from pivot_plugin.errors import SettingsError
from pivot_plugin.generation.own_answers import OPTION_NAMES
from pivot_plugin.training.inspection import inspect_model

from .outcome import without_image
from .settings import configuration

# of an H100 in bfloat16, and the share of it that was measured on the LLaVA-1.5-7B shape
H100_FLOPS, REACHED = 989e12, 0.4
# text of a pair: the question and two answers; of most data sets within a factor of two
TEXT_TOKENS = 200
READING = ("columns", "split", "allow_urls", "image_folder")


def forecast(
    model: str, prefs: object, options: Mapping[str, Any], settings: Mapping[str, Any], questions: bool
) -> dict[str, Any]:
    """What would be trained on what, in how many steps, and what it would cost.

    Args:
        model: folder or Hub id.
        prefs: pairs or questions.
        options: arguments of `optimize` by name.
        settings: of the trainer, by name.
        questions: whether the rows are questions.

    Returns:
        readable facts by name.

    Raises:
        PivotError: for a model, data or settings that cannot be used; every row is looked at.
    """
    facts = inspect_model(model)
    own = {name for name in settings if name in (*OPTION_NAMES, "rewards")}
    trainer = {name: value for name, value in settings.items() if name not in own or options["objective"] != "dpo"}
    if questions and options["objective"] not in ("grpo", "rloo"):
        trainer = {name: value for name, value in settings.items() if name not in own}
    trainer.pop("rewards", None)
    held_out_given = options.get("eval_prefs") is not None
    config = configuration(
        trainer,
        Path(options["output_dir"]),
        options["objective"],
        options["train"],
        options["lora"] is not None,
        held_out_given or options["eval_fraction"] > 0,
    )
    reading = {name: options[name] for name in READING if options.get(name)}
    rows = (load_questions if questions else load_pairs)(prefs, **reading).verify()
    bare, count = without_image(rows)
    if bare == count:
        raise SettingsError(f"None of the {count} rows has an image.", "Give rows about images.")
    images = len(set(rows.image_keys.tolist()) - {b""})
    held_out = 0 if held_out_given else _held_out(count, images, float(options["eval_fraction"]))
    batch = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = (
        config.max_steps
        if config.max_steps > 0
        else math.ceil((count - held_out) / batch) * math.ceil(config.num_train_epochs)
    )
    told: dict[str, Any] = {
        "model": f"{facts['model']} ({facts['family']})",
        "vision tower": f"{facts['vision tower']}, {facts['tower parameters']} parameters",
        "what trains": f"{options['train']}, "
        + (f"LoRA of rank {options['lora']}" if options["lora"] else "the weights themselves"),
        "projector": facts["projector"],
        "rows": f"{count:,} about {images:,} images" + (f"; {bare:,} show none" if bare else ""),
        "held out": "those given" if held_out_given else f"about {held_out:,}",
        "objective": options["objective"],
        "learning rate": f"{config.learning_rate:g}",
        "optimiser steps": f"{steps:,} of {batch} {'roll-outs' if isinstance(config, RolloutConfig) else 'rows'}",
        "image tokens": facts["image tokens"],
        "prefix forest": facts["prefix forest"],
    }
    if not questions:
        told["cost, roughly"] = _cost(facts, steps * batch)
    return told


def _held_out(count: int, images: int, fraction: float) -> int:
    if fraction <= 0 or images < 2:
        return 0
    return min(max(round(count * fraction), SMALLEST), LARGEST, int(count * LARGEST_SHARE))


def _cost(facts: Mapping[str, Any], pairs: int) -> str:
    """Two operations per parameter and token forward, two backward (activations), and two of the reference."""
    parameters = sum(_number(facts[name]) for name in ("tower parameters", "language model"))
    tokens = TEXT_TOKENS + _number(facts["image tokens"][0]) if isinstance(facts["image tokens"], list) else TEXT_TOKENS
    operations = 6.0 * parameters * tokens * pairs
    minutes = operations / (H100_FLOPS * REACHED) / 60
    spent = f"{minutes:.0f} minutes" if minutes >= 1 else "less than a minute"
    return f"{operations:.1e} operations: {spent} of an H100 at 40 % of its peak, looks and loading left out"


def _number(text: str) -> int:
    """The first number in a text."""
    digits = text.replace(",", "").split()[0]
    return int(digits) if digits.isdigit() else 0
