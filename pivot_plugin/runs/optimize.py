"""The one verb: a model and preference pairs in, the model with a better vision encoder out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.config import PivotConfig, PivotGRPOConfig, RolloutConfig, TowerConfig, Train
from pivot_plugin.data.judging import RowJudge
from pivot_plugin.data.launch import this_launch
from pivot_plugin.data.pairs import PairDataset, PairStream, load, load_pairs
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.data.rows import OnBadRow
from pivot_plugin.data.skipped import SKIPPED_EVAL_FILE, SKIPPED_FILE
from pivot_plugin.data.sources import check_is_there
from pivot_plugin.errors import SettingsError
from pivot_plugin.generation.makers import Making, maker_of
from pivot_plugin.generation.own_answers import AnswerSummary, OwnAnswers
from pivot_plugin.hooks import notify
from pivot_plugin.objectives import ONLINE
from pivot_plugin.rewards import Scorer, needs_answer, resolve_rewards
from pivot_plugin.rewards.lookup import SPECS_WEIGHTS
from pivot_plugin.training.cost import Cost
from pivot_plugin.training.image_terms import ImageTerms
from pivot_plugin.training.looks import Look
from pivot_plugin.training.pair_trainer import PivotTrainer
from pivot_plugin.training.plan import weight_change
from pivot_plugin.training.processes import Processes
from pivot_plugin.training.rollout_trainer import PivotGRPOTrainer, PivotRLOOTrainer, Rewards
from pivot_plugin.training.sharding import refuse_use
from pivot_plugin.verdict import Verdict

from .display import Display
from .leftovers import ENCODER_FOLDER, put_back, trained_in
from .made_sheet import MadeSheet
from .making import REWARDS as MADE_REWARDS
from .making import Make, held_out_questions, made_questions, making_of
from .monitoring import Monitoring
from .outcome import has_moved, judged
from .own_answers import (
    Round,
    answered,
    in_rounds,
    is_of_pairs,
    own_answers,
    refuse_pairs,
    refuse_pairs_as_questions,
)
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
    make: Make | None = None,
    ood_prefs: object | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    allow_urls: bool = False,
    image_folder: str | Path | None = None,
    on_bad_row: OnBadRow = "raise",
    resume: bool = False,
    probes: Mapping[str, object] | None = None,
    probe_steps: Sequence[int] = (),
    saliency: int = SALIENCY_PAIRS,
    display: Display = "auto",
    **settings: Any,
) -> PivotResult:
    """Make the vision encoder of an MLLM better by preference optimisation, or by RL with verifiable rewards.

    Args:
        model: a loaded transformers MLLM, or the path or Hub id of one. A loaded one is trained in place; after a
            failure it is as it was.
        prefs: preference pairs in any form that `pivot_plugin.preferences.load` takes: a list of dicts, a
            `datasets.Dataset`, a file or folder, a Hub id, a stream (then with `max_steps`), or what `load` returned.
            With rewards questions, as `load_questions` takes them, with what the rewards need (`answer`). With `make`
            pictures, as `preferences.make` takes them: a folder is enough.
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
        rewards: names, functions with TRL's signature, or a list of these, weighted by `reward_weights=`. With "grpo"
            and "rloo" also reward models or their ids; default: format (0.5) and accuracy (1.0). With any other
            objective the model first answers the questions itself, and its better answers are paired with its worse
            ones: the pairs are kept in `own-answers` in `output_dir`.
        make: what to make of pictures: the name of a maker, such as "same_or_different" or "jigsaw", several with
            their shares, or a `preferences.Making`; then `difficulty=0.5` and `count` may be given too, and
            `eval_prefs` are held-out pictures. Answers are judged by the rule of each question ("by_rule") where
            `rewards` is not given.
        ood_prefs: rows of other distributions, or a dict of such by name: scored beside the held-out rows before
            training and at every look at them, with the Generalisation Factor of the gains, in the history under names
            that begin with "generalization/" (see `probes.plot_generalization`).
        columns, split, allow_urls, image_folder: how `prefs` and `eval_prefs` are read, as for `preferences.load`: our
            column names to the data's own ({"prompt": "instruction"}), the split of a data set, whether images given by
            address are fetched, and what relative paths of images start from.
        on_bad_row: "raise" stops at the first row that cannot be used, before training; "skip" leaves such rows out,
            also those that the model cannot take (too long, refused by its processor), and lists them in
            `skipped.jsonl` in `output_dir`; where more than half are bad it stops and says so.
        resume: go on from the last complete checkpoint in `output_dir`. Of a run that has finished, this gives the
            result again, takes no step and leaves the folder as it is.
        probes: to be run before training and on what it ends with, as for `compare`; into the history under names that
            begin with "probe/", and into the folder.
        probe_steps: optimiser steps after which to run them too.
        saliency: how many of the held-out pairs with images have their gradient maps kept, before and after, for the
            report and for trackers that take pictures (which are your held-out ones); 0 for none.
        display: what is shown while it trains: "auto" (a panel in a terminal, a table in a notebook, lines elsewhere),
            "lines", "none", or "all" (what the libraries show themselves). The folder has `log.jsonl` in any case,
            which `pivot watch` reads.
        **settings: any field of `PivotConfig` (`PivotGRPOConfig`, `PivotRLOOConfig`), which has all of TRL's DPOConfig:
            `learning_rate`, `max_steps`, `per_device_train_batch_size` (in pairs; for "grpo" in roll-outs), `beta`,
            `loss_type`, `use_cpu`, ... Where the model learns from its own answers, also any field of
            `generation.own_answers.OwnAnswers`: `samples=8`, `temperature=1.0`, `max_new_tokens`, `engine`, `redraw=0`
            (how often questions whose answers all score alike are asked again), `rounds=1` (how often the model answers
            and is trained), `reference="previous"` (or "first": what a round is held against), ...

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
    online = objective in ONLINE
    making, settings = making_of(make, settings)
    if making is not None and rewards is None:
        rewards = list(MADE_REWARDS)
    if rewards is None and "reward_weights" not in settings and online:
        rewards, settings = list(SPECS_WEIGHTS), settings | {"reward_weights": list(SPECS_WEIGHTS.values())}
    answers, trainer_settings = own_answers(settings, objective, rewards, online)
    if answers is not None and making is None:
        refuse_pairs(prefs)
    watched = eval_prefs is not None or eval_fraction > 0
    config = configuration(trainer_settings, Path(output_dir), objective, train, lora is not None, watched)
    if isinstance(config, PivotConfig) and config.rejected_images is not None:
        # whether there is such a maker; it is asked late
        maker_of(config.rejected_images, config.rejected_difficulty, rejected=True)
    functions = _reward_functions(rewards, config, objective)
    told = {"columns": columns, "split": split, "allow_urls": allow_urls, "image_folder": image_folder}
    reading = {name: value for name, value in told.items() if value}
    source = _Source(prefs, eval_prefs, ood_prefs, functions, answers, making, reading)
    if making is None:
        for data, name in ((prefs, "prefs"), (eval_prefs, "eval_prefs")):
            check_is_there(data, name)
    own = {} if answers is None else answers.as_dict()
    made = {} if making is None else {"make": making.as_dict()}
    choices = {"objective": objective, **_reward_names(functions), **settings, **own, **made, **reading}
    options = RunOptions(config, choices, lora, eval_fraction, on_bad_row, resume, display)
    if answers is None or answers.rounds == 1:
        return _optimize(model, processor, options, source, monitoring, Round())

    def train_round(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, this: Round) -> PivotResult:
        # a configuration belongs to one trainer, which changes it
        of_round = configuration(trainer_settings, folder, objective, train, lora is not None, watched)
        # an earlier round that was cut off goes on where this run does
        return _optimize(model, processor, replace(options, config=of_round), source, monitoring, this)

    result: PivotResult = in_rounds(model, processor, options, answers, train_round)
    return result


@dataclass(frozen=True)
class _Source:
    """Where the rows of a run come from.

    Attributes:
        prefs, eval_prefs, ood_prefs: as `optimize` was given them.
        rewards: that score answers, None for a run on pairs.
        answers: how own answers become pairs, None where they do not.
        making: what is made of pictures, None where rows are given.
        reading: how rows are read, of `preferences.load`'s options.
    """

    prefs: object
    eval_prefs: object | None
    ood_prefs: object | None
    rewards: Sequence[Any] | None
    answers: OwnAnswers | None
    making: Making | None
    reading: Mapping[str, Any]

    @property
    def rollout_rewards(self) -> Sequence[Any] | None:
        """The rewards of a run on roll-outs, None for a run on pairs, whoever made them."""
        return None if self.answers else self.rewards


def _optimize(
    model: PreTrainedModel | str | Path,
    processor: ProcessorMixin | None,
    options: RunOptions,
    source: _Source,
    monitoring: Monitoring,
    this: Round,
) -> PivotResult:
    """One run, or one round of several, from options to result."""
    processes = Processes(options.config.distributed_state)
    with processes.together():
        run = begin(model, processor, options, partial(_load_rows, source, options), processes)
        return _optimized(run, source, monitoring, this)


def _optimized(run: Run, source: _Source, monitoring: Monitoring, this: Round) -> PivotResult:
    """A run that is ready, from its rows to its result."""
    sheet = None if source.making is None else MadeSheet.begin(run)
    answers: tuple[AnswerSummary, ...] = ()
    if source.answers is not None:
        run, summary = answered(run, source.rewards or (), source.answers, this.number)
        answers = (*this.earlier, summary)
    monitoring = monitoring.with_outside(source.ood_prefs, run)
    run.announce()
    if run.keeper and run.ended is None:
        notify("pivot_run_started", run=run)

    looks: list[Look] = []
    blind: list[Look | None] = []
    measured = run.held_out is not None and run.ended is None
    with run.in_place() as training:
        if run.ended is not None and run.left is not None:
            put_back(run.left, run.adapter)
            trained, history, planned, lora_weights = trained_in(run.ended), [], 0, None
        else:
            trainer = _trainer(run, source.rollout_rewards, this.reference)
            if run.ended is None:
                monitoring.add_to(trainer, run)
            trained = trainer.trained_parameters()
            if measured:
                looks.append(trainer.look_before())
                blind.append(trainer.look_blind())
            run.train(trainer)
            if measured:
                looks.append(trainer.look_now())
                blind.append(trainer.look_blind())
            history, planned = trainer.state.log_history, trainer.state.max_steps
            lora_weights = merge_lora(trainer)
            # with it goes the memory of its optimiser
            del trainer

    metrics = {when: look.metrics for when, look in zip(("before", "after"), looks, strict=False)}
    before = dict(this.before or training.before)
    result = PivotResult(
        model=run.model,
        processor=run.processor,
        output_dir=run.output_dir,
        metrics=metrics if run.ended is None else run.ended["metrics"],
        history=history if run.ended is None else run.ended["history"],
        # of a model that was divided the keeper alone has the weights
        weight_change=({} if run.model.device.type == "meta" else weight_change(run.adapter, before)),
        trained=trained,
        settings=run.settings,
        adapter=run.adapter,
        cost=training.cost if run.ended is None else Cost(**run.ended["cost"]),
        origin=(
            optimized_origin(run, training, lora_weights[1] if lora_weights else ())
            if run.ended is None
            else run.ended["origin"]
        ),
        answers=list(answers),
        verdict=(
            judged(run, (looks, blind), history, planned, has_moved(run.model, before))
            if run.ended is None
            else Verdict.from_dict(run.ended.get("verdict")) or Verdict()
        ),
        # of several rounds, the last one's LoRA is not what makes the encoder of the base
        _lora=lora_weights if this.of == 1 else None,
    )
    if run.keeper and run.ended is None:
        if sheet is not None:
            sheet.finish(run, run.model)
        # the encoder first: a run that is recorded as finished has one
        result.save(run.output_dir / ENCODER_FOLDER)
        details: dict[str, Any] = {"verdict": result.verdict.as_dict()}
        details |= {"answers": [summary.as_dict() for summary in answers]} if answers else {}
        run.record(result, weight_change=result.weight_change, origin=result.origin, **details)
        notify("pivot_run_finished", result=result)
    refuse_use(run.model)
    run.wait()
    return result


def _reward_functions(rewards: Rewards | None, config: TowerConfig, objective: str | Sequence[str]) -> list[Any] | None:
    """The rewards of a run on roll-outs or on own answers, None for a run on given pairs."""
    if rewards is not None:
        functions = resolve_rewards(rewards)  # type: ignore[arg-type]
        if not isinstance(config, RolloutConfig):
            # reward models are the online trainers'
            Scorer(functions)
        return functions
    if isinstance(config, RolloutConfig):
        raise SettingsError(f"objective={objective!r} got no rewards.", 'Give rewards=, such as ["accuracy"].')
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
    source: _Source, options: RunOptions, judge: RowJudge
) -> tuple[PairDataset | PairStream | QuestionDataset, PairDataset | QuestionDataset | None]:
    """The rows to train on, and those held out where they are given; looked at, one by one."""
    if source.rewards is not None:
        return _load_questions(source, options, judge)
    skipped = options.folder / SKIPPED_FILE
    pairs = load(source.prefs, skipped=skipped, **source.reading)
    if isinstance(pairs, PairStream):
        if options.config.max_steps <= 0:
            raise SettingsError("A stream of pairs has no length.", "Give max_steps=, the number of optimiser steps.")
        pairs = pairs.judged(judge, options.on_bad_row, skipped)
    else:
        config = options.config
        if isinstance(config, PivotConfig) and config.rejected_images is None and options.on_bad_row == "raise":
            # with their count, before any image is opened
            ImageTerms.of(config.image_terms, config.image_weights).check(pairs, looked=False)
        pairs.verify(options.on_bad_row, skipped, judge, this_launch())
    return pairs, None if source.eval_prefs is None else _held_out_pairs(source, options, judge)


def _load_questions(
    source: _Source, options: RunOptions, judge: RowJudge
) -> tuple[QuestionDataset, PairDataset | QuestionDataset | None]:
    """The questions to ask; of those held out for own answers, pairs are as welcome as questions."""
    rewards = source.rewards or ()
    questions = (
        load_questions(source.prefs, **source.reading)
        if source.making is None
        else made_questions(source.prefs, source.making)
    )
    if source.answers is not None:
        refuse_pairs(questions)
    else:
        refuse_pairs_as_questions(questions, options.choices["objective"])
    judge_asked = judge.of_questions(given_text=source.answers is not None and source.answers.engine is not None)
    skipped, launch = options.folder / SKIPPED_FILE, this_launch()
    questions = questions.verify(options.on_bad_row, skipped, judge_asked, launch)
    needs_answer(rewards, questions)
    if source.eval_prefs is None:
        return questions, None
    if source.answers is not None and isinstance(source.eval_prefs, PairDataset):
        return questions, _held_out_pairs(source, options, judge)
    if source.making is not None and not isinstance(source.eval_prefs, QuestionDataset):
        held_out = held_out_questions(source.eval_prefs, source.making, len(questions))
    else:
        held_out = load_questions(source.eval_prefs, "eval_questions", **source.reading)
    if source.answers is not None and is_of_pairs(held_out):
        return questions, _held_out_pairs(source, options, judge)
    skipped = options.folder / SKIPPED_EVAL_FILE
    held_out = held_out.verify(options.on_bad_row, skipped, judge_asked, launch)
    needs_answer(rewards, held_out)
    return questions, held_out


def _held_out_pairs(source: _Source, options: RunOptions, judge: RowJudge) -> PairDataset:
    remedy = "Give held-out pairs as a list or a datasets.Dataset."
    pairs = load_pairs(source.eval_prefs, "eval_prefs", remedy, **source.reading)
    return pairs.verify(options.on_bad_row, options.folder / SKIPPED_EVAL_FILE, judge, this_launch())


def _trainer(
    run: Run, rewards: Sequence[Any] | None, reference: PreTrainedModel | None
) -> PivotTrainer | PivotGRPOTrainer | PivotRLOOTrainer:
    if rewards is None:
        return PivotTrainer(**run.trainer_arguments(), ref_model=reference)
    if isinstance(run.config, PivotGRPOConfig):
        return PivotGRPOTrainer(**run.trainer_arguments(), reward_funcs=rewards)
    return PivotRLOOTrainer(**run.trainer_arguments(), reward_funcs=rewards)
