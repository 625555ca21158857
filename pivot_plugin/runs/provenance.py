"""Where a run comes from, in words that may be published: no path of the machine it ran on."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from pivot_plugin.data.rows import RowDataset
from pivot_plugin.encoders.card import licence_of
from pivot_plugin.encoders.record import plain_name, versions
from pivot_plugin.models.fingerprints import weights_fingerprint
from pivot_plugin.training.cost import tower_facts

from .in_place import InPlace
from .run import Run

# what rows are called that came without a name
UNNAMED = ("prefs", "questions")


def optimized_origin(run: Run, training: InPlace, lora: Iterable[str]) -> dict[str, Any]:
    """The origin of an encoder: model, data, versions and cost of the run that it comes from.

    Args:
        run: the encoder's, finished.
        training: of it.
        lora: names of the LoRA's weights, none where weights trained themselves.
    """
    cost = training.cost
    config, model, tower = run.config, run.model, run.adapter.tower
    return {
        "base": {
            "mllm": plain_name(run.base),
            "mllm_revision": getattr(model.config, "_commit_hash", None),
            "encoder": plain_name(getattr(tower.config, "_name_or_path", "")) or None,
            "licence": licence_of(run.base),
            "adapted_weights": _adapted_weights(run, training, lora),
        },
        "family": run.family,
        "mllm_class": type(model).__name__,
        "encoder_class": type(tower).__name__,
        "tower": tower_facts(run.adapter),
        "data": _data(run),
        "versions": versions(),
        "seed": config.seed,
        "batch": config.train_batch_size * config.gradient_accumulation_steps * config.world_size,
        "cost": asdict(cost),
    }


def _adapted_weights(run: Run, training: InPlace, lora: Iterable[str]) -> str | None:
    """A hash of what the tower's LoRA was trained on, by which another base is known; None without one."""
    prefix = f"base_model.model.{run.adapter.tower_path}."
    layers = {name.partition(".lora_")[0] for name in lora if name.startswith(prefix) and ".lora_" in name}
    names = [f"{layer.removeprefix('base_model.model.')}.weight" for layer in layers]
    return weights_fingerprint(training.before[name] for name in names) if names else None


def instructed_origin(run: Run) -> dict[str, Any]:
    """The origin of an MLLM that was aligned or instructed.

    Args:
        run: the MLLM's, finished.
    """
    assert isinstance(run.rows, RowDataset)
    return {"mllm": plain_name(run.base), "rows": len(run.rows), "versions": versions(), "seed": run.config.seed}


def _data(run: Run) -> dict[str, Any]:
    name = getattr(run.rows, "name", "")
    # a stream is neither counted nor hashed
    countable = run.rows if isinstance(run.rows, RowDataset) else None
    return {
        "name": "" if name in UNNAMED else plain_name(name),
        "rows": None if countable is None else len(countable),
        "fingerprint": None if countable is None else countable.fingerprint(),
        "held_out": 0 if run.held_out is None else len(run.held_out),
    }
