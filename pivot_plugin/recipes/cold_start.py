"""SPECS: a short GRPO, pairs distilled from it, a cold start on these, and GRPO again.

    1 zero        GRPO on the base, until it answers in the asked format
    2 pairs       its right answers against the base model's right answers in broken formats
    3 cold-start  DPO + SFT (lambda 1) on these pairs, from the base
    4 final       GRPO from the cold start

What trains where. The paper does not say; its tools' defaults freeze the vision tower, which is what most likely was
done (LLaMA-Factory in stage 3, MM-EUREKA with `--freeze_prefix visual` in stages 1 and 4). Here stages 1 and 3 train
the language model alone, because format is a matter of language and the pairs differ in nothing that must be seen;
stage 4 trains the tower too, so that rewards for right answers reach what sees. `train=` changes it stage by stage.

Source: arXiv 2510.25801.
"""

import copy
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from pivot_plugin.config import Train
from pivot_plugin.data.pairs import PairDataset, load_pairs
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.data.sources import Source
from pivot_plugin.data.storage import save
from pivot_plugin.encoders.record import plain_name
from pivot_plugin.errors import SettingsError
from pivot_plugin.files import write_whole
from pivot_plugin.generation.distillation import INSTRUCTION, self_distill
from pivot_plugin.generation.sampling import instructed
from pivot_plugin.models.loading import load_model
from pivot_plugin.rewards.lookup import SPECS_WEIGHTS
from pivot_plugin.runs.leftovers import MODEL_FOLDER
from pivot_plugin.training.rollout_trainer import Rewards

from .runs import Keeper, Optimizing
from .stages import Stage, stage

logger = logging.getLogger(__name__)

ZERO, PAIRS, COLD_START, FINAL = "zero", "pairs", "cold-start", "final"
STAGES = (ZERO, PAIRS, COLD_START, FINAL)
TRAINS: Mapping[str, Train] = {ZERO: "language_model", COLD_START: "language_model", FINAL: "all"}
PAIRS_FOLDER = "pairs"
RECIPE_FILE = "specs.json"
REUSED = "Stages are gone on with: give a list, a data set or a file."


@dataclass
class SpecsResult:
    """What the recipe leaves.

    Attributes:
        model: after the last stage.
        processor: its own.
        stages: in order, without those skipped.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    stages: list[Stage]


def specs(
    model: PreTrainedModel | str | Path,
    questions: object,
    *,
    processor: ProcessorMixin | None = None,
    final_questions: object | None = None,
    pairs: object | None = None,
    output_dir: str | Path = "pivot-specs",
    instruction: str = INSTRUCTION,
    rewards: Rewards | None = None,
    reward_weights: list[float] | None = None,
    train: Mapping[str, Train] | None = None,
    lora: int | None = 16,
    skip: Collection[str] = (),
    stages: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> SpecsResult:
    """Run the recipe. A second call on the same folder goes on where the first stopped.

    Args:
        model: the base, loaded (left as it is) or by name.
        questions: with `answer`, as for `preferences.load_questions`.
        processor: the model's; found by its name where not given.
        final_questions: of the last stage; the same where not given.
        pairs: of the cold start, where stage "pairs" is skipped.
        output_dir: gets a folder per stage: 1-zero, 2-pairs, 3-cold-start, 4-final; each run folder has the whole
            model in `model` beside its encoder.
        instruction: asks for the format; put behind every question.
        rewards, reward_weights: of both GRPO stages; format (0.5) and accuracy (1.0) by default.
        train: per stage which parts train; see the head of this module.
        lora: LoRA rank of all stages, or None.
        skip: stages to leave out, of "zero", "pairs", "cold-start", "final". Without "zero" the base itself gives the
            chosen answers; without "cold-start" the last stage begins at the base.
        stages: settings of single stages: {"zero": {"max_steps": 200}, "pairs": {"n": 8}}; of "pairs" those of
            `preferences.self_distill`, else of `optimize`.
        **settings: of all training stages, as for `optimize`.

    Returns:
        the model after the last stage, and what each stage came to.

    Raises:
        SettingsError: for an unknown stage or option, or a folder with stages of other settings, questions or starts.
        DataError: for questions that cannot be used, or none of which gives a pair.

    Source:
        arXiv 2510.25801: lambda 1, rewards 0.5 for format and 1 for the answer, 8 roll-outs a question.
    """
    own = {name: dict(options) for name, options in (stages or {}).items()}
    parts = dict(TRAINS) | dict(train or {})
    _check_stages(skip, own, parts, pairs)
    base, processor = load_model(model, processor)
    asked = load_questions(questions)
    run = _Specs(Path(output_dir), processor, lora, settings, own, parts)
    online: dict[str, Any] = {"objective": "grpo", "rewards": rewards or list(SPECS_WEIGHTS)}
    if reward_weights is not None or rewards is None:
        online["reward_weights"] = reward_weights or list(SPECS_WEIGHTS.values())
    start = _Point(base, {"model": plain_name(base.name_or_path)})
    zero = start
    if ZERO not in skip:
        zero = run.train(ZERO, start, _instructed(asked, instruction), online)
    distilled = None if pairs is None else _verified(pairs)
    if PAIRS not in skip:
        distilled = run.distil(zero, start, asked, instruction)
    warm = start
    if COLD_START not in skip:
        assert distilled is not None
        warm = run.train(COLD_START, start, distilled, {"objective": "specs"})
    last = warm
    if FINAL not in skip:
        wanted = asked if final_questions is None else load_questions(final_questions)
        last = run.train(FINAL, warm, _instructed(wanted, instruction), online)
    return SpecsResult(last.model, processor, run.done)


def _check_stages(
    skip: Collection[str], own: Mapping[str, Any], parts: Mapping[str, Train], pairs: object | None
) -> None:
    for what, names in (("skip", skip), ("stages", own), ("train", parts)):
        if strange := sorted(set(names) - set(STAGES)):
            raise SettingsError(f"{what} names {strange}.", f"The stages are {', '.join(STAGES)}.")
    if PAIRS in skip and COLD_START not in skip and pairs is None:
        raise SettingsError("Stage 'pairs' is skipped, and the cold start has none.", "Give pairs=.")
    if set(STAGES) <= set(skip):
        raise SettingsError("All stages are skipped.", "Leave one in.")


def _instructed(questions: QuestionDataset, instruction: str) -> QuestionDataset:
    rows = [instructed(questions.plain(position), instruction) for position in range(len(questions))]
    return QuestionDataset(Source(rows, questions.name, questions.access))


def _verified(pairs: object) -> PairDataset:
    return load_pairs(pairs, "pairs", REUSED).verify()


@dataclass(frozen=True)
class _Point:
    """A model between stages, and all that decided it."""

    model: PreTrainedModel
    settings: Mapping[str, Any]


@dataclass
class _Specs:
    """The recipe on its way through its stages."""

    folder: Path
    processor: ProcessorMixin
    lora: int | None
    settings: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]]
    parts: Mapping[str, Train]
    done: list[Stage] = field(default_factory=list)

    def train(self, name: str, start: _Point, rows: PairDataset | QuestionDataset, given: Mapping[str, Any]) -> _Point:
        """A stage that trains, from a model on; or the model it left."""
        folder, parts = self._folder(name), self.parts[name]
        options = {**self.settings, **given, **self._own(name), "train": parts, "lora": self.lora}
        logger.info("Stage %s: the %s train(s).", name, parts.replace("_", " "))
        keeper = Keeper(folder, {"trains": parts})
        optimizing = Optimizing(
            folder,
            start=lambda: (copy.deepcopy(start.model), self.processor),
            rows=rows,
            held_out=None,
            options=options,
            keeper=keeper,
        )
        settings = {**options, "rows": rows.fingerprint(), "start": start.settings}
        self._note(optimizing.stage(name, settings))
        trained = keeper.model
        if trained is None:
            trained = AutoModelForImageTextToText.from_pretrained(folder / MODEL_FOLDER, trust_remote_code=False)
        return _Point(trained, settings)

    def distil(self, chosen: _Point, base: _Point, questions: QuestionDataset, instruction: str) -> PairDataset:
        """The pairs of the cold start, made of the answers of a model and of the base; or those made before."""
        folder, options = self._folder(PAIRS), self._own(PAIRS)
        trained = chosen is not base

        def work() -> dict[str, Any]:
            if PartialState().is_main_process:
                made = self_distill(
                    chosen.model,
                    questions,
                    processor=self.processor,
                    base=base.model if trained else None,
                    instruction=instruction,
                    output_dir=str(folder / "candidates"),
                    **options,
                )
                whose = "a short GRPO on it" if trained else "the model itself"
                save(
                    made,
                    folder / PAIRS_FOLDER,
                    "Self-distilled as in SPECS (arXiv 2510.25801): chosen by "
                    f"{whose}, rejected in a broken format by the base model. Such pairs teach format, not seeing.",
                )
            PartialState().wait_for_everyone()
            return {"metrics": {"pairs": len(_verified(folder / PAIRS_FOLDER))}}

        settings = {**options, "instruction": instruction, "rows": questions.fingerprint(), "start": chosen.settings}
        self._note(stage(PAIRS, folder, settings, work))
        return _verified(folder / PAIRS_FOLDER)

    def _folder(self, name: str) -> Path:
        return self.folder / f"{STAGES.index(name) + 1}-{name}"

    def _own(self, name: str) -> dict[str, Any]:
        """Settings of one stage alone."""
        return dict(self.own[name]) if name in self.own else {}

    def _note(self, done: Stage) -> None:
        self.done.append(done)
        if PartialState().is_main_process:
            told = [
                {
                    "name": one.name,
                    "folder": str(one.folder),
                    "trains": one.trains,
                    "seconds": one.seconds,
                    "metrics": one.metrics,
                }
                for one in self.done
            ]
            write_whole(self.folder / RECIPE_FILE, json.dumps(told, indent=1))
