"""The one verb: a model and preference pairs in, the model with a better vision encoder out."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.config import PivotGRPOConfig, RolloutConfig, TowerConfig, Train
from pivot_plugin.data.pairs import PairDataset, PairStream, load, load_pairs
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.data.rows import OnBadRow
from pivot_plugin.errors import SettingsError
from pivot_plugin.hooks import notify
from pivot_plugin.rewards import needs_answer, resolve_rewards
from pivot_plugin.rewards.lookup import SPECS_WEIGHTS
from pivot_plugin.training.pair_trainer import PivotTrainer
from pivot_plugin.training.plan import weight_change
from pivot_plugin.training.rollout_trainer import PivotGRPOTrainer, PivotRLOOTrainer, Rewards

from .monitoring import Monitoring
from .provenance import optimized_origin
from .result import PivotResult
from .run import Run, RunOptions, begin, merge_lora
from .settings import configuration

# the report shows a dozen
SALIENCY_PAIRS = 12


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
    monitoring = Monitoring(probes, tuple(probe_steps), saliency)
    if rewards is None and "reward_weights" not in settings and objective in ("grpo", "rloo"):
        rewards, settings = list(SPECS_WEIGHTS), settings | {"reward_weights": list(SPECS_WEIGHTS.values())}
    watched = eval_prefs is not None or eval_fraction > 0
    config = configuration(settings, Path(output_dir), objective, train, lora is not None, watched)
    functions = _reward_functions(rewards, config, objective)
    choices = {"objective": objective, **_reward_names(functions), **settings}
    options = RunOptions(config, choices, lora, eval_fraction, on_bad_row, resume)

    run = begin(model, processor, options, partial(_load_rows, prefs, eval_prefs, options, functions))
    monitoring = monitoring.with_outside(ood_prefs, run)
    run.announce()
    if run.keeper:
        notify("pivot_run_started", run=run)

    metrics: dict[str, dict[str, float]] = {}
    with run.in_place() as training:
        trainer = _trainer(run, functions)
        monitoring.add_to(trainer, run)
        trained = trainer.trained_parameters()
        if run.held_out is not None:
            metrics["before"] = trainer.reference_metrics()
        run.train(trainer)
        if run.held_out is not None:
            metrics["after"] = trainer.held_out_metrics()
        history = trainer.state.log_history
        lora_weights = merge_lora(trainer)
        # with it goes the memory of its optimiser
        del trainer

    result = PivotResult(
        model=run.model,
        processor=run.processor,
        output_dir=run.output_dir,
        metrics=metrics,
        history=history,
        # of a model that was divided the keeper alone has the weights
        weight_change={} if run.model.device.type == "meta" else weight_change(run.adapter, training.before),
        trained=trained,
        settings=run.settings,
        adapter=run.adapter,
        cost=training.cost,
        origin=optimized_origin(run, training.cost),
        _lora=lora_weights,
    )
    if run.keeper:
        # the encoder first: a run that is recorded as finished has one
        result.save(run.output_dir / "encoder")
        run.record(result, weight_change=result.weight_change, origin=result.origin)
        notify("pivot_run_finished", result=result)
    run.wait()
    return result


def _reward_functions(rewards: Rewards | None, config: TowerConfig, objective: str | Sequence[str]) -> list[Any] | None:
    """The rewards of a run on roll-outs, None for a run on pairs."""
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


def _reward_names(functions: Sequence[Any] | None) -> dict[str, list[str]]:
    """What the record of a run says of its rewards, nothing where there are none."""
    if functions is None:
        return {}
    return {
        "rewards": [
            function if isinstance(function, str) else getattr(function, "__name__", type(function).__name__)
            for function in functions
        ]
    }


def _load_rows(
    prefs: object, eval_prefs: object | None, options: RunOptions, rewards: Sequence[Any] | None
) -> tuple[PairDataset | PairStream | QuestionDataset, PairDataset | QuestionDataset | None]:
    """The rows to train on, and those held out where they are given; looked at, one by one."""
    skipped, skipped_eval = options.folder / "skipped.jsonl", options.folder / "skipped-eval.jsonl"
    if rewards is not None:
        questions = load_questions(prefs).verify(options.on_bad_row, skipped)
        needs_answer(rewards, questions)
        if eval_prefs is None:
            return questions, None
        held_out_questions = load_questions(eval_prefs, "eval_questions").verify(options.on_bad_row, skipped_eval)
        needs_answer(rewards, held_out_questions)
        return questions, held_out_questions
    pairs = load(prefs, on_bad_row=options.on_bad_row, skipped=skipped)
    if isinstance(pairs, PairStream):
        if options.config.max_steps <= 0:
            raise SettingsError("A stream of pairs has no length.", "Give max_steps=, the number of optimiser steps.")
    else:
        pairs.verify()
    if eval_prefs is None:
        return pairs, None
    held_out = load_pairs(
        eval_prefs,
        "eval_prefs",
        "Give held-out pairs as a list or a datasets.Dataset.",
        on_bad_row=options.on_bad_row,
        skipped=skipped_eval,
    )
    return pairs, held_out.verify()


def _trainer(run: Run, rewards: Sequence[Any] | None) -> PivotTrainer | PivotGRPOTrainer | PivotRLOOTrainer:
    if rewards is None:
        return PivotTrainer(**run.trainer_arguments())
    if isinstance(run.config, PivotGRPOConfig):
        return PivotGRPOTrainer(**run.trainer_arguments(), reward_funcs=rewards)
    return PivotRLOOTrainer(**run.trainer_arguments(), reward_funcs=rewards)
