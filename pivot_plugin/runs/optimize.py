"""The one verb: a model and preference pairs in, the model with a better vision encoder out."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import PivotGRPOConfig, PivotRLOOConfig, RolloutConfig, TowerConfig, Train
from pivot_plugin.data.pairs import PairDataset, PairStream, load
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.data.rows import OnBadRow
from pivot_plugin.data.split import hold_out
from pivot_plugin.encoders.card import licence_of
from pivot_plugin.encoders.record import plain_name, versions
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.hooks import notify
from pivot_plugin.models.find import check_processor, find_adapter
from pivot_plugin.models.loading import load_model
from pivot_plugin.probes.lookup import runners
from pivot_plugin.probes.subjects import Subject
from pivot_plugin.rewards import needs_answer, resolve_rewards
from pivot_plugin.rewards.lookup import SPECS_WEIGHTS
from pivot_plugin.training.checkpoints import last_checkpoint
from pivot_plugin.training.cost import Cost, tower_facts
from pivot_plugin.training.pair_trainer import PivotTrainer
from pivot_plugin.training.plan import plan, weight_change
from pivot_plugin.training.rollout_trainer import PivotGRPOTrainer, PivotRLOOTrainer, Rewards

from .folder import claim, write_record
from .generalization_recorder import GeneralizationRecorder
from .in_place import in_place
from .monitoring import ProbeRecorder, first_with_images
from .result import PivotResult
from .settings import configuration, unwatched

logger = logging.getLogger(__name__)

# the report shows a dozen
SALIENCY_PAIRS = 12


@dataclass(frozen=True)
class _Run:
    """What plugins are told of a run that starts."""

    family: str
    output_dir: Path
    settings: dict[str, Any]


@dataclass(frozen=True)
class _Looks:
    """What is looked at while a run goes on, beside the held-out rows."""

    outside: dict[str, Any]
    probes: dict[str, object]
    steps: tuple[int, ...]
    saliency: int


def optimize(
    model: PreTrainedModel | str | Path,
    prefs: object,
    *,
    processor: ProcessorMixin | None = None,
    eval_prefs: object | None = None,
    output_dir: str | Path = "pivot-run",
    objective: str | Sequence[str] = "dpo",
    train: Train = "encoder",
    lora: int | LoraConfig | None = 16,
    eval_fraction: float = 0.02,
    rewards: Rewards | None = None,
    ood_prefs: object | None = None,
    on_bad_row: OnBadRow = "raise",
    resume: bool = False,
    probes: Mapping[str, object] | None = None,
    probe_steps: Sequence[int] = (),
    saliency: int = SALIENCY_PAIRS,
    **settings: Any,
) -> PivotResult:
    """Make the vision encoder of an MLLM better by preference optimisation, or by RL with verifiable rewards.

    Args:
        model: a loaded transformers MLLM, or the path or Hub id of one. A loaded one is trained in place; after a
            failure it is as it was.
        prefs: preference pairs in any form that `pivot_plugin.preferences.load` takes: a list of dicts, a
            `datasets.Dataset`, a file or folder, a Hub id, a stream (then with `max_steps`), or what `load` returned.
            For "grpo" and "rloo" questions, as `load_questions` takes them, with what the rewards need (`answer`).
        processor: the model's; found by the model's `name_or_path` where not given.
        eval_prefs: held-out pairs or questions, in the same forms.
        output_dir: folder of the run: checkpoints, log, encoder.
        objective: "dpo", "mpo", "specs", "sft", "ipo", "dpo_norm", "grpo", "rloo", any other name a plugin offers, a
            TRL loss type, or a list of those (weighted by `loss_weights=`).
        train: "encoder" (the tower), "encoder+projector", "all", or "language_model" alone.
        lora: a LoRA rank, a peft config, or None to train the weights themselves.
        eval_fraction: share of the rows to hold out where `eval_prefs` is not given (at least 32 and at most 1000, at
            most a quarter of all, no image on both sides); 0 holds none out. Held-out rows are looked at ten times
            during training: the best checkpoint is kept, and after `patience` looks without a better one the run stops.
        rewards: for "grpo" and "rloo": names, functions with TRL's signature, reward models or their ids, or a list of
            these, weighted by `reward_weights=`. Default: format (0.5) and accuracy (1.0).
        ood_prefs: rows of other distributions, or a dict of such by name: scored beside the held-out rows before
            training and at every look at them, with the Generalisation Factor of the gains, in the history under names
            that begin with "generalization/" (see `probes.plot_generalization`).
        on_bad_row: "raise" stops at the first row that cannot be used, before training; "skip" leaves such rows out
            and lists them in `skipped.jsonl` in `output_dir`.
        resume: go on from the last complete checkpoint in `output_dir`.
        probes: to be run before training and on what it ends with, as for `compare`; into the history under names that
            begin with "probe/", and into the folder.
        probe_steps: optimiser steps after which to run them too.
        saliency: how many of the held-out pairs with images have their gradient maps kept, before and after, for the
            report; 0 for none.
        **settings: any field of `PivotConfig` (`PivotGRPOConfig`, `PivotRLOOConfig`), which has all of TRL's DPOConfig:
            `learning_rate`, `max_steps`, `per_device_train_batch_size` (in pairs; for "grpo" in roll-outs), `beta`,
            `loss_type`, `use_cpu`, ...

    Returns:
        The trained model, its encoder, and what was measured.

    Raises:
        SettingsError: for an option that does not exist or cannot be used, before anything is loaded.
        DataError, ModelError: for rows or a model that cannot be used, before training.
        TrainingError: if training goes wrong; checkpoints stay in `output_dir`.

    Source:
        arXiv 2510.16333, section 3.1, stage 2; "grpo": arXiv 2510.25801, stage 3.
    """
    folder = Path(output_dir)
    if saliency < 0 or any(step < 1 for step in probe_steps):
        raise SettingsError(
            f"saliency is {saliency}, probe_steps {list(probe_steps)}.", "Give 0 or more pairs, steps of 1 or more."
        )
    if probes is not None:
        runners(probes)
    if not 0 <= eval_fraction < 1:
        raise SettingsError(f"eval_fraction is {eval_fraction}.", "Give a share of at least 0 and below 1.")
    watched = eval_prefs is not None or eval_fraction > 0
    if rewards is None and "reward_weights" not in settings and objective in ("grpo", "rloo"):
        rewards, settings = list(SPECS_WEIGHTS), settings | {"reward_weights": list(SPECS_WEIGHTS.values())}
    config = configuration(settings, folder, objective, train, lora is not None, watched)
    functions = _reward_functions(rewards, config, objective)
    described = {
        "objective": objective,
        "train": train,
        "lora": lora if isinstance(lora, int | None) else lora.to_dict(),
        "eval_fraction": eval_fraction,
        "learning_rate": config.learning_rate,
        **({"rewards": [_name_of(function) for function in functions]} if functions else {}),
        **settings,
    }
    # of several processes one keeps the folder
    keeper = config.process_index == 0
    base = model if isinstance(model, str | Path) else getattr(model, "name_or_path", "")
    if keeper:
        claim(folder, described, resume)
    config.distributed_state.wait_for_everyone()
    model, processor = load_model(model, processor)
    adapter = find_adapter(model)
    check_processor(model, processor, adapter)
    plan(adapter, train, lora, config.frozen or ())
    rows, held_out = _rows(prefs, eval_prefs, config, folder, on_bad_row)
    if functions:
        for data in (rows, held_out):
            if isinstance(data, QuestionDataset):
                needs_answer(functions, data)
    if (held_out is None and isinstance(rows, PairDataset)) or (held_out is None and isinstance(rows, QuestionDataset)):
        rows, held_out = hold_out(rows, eval_fraction, config.seed)
    if held_out is None:
        unwatched(config)
    outside = _outside(ood_prefs, rows, held_out)
    if keeper:
        write_record(folder, {"finished": False, "settings": described})
        notify("pivot_run_started", run=_Run(adapter.family, folder, described))
    looks = _Looks(outside, dict(probes or {}), tuple(probe_steps), saliency)
    result = _train(model, processor, adapter, config, rows, held_out, looks, lora, functions, resume, described)
    result.origin = _origin(base, model, adapter, config, rows, held_out, result.cost)
    if keeper:
        result.save(folder / "encoder")
        record = {
            "finished": True,
            "settings": described,
            "metrics": result.metrics,
            "weight_change": result.weight_change,
            "trained": result.trained,
            "history": result.history,
            "cost": asdict(result.cost),
            "origin": result.origin,
        }
        write_record(folder, record)
        notify("pivot_run_finished", result=result)
    config.distributed_state.wait_for_everyone()
    return result


def _reward_functions(rewards: Rewards | None, config: TowerConfig, objective: str | Sequence[str]) -> list[Any] | None:
    if isinstance(config, RolloutConfig):
        if rewards is None:
            raise SettingsError(f"objective={objective!r} got no rewards.", 'Give rewards=, such as ["accuracy"].')
        return resolve_rewards(rewards)  # type: ignore[arg-type]
    if rewards is not None:
        raise SettingsError(
            f"rewards are given with objective={objective!r}, which learns from pairs.",
            'Use objective="grpo", or make pairs by pivot_plugin.preferences.rank.',
        )
    return None


def _name_of(reward: object) -> str:
    return str(reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__))


def _rows(
    prefs: object, eval_prefs: object | None, config: TowerConfig, folder: Path, on_bad_row: OnBadRow
) -> tuple[PairDataset | PairStream | QuestionDataset, PairDataset | QuestionDataset | None]:
    """The rows to train on and those held out, where they are given; all looked at."""
    skipped, skipped_eval = folder / "skipped.jsonl", folder / "skipped-eval.jsonl"
    if isinstance(config, RolloutConfig):
        questions = load_questions(prefs).verify(on_bad_row, skipped)
        if eval_prefs is None:
            return questions, None
        return questions, load_questions(eval_prefs, "eval_questions").verify(on_bad_row, skipped_eval)
    pairs = load(prefs, on_bad_row=on_bad_row, skipped=skipped)
    if isinstance(pairs, PairStream):
        if config.max_steps <= 0:
            raise SettingsError("A stream of pairs has no length.", "Give max_steps=, the number of optimiser steps.")
    else:
        pairs.verify()
    if eval_prefs is None:
        return pairs, None
    held_out = load(eval_prefs, on_bad_row=on_bad_row, skipped=skipped_eval, name="eval_prefs")
    if isinstance(held_out, PairStream):
        raise DataError("eval_prefs is a stream.", "Give held-out pairs as a list or a datasets.Dataset.")
    return pairs, held_out.verify()


def _outside(ood_prefs: object | None, rows: object, held_out: object | None) -> dict[str, Any]:
    """Rows of other distributions by name, looked at."""
    if ood_prefs is None:
        return {}
    if held_out is None:
        raise SettingsError(
            "ood_prefs are given, and no row is held out to compare with.", "Give eval_prefs= or an eval_fraction."
        )
    sets = ood_prefs if isinstance(ood_prefs, dict) else {"ood_prefs": ood_prefs}
    if isinstance(rows, QuestionDataset):
        return {name: load_questions(source, name).verify() for name, source in sets.items()}
    loaded = {name: load(source, name=name) for name, source in sets.items()}
    for name, data in loaded.items():
        if isinstance(data, PairStream):
            raise DataError(f"{name} is a stream.", "Give rows with random access.")
        data.verify()
    return loaded


def _trainer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    adapter: VisionAdapter,
    config: TowerConfig,
    rows: PairDataset | PairStream | QuestionDataset,
    held_out: PairDataset | QuestionDataset | None,
    lora: int | LoraConfig | None,
    rewards: Any,
) -> PivotTrainer | PivotGRPOTrainer | PivotRLOOTrainer:
    common: dict[str, Any] = {
        "model": model,
        "args": config,
        "train_dataset": rows,
        "eval_dataset": held_out,
        "processing_class": processor,
        "lora": lora,
        "adapter": adapter,
    }
    if isinstance(config, PivotGRPOConfig):
        return PivotGRPOTrainer(**common, reward_funcs=rewards)
    if isinstance(config, PivotRLOOConfig):
        return PivotRLOOTrainer(**common, reward_funcs=rewards)
    return PivotTrainer(**common)


def _train(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    adapter: VisionAdapter,
    config: TowerConfig,
    rows: PairDataset | PairStream | QuestionDataset,
    held_out: PairDataset | QuestionDataset | None,
    looks: _Looks,
    lora: int | LoraConfig | None,
    rewards: list[Any] | None,
    resume: bool,
    described: dict[str, Any],
) -> PivotResult:
    """Train in place; on any failure, a keyboard interrupt included, put the model back as it was."""
    folder = Path(config.output_dir or ".")
    with in_place(adapter, plan(adapter, config.train, lora, config.frozen or ()), folder) as training:
        set_seed(config.seed)
        trainer = _trainer(model, processor, adapter, config, rows, held_out, lora, rewards)
        if held_out is not None and looks.outside:
            trainer.add_callback(GeneralizationRecorder(trainer, held_out, looks.outside))
        pairs = first_with_images(held_out, looks.saliency) if isinstance(held_out, PairDataset) else None
        if looks.probes or pairs is not None:
            who = Subject("model", adapter, adapter.image_processor(processor), processor)
            trainer.add_callback(ProbeRecorder(trainer, who, looks.probes, looks.steps, pairs, folder))
        trained = trainer.trained_parameters()
        metrics = {}
        if held_out is not None:
            metrics["before"] = trainer.reference_metrics()
        checkpoint = last_checkpoint(folder) if resume else None
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if held_out is not None:
            metrics["after"] = trainer.held_out_metrics()
        history = trainer.state.log_history
        kept_lora = None
        if isinstance(trainer.model, PeftModel):
            kept_lora = _lora_of(trainer.model)
            trainer.model.merge_and_unload()
        del trainer
    return PivotResult(
        model=model,
        processor=processor,
        output_dir=folder,
        metrics=metrics,
        history=history,
        weight_change=weight_change(adapter, training.before),
        trained=trained,
        settings=described,
        adapter=adapter,
        cost=training.cost,
        _lora=kept_lora,
    )


def _lora_of(model: PeftModel) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Configuration and weights, on the host, of a model's LoRA."""
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in get_peft_model_state_dict(model).items()}
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, LoraConfig)
    return config, weights


def _origin(
    base: object,
    model: PreTrainedModel,
    adapter: VisionAdapter,
    config: TowerConfig,
    rows: PairDataset | PairStream | QuestionDataset,
    held_out: PairDataset | QuestionDataset | None,
    cost: Cost,
) -> dict[str, Any]:
    """Where a run comes from, in words that may be published."""
    known = None if isinstance(rows, PairStream) else rows
    return {
        "base": {
            "mllm": plain_name(base),
            "mllm_revision": getattr(model.config, "_commit_hash", None),
            "encoder": plain_name(getattr(adapter.tower.config, "_name_or_path", "")) or None,
            "licence": licence_of(str(base)),
        },
        "family": adapter.family,
        "mllm_class": type(model).__name__,
        "encoder_class": type(adapter.tower).__name__,
        "tower": tower_facts(adapter),
        "data": {
            "name": "" if (name := getattr(rows, "name", "")) in ("prefs", "questions") else plain_name(name),
            "rows": None if known is None else len(known),
            "fingerprint": None if known is None else known.fingerprint(),
            "held_out": len(held_out) if held_out is not None else 0,
        },
        "versions": versions(),
        "seed": config.seed,
        "batch": config.train_batch_size * config.gradient_accumulation_steps * config.world_size,
        "cost": asdict(cost),
    }
