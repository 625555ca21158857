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
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from pivot_plugin.config import Train
from pivot_plugin.data.pairs import PairDataset, load
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.data.sources import Source
from pivot_plugin.data.storage import save
from pivot_plugin.errors import SettingsError
from pivot_plugin.files import read_record
from pivot_plugin.generation.distillation import INSTRUCTION, self_distill
from pivot_plugin.generation.sampling import instructed
from pivot_plugin.models.loading import load_model
from pivot_plugin.rewards.lookup import SPECS_WEIGHTS
from pivot_plugin.runs.optimize import optimize
from pivot_plugin.training.rollout_trainer import Rewards

logger = logging.getLogger(__name__)

ZERO, PAIRS, COLD_START, FINAL = "zero", "pairs", "cold-start", "final"
STAGES = (ZERO, PAIRS, COLD_START, FINAL)
TRAINS: Mapping[str, Train] = {ZERO: "language_model", COLD_START: "language_model", FINAL: "all"}
MODEL_FOLDER = "model"
RECIPE_FILE = "specs.json"


@dataclass(frozen=True)
class Stage:
    """One stage as it ended.

    Attributes:
        name: of the stage.
        folder: its run folder; of the pairs the data set.
        trains: which parts trained, None for the pairs.
        seconds: it took, 0 where it was finished before.
        metrics: before and after on held-out rows; of the pairs their number.
    """

    name: str
    folder: str
    trains: str | None
    seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)


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
        SettingsError: for an unknown stage or option, or a folder with another recipe's stages.
        DataError: for questions that cannot be used, or none of which gives a pair.

    Source:
        arXiv 2510.25801: lambda 1, rewards 0.5 for format and 1 for the answer, 8 roll-outs a question.
    """
    own = {name: dict(options) for name, options in (stages or {}).items()}
    parts = dict(TRAINS) | dict(train or {})
    for what, names in (("skip", skip), ("stages", own), ("train", parts)):
        if unknown := sorted(set(names) - set(STAGES)):
            raise SettingsError(f"{what} names {unknown}.", f"The stages are {', '.join(STAGES)}.")
    if PAIRS in skip and COLD_START not in skip and pairs is None:
        raise SettingsError("Stage 'pairs' is skipped, and the cold start has none.", "Give pairs=.")
    if set(STAGES) <= set(skip):
        raise SettingsError("All stages are skipped.", "Leave one in.")
    base, processor = load_model(model, processor)
    folder = Path(output_dir)
    asked = load_questions(questions)
    run = _Recipe(folder, processor, lora, settings, own, parts)
    online: dict[str, Any] = {"objective": "grpo", "rewards": rewards or list(SPECS_WEIGHTS)}
    online["reward_weights"] = reward_weights or (list(SPECS_WEIGHTS.values()) if rewards is None else None)
    zero = base
    if ZERO not in skip:
        zero = run.train(1, ZERO, base, _instructed(asked, instruction), online)
    distilled: object = pairs
    if PAIRS not in skip:
        distilled = run.distil(2, zero, base if zero is not base else None, asked, instruction)
    warm = base
    if COLD_START not in skip:
        warm = run.train(3, COLD_START, base, distilled, {"objective": "specs"})
    last = warm
    if FINAL not in skip:
        wanted = asked if final_questions is None else load_questions(final_questions)
        last = run.train(4, FINAL, warm, _instructed(wanted, instruction), online)
    return SpecsResult(last, processor, run.done)


def _instructed(questions: QuestionDataset, instruction: str) -> QuestionDataset:
    rows = [instructed(questions.plain(position), instruction) for position in range(len(questions))]
    return QuestionDataset(Source(rows, questions.name, questions.access))


@dataclass
class _Recipe:
    """Stages that are run, or found finished."""

    folder: Path
    processor: ProcessorMixin
    lora: int | None
    settings: dict[str, Any]
    own: dict[str, dict[str, Any]]
    parts: dict[str, Train]
    done: list[Stage] = field(default_factory=list)

    def train(
        self, number: int, name: str, start: PreTrainedModel, rows: object, given: dict[str, Any]
    ) -> PreTrainedModel:
        place = self.folder / f"{number}-{name}"
        parts = self.parts[name]
        record = read_record(place)
        if record and record.get("finished") and (place / MODEL_FOLDER / "config.json").exists():
            logger.info("Stage %s is finished: %s.", name, place)
            loaded: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(place / MODEL_FOLDER)
            self._note(Stage(name, str(place), parts, 0.0, record.get("metrics", {})))
            return loaded
        logger.info("Stage %s: the %s train(s).", name, parts.replace("_", " "))
        options = self.settings | given | self.own.get(name, {})
        if options.get("reward_weights", 0) is None:
            del options["reward_weights"]
        began = time.monotonic()
        result = optimize(
            copy.deepcopy(start),
            rows,
            processor=self.processor,
            output_dir=place,
            train=parts,
            lora=self.lora,
            resume=record is not None,
            **options,
        )
        aside = place / f".{MODEL_FOLDER}"
        result.model.save_pretrained(aside)
        self.processor.save_pretrained(aside)
        aside.rename(place / MODEL_FOLDER)
        self._note(Stage(name, str(place), parts, time.monotonic() - began, result.metrics))
        return result.model

    def distil(
        self,
        number: int,
        model: PreTrainedModel,
        base: PreTrainedModel | None,
        questions: QuestionDataset,
        instruction: str,
    ) -> PairDataset:
        place = self.folder / f"{number}-{PAIRS}"
        began = time.monotonic()
        if not (place / "pairs" / "data").is_dir():
            made = self_distill(
                model,
                questions,
                processor=self.processor,
                base=base,
                instruction=instruction,
                output_dir=str(place / "candidates"),
                **self.own.get(PAIRS, {}),
            )
            whose = "a short GRPO on it" if base is not None else "the model itself"
            save(
                made,
                place / "pairs",
                "Self-distilled as in SPECS (arXiv 2510.25801): chosen by "
                f"{whose}, rejected in a broken format by the base model. Such pairs teach format, not seeing.",
            )
        pairs = load(place / "pairs")
        assert isinstance(pairs, PairDataset)
        self._note(Stage(PAIRS, str(place / "pairs"), None, time.monotonic() - began, {"pairs": len(pairs)}))
        return pairs

    def _note(self, stage: Stage) -> None:
        self.done.append(stage)
        (self.folder / RECIPE_FILE).write_text(json.dumps([asdict(one) for one in self.done], indent=1))
