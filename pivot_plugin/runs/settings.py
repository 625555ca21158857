"""From the options of a run to TRL's configuration: objective, defaults, and the watch."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from pivot_plugin.config import InstructConfig, PivotConfig, PivotGRPOConfig, PivotRLOOConfig, TowerConfig, Train
from pivot_plugin.errors import PivotError, SettingsError, unknown
from pivot_plugin.extras import check_trackers
from pivot_plugin.objectives import learning_rate, resolve
from pivot_plugin.typed import fits, shown, wanted

CONFIGS: dict[object, type[TowerConfig]] = {None: PivotConfig, "grpo": PivotGRPOConfig, "rloo": PivotRLOOConfig}
# share of a run between two looks at the held-out rows
EVALUATE_EVERY = 0.1
# of a verb, by arguments of their own
OPTIONS = ("output_dir", "train")
AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
AT_LEAST_ZERO = ("learning_rate", "num_train_epochs", "max_length", "weight_decay", "warmup_steps", "seed")
# of TRL's SFTConfig: what is settled where images are
DECIDED = ("assistant_only_loss", "completion_only_loss", "dataset_text_field", "packing", "padding_free")


def configuration(
    settings: Mapping[str, Any], folder: Path, objective: str | Sequence[str], train: Train, lora: bool, held_out: bool
) -> TowerConfig:
    """The configuration of a run.

    Args:
        settings: the user's, by the names of TRL's configuration.
        folder: of the run.
        objective: as for `objectives.resolve`.
        train: which parts train.
        lora: whether LoRA trains.
        held_out: whether rows are held out, so that the run is watched.

    Raises:
        SettingsError: for an option that does not exist or cannot be used.
    """
    preset = dict(resolve(objective))
    config_cls = CONFIGS[preset.pop("trainer", None)]
    _check_names(config_cls, settings, f"optimize with objective={objective!r}")
    if "loss_type" in settings and "loss_type" in preset and objective != "dpo":
        raise SettingsError(
            f"Both objective={objective!r} and loss_type={settings['loss_type']!r} are given.", "Give one of them."
        )
    watch = watch_defaults(settings, on_pairs=config_cls is PivotConfig) if held_out else {}
    values = {"learning_rate": learning_rate(objective, lora), **preset, **watch, **settings}
    return _construct(config_cls, folder, train, values)


def instruct_configuration(
    defaults: Mapping[str, Any], settings: Mapping[str, Any], folder: Path, train: Train, held_out: bool, batch: int
) -> InstructConfig:
    """The configuration of an alignment or instruction.

    Args:
        defaults: of this kind of run.
        settings: the user's, by the names of TRL's configuration.
        folder: of the run.
        train: which parts train.
        held_out: whether rows are held out, so that the run is watched.
        batch: conversations of an optimiser step, over all processes, where `gradient_accumulation_steps` is not given.

    Raises:
        SettingsError: for an option that does not exist or cannot be used.
    """
    _check_names(InstructConfig, settings, "This run")
    if decided := [name for name in DECIDED if name in settings]:
        raise SettingsError(
            f"{decided[0]}={settings[decided[0]]!r} is given.",
            "Leave it out: answers alone are in the loss, and conversations with images are not packed.",
        )
    watch = watch_defaults(settings, on_pairs=True) if held_out else {}
    config = _construct(InstructConfig, folder, train, {**defaults, **watch, **settings})
    assert isinstance(config, InstructConfig)
    if "gradient_accumulation_steps" not in settings:
        config.gradient_accumulation_steps = max(1, round(batch / (config.train_batch_size * config.world_size)))
    return config


def _check_names(config_cls: type[TowerConfig], settings: Mapping[str, Any], verb: str) -> None:
    """Make sure that every option exists, is left to the user, and has a value of its type."""
    names = {field.name for field in fields(config_cls)}
    if absent := [name for name in settings if name not in names]:
        raise unknown("option", absent[0], names, f"{verb} has no option {absent[0]!r}.")
    hints = get_type_hints(config_cls)
    for name, value in settings.items():
        if name in OPTIONS:
            raise SettingsError(f"{name} is given as a setting of the trainer.", f"Give it as the option {name}.")
        if not fits(value, hints[name]):
            raise SettingsError(f"{name} is {shown(value)}.", f"Give {wanted(hints[name])}.")
    check_trackers(settings.get("report_to"))
    for name in AT_LEAST_ONE:
        if name in settings and settings[name] < 1:
            raise SettingsError(f"{name} is {settings[name]}.", "Give 1 or more.")
    for name in AT_LEAST_ZERO:
        if settings.get(name) is not None and settings[name] < 0:
            raise SettingsError(f"{name} is {settings[name]}.", "Give 0 or more.")


def _construct(config_cls: type[TowerConfig], folder: Path, train: Train, values: Mapping[str, Any]) -> TowerConfig:
    """A configuration, or what is wrong with it in our words."""
    try:
        return config_cls(output_dir=str(folder), train=train, **values)
    except PivotError:
        raise
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise SettingsError(f"The settings cannot be used: {error}", "Change the option it names.") from error


def watch_defaults(settings: Mapping[str, Any], on_pairs: bool) -> dict[str, Any]:
    """How a run with held-out rows is watched, where its settings do not say: ten looks, and the best checkpoint kept.

    Args:
        settings: the user's.
        on_pairs: whether the run trains on pairs; then the best has the lowest held-out loss, else the highest reward.
    """
    if "eval_strategy" in settings:
        return {}
    every = settings.get("eval_steps", settings.get("save_steps", EVALUATE_EVERY))
    watch: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": every}
    best = {"metric_for_best_model": "loss" if on_pairs else "reward", "greater_is_better": not on_pairs}
    saves = settings.get("save_strategy", "steps")
    if saves in ("steps", "best") and settings.get("save_steps", every) == every:
        return (
            watch
            | best
            | {"save_strategy": saves, "save_steps": every, "save_total_limit": 2}
            | {"load_best_model_at_end": True}
        )
    return watch | best


def unwatched(config: TowerConfig) -> None:
    """Switch the watch off.

    Whether rows are held out is known for sure when they have been read, long after options that cannot be are refused
    by making the configuration: a stream gives none to hold out, nor do very few rows.

    Args:
        config: of a run that holds nothing out.
    """
    config.eval_strategy = IntervalStrategy.NO
    config.load_best_model_at_end = False
    if config.save_strategy == SaveStrategy.BEST:
        config.save_strategy = SaveStrategy.STEPS
