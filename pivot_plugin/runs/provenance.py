"""Where a run comes from, in words that may be published: no path of the machine it ran on."""

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import chain
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
# options that say how an encoder was trained: what is not here is not published, such as names of runs, addresses,
# folders, tokens, and what is handed on to other libraries
PUBLISHED = frozenset(
    chain(
        ("objective", "rewards", "reward_weights", "train", "lora", "frozen", "eval_fraction", "plain"),
        ("beta", "loss_type", "loss_weights", "label_smoothing", "label_smoothing_factor", "use_weighting"),
        ("f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "discopop_tau", "sft_average", "disable_dropout"),
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        ("learning_rate", "learning_rates", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
        ("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha"),
        ("num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
        ("gradient_accumulation_steps", "generation_batch_size", "steps_per_generation"),
        ("seed", "data_seed", "full_determinism", "bf16", "fp16", "tf32", "use_cpu", "gradient_checkpointing"),
        ("torch_compile", "max_length", "truncation_mode", "group_by_image", "group_rollouts", "shuffle_dataset"),
        ("num_generations", "num_generations_eval", "num_iterations", "max_completion_length"),
        ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        ("epsilon", "epsilon_high", "delta", "scale_rewards", "importance_sampling_level"),
        ("multi_objective_aggregation", "mask_truncated_completions", "top_entropy_quantile"),
        ("entropy_coef", "normalize_advantages", "reward_clip_range", "reward_time_limit"),
        ("eval_strategy", "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end"),
        ("metric_for_best_model", "greater_is_better", "patience", "min_delta"),
        ("samples", "redraw", "rounds", "reference", "pair_up", "margin", "max_new_tokens"),
    )
)
LORA = frozenset(
    chain(
        ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "bias"),
        ("use_rslora", "use_dora", "init_lora_weights", "layers_to_transform", "fan_in_fan_out"),
    )
)
# a choice or the name of a module, of a function, of a loss: no address, no sentence, no path
_CHOICE = re.compile(r"(?!(?:hf|sk|gh[pousr])[_-])[A-Za-z0-9(^][\w.+|*()^$\\-]{0,199}")
_DEEPEST = 3


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


def published_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's options is published with its encoder: names, numbers and choices of a list.

    Args:
        settings: as the run's own record keeps them.
    """
    kept = {name: _plain(value, name) for name, value in settings.items() if name in PUBLISHED}
    return {name: value for name, value in kept.items() if value is not _LEFT_OUT}


_LEFT_OUT = object()


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """A number, a choice, or a list or mapping of such; `_LEFT_OUT` for anything else."""
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if _CHOICE.fullmatch(value) else _LEFT_OUT
    if depth >= _DEEPEST:
        return _LEFT_OUT
    if isinstance(value, list | tuple | set):
        items = [_plain(item, name, depth + 1) for item in value]
        return _LEFT_OUT if _LEFT_OUT in items else items
    if isinstance(value, Mapping):
        kept = {
            str(key): _plain(item, name, depth + 1)
            for key, item in value.items()
            if _CHOICE.fullmatch(str(key)) and (name != "lora" or depth > 0 or key in LORA)
        }
        return {key: item for key, item in kept.items() if item is not _LEFT_OUT}
    return _LEFT_OUT


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
