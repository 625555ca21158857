"""A recipe that begins with an MLLM: arms train it, and the towers are taken out and compared.

    seed-0/grpo, seed-0/sft, ...     a run of `optimize` for each arm, with its encoder and its whole model
    seed-0/towers                    the encoder of the MLLM as it was, and of every arm
    seed-0/comparison.json           every probe of every tower, and which differences are beyond noise

Arms that draw roll-outs ("grpo", "rloo") read rows as questions; so do those with `rewards`, which learn from own
answers; all others read pairs. Rows in TWIN's layout are both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from accelerate import PartialState
from peft import LoraConfig

from pivot_plugin.config import PivotConfig, PivotGRPOConfig, PivotRLOOConfig, Train
from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.data.rows import OnBadRow
from pivot_plugin.errors import SettingsError
from pivot_plugin.models.loading import load_model
from pivot_plugin.objectives import ONLINE, resolve
from pivot_plugin.probes.comparison import Comparison, compare
from pivot_plugin.probes.lookup import ProbeTask
from pivot_plugin.rewards import resolve_rewards
from pivot_plugin.runs.leftovers import MODEL_FOLDER
from pivot_plugin.runs.settings import configuration
from pivot_plugin.typed import shown

from .door import Key, RecipeError, Section, plain, read, values_of
from .inputs import made, pairs, sampled
from .plan import PlannedStage, RecipePlan
from .runs import Keeper, Optimizing
from .sections import Evaluation, Made, Stored, accumulated, checked_seeds, declared_rows, part_of, rows_of
from .stages import Stage

BASE = "base"
TOWERS, COMPARISON = "towers", "comparison.json"


@dataclass(frozen=True)
class TrainedArm(Section):
    """One arm: an objective, and what its trainer is told.

    Attributes:
        objective: its own; the arm's name where None.
        rewards: weights by name; with any objective that draws no roll-outs, own answers become pairs by them.
        batch: rows of an optimiser step over all processes: pairs, or questions with all their roll-outs.
        settings: of the trainer.
    """

    CONFIG: ClassVar[type | None] = PivotConfig

    objective: str | list[str] | None = None
    rewards: dict[str, float] | None = None
    batch: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def of_questions(self) -> bool:
        """Whether rows are read as questions."""
        return self.rewards is not None


@dataclass(frozen=True)
class RolloutArm(TrainedArm):
    """An arm that draws roll-outs; as `TrainedArm` otherwise."""

    CONFIG: ClassVar[type | None] = PivotGRPOConfig

    @property
    def of_questions(self) -> bool:
        return True


@dataclass(frozen=True)
class RlooArm(RolloutArm):
    """As `RolloutArm`, of REINFORCE leave-one-out."""

    CONFIG: ClassVar[type | None] = PivotRLOOConfig


def _arms(value: object, key: Key) -> dict[str, TrainedArm]:
    if not isinstance(value, Mapping) or not value:
        raise RecipeError(f"{'.'.join(key)} is {shown(value)}.", "For example: arms: {grpo: {}, sft: {}}.", key)
    return {str(name): _arm(str(name), arm, (*key, str(name))) for name, arm in value.items()}


def _arm(name: str, value: object, key: Key) -> TrainedArm:
    value = {} if value is None else value
    own = value.get("objective") if isinstance(value, Mapping) else getattr(value, "objective", None)
    objective = own or name
    if name == BASE:
        raise RecipeError(f"{'.'.join(key)} is what the MLLM itself is called.", "Choose another name.", key)
    try:
        resolve(objective)  # type: ignore[arg-type]
    except SettingsError as error:
        raise RecipeError(f"{'.'.join(key)}: {error.finding}", error.remedy, key) from error
    kinds: dict[object, type[TrainedArm]] = {"grpo": RolloutArm, "rloo": RlooArm}
    arm = read(kinds[objective] if objective in ONLINE else TrainedArm, value, key)
    if arm.rewards is not None:
        try:
            resolve_rewards(list(arm.rewards))
        except SettingsError as error:
            raise RecipeError(f"{'.'.join(key)}.rewards: {error.finding}", error.remedy, (*key, "rewards")) from error
    if arm.batch is not None and arm.batch < 1:
        raise RecipeError(f"{'.'.join(key)}.batch is {arm.batch}.", "Give 1 or more.", (*key, "batch"))
    return arm


@dataclass
class PostTraining(Section):
    """A recipe that begins with an MLLM.

    Attributes:
        model: a loaded MLLM, its folder or Hub id.
        data: rows, `Stored` or `Made`.
        arms: by name what trains, each from the same MLLM on the same rows.
        evaluate: by label `probe`, `data` and `options`, of the towers.
        eval_data: held-out rows; a share of `data` where None.
        train, lora, eval_fraction, on_bad_row: as for `pivot.optimize`, of all arms.
        seeds: of everything.
        output_dir: gets a folder per seed and arm.

    Raises:
        RecipeError: for a key or value that cannot be used.
    """

    model: Annotated[Any, part_of]
    data: Annotated[Any, rows_of]
    arms: Annotated[dict[str, TrainedArm], _arms]
    evaluate: dict[str, Evaluation] = field(default_factory=dict)
    eval_data: Annotated[Any, rows_of] = None
    train: Train = "encoder"
    lora: int | LoraConfig | None = None
    eval_fraction: float = 0.02
    on_bad_row: OnBadRow = "raise"
    seeds: Annotated[list[int], checked_seeds] = field(default_factory=lambda: [0])
    output_dir: str | Path = "pivot-post-training"

    def __post_init__(self) -> None:
        for name, value in values_of(type(self), self, ()).items():
            setattr(self, name, value)
        self.check(())

    def check(self, key: Key) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise RecipeError(
                f"eval_fraction is {self.eval_fraction}.", "Give a share of at least 0 and below 1.", ("eval_fraction",)
            )
        for label, evaluation in self.evaluate.items():
            if evaluation.of is not None:
                raise RecipeError(
                    f"evaluate.{label}.of is {evaluation.of!r}.",
                    "Leave it out: the towers are examined, and by probes that need one the whole MLLM.",
                    (*key, "evaluate", label, "of"),
                )

    def described(self) -> dict[str, Any]:
        """The recipe in words that JSON has, its folder aside."""
        return {name: value for name, value in self.as_dict().items() if name != "output_dir"}

    def plan(self, rows: int | None = None) -> RecipePlan:
        """The optimiser steps of every arm; every setting is checked on the way.

        Args:
            rows: how many there are; what the recipe says of its data where None.

        Raises:
            SettingsError: for a setting that does not exist or cannot be used.
        """
        rows = declared_rows(self.data) if rows is None else rows
        share = 1.0 if self.eval_data is not None else 1 - self.eval_fraction
        return RecipePlan(tuple(_planned(self, arm, rows, share) for arm in self.arms))

    def options(self, arm: str) -> dict[str, Any]:
        """What `pivot.optimize` gets beside model, rows and folder; raises as `sections.accumulated`."""
        section = self.arms[arm]
        rewards: dict[str, Any] = {}
        if section.rewards is not None:
            rewards = {"rewards": list(section.rewards), "reward_weights": list(section.rewards.values())}
        return {
            "objective": section.objective or arm,
            "train": self.train,
            "lora": self.lora,
            "eval_fraction": self.eval_fraction,
            "on_bad_row": self.on_bad_row,
            **rewards,
            **self.trainer(arm),
        }

    def trainer(self, arm: str) -> dict[str, Any]:
        """Settings of an arm's trainer, the batch in its words; raises as `sections.accumulated`."""
        section = self.arms[arm]
        batch = section.batch
        if batch is not None and isinstance(section, RolloutArm):
            # a trainer of roll-outs counts these
            batch *= section.settings.get("num_generations") or PivotGRPOConfig.num_generations or 1
        return accumulated(section.settings, batch)


def _planned(recipe: PostTraining, arm: str, rows: int | None, share: float) -> PlannedStage:
    section, options = recipe.arms[arm], recipe.options(arm)
    try:
        config = configuration(
            settings=recipe.trainer(arm),
            folder=Path(),
            objective=options["objective"],
            train=recipe.train,
            lora=recipe.lora is not None,
            held_out=False,
        )
    except RecipeError:
        raise
    except SettingsError as error:
        raise RecipeError(f"arms.{arm}: {error.finding}", error.remedy, ("arms", arm)) from error
    sequences = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    batch = sequences // config.num_generations if isinstance(config, PivotGRPOConfig | PivotRLOOConfig) else sequences
    steps: int | None = None
    if config.max_steps > 0:
        steps = config.max_steps
    elif rows is not None and not (section.of_questions and not isinstance(section, RolloutArm)):
        # of own answers nobody knows how many pairs they make
        steps = math.ceil(math.ceil(rows * share / batch) * config.num_train_epochs)
    return PlannedStage(arm, len(recipe.seeds), rows, batch, steps)


def check_post_training(recipe: PostTraining) -> None:
    """Make sure that every trainer can be given the settings of its arm; batches are left to the plan.

    Raises:
        RecipeError: naming arm and setting.
    """
    replace(recipe, arms={name: replace(arm, batch=None) for name, arm in recipe.arms.items()}).plan()


@dataclass
class PostTrainingResult:
    """What a recipe that begins with an MLLM came to.

    Attributes:
        output_dir: folder of all stages.
        stages: in the order in which they ended.
        comparisons: by seed, every probe of the MLLM's tower as it was and of every arm's.
    """

    output_dir: Path
    stages: list[Stage] = field(default_factory=list)
    comparisons: dict[int, Comparison] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "stages": [{"name": stage.name, "folder": str(stage.folder), **stage.outcome} for stage in self.stages],
            "comparisons": {str(seed): comparison.as_dict() for seed, comparison in self.comparisons.items()},
        }

    def __str__(self) -> str:
        lines = [f"{stage.name}: {stage.folder} ({stage.seconds:.0f} s)" for stage in self.stages]
        tables = [f"\nSeed {seed}\n\n{comparison}" for seed, comparison in self.comparisons.items()]
        return "\n".join([*lines, *tables])


def run_post_training(recipe: PostTraining) -> PostTrainingResult:
    """Run a recipe that begins with an MLLM. A second call on the same folder goes on where the first stopped.

    Args:
        recipe: to run.

    Raises:
        SettingsError: for a recipe that cannot be run, or a folder with another recipe's stages.
        DataError, ModelError, EncoderError, TrainingError: as the stages.
    """
    recipe.plan()
    folder = Path(recipe.output_dir)
    rows = {kind: _opened(recipe, kind) for kind in {arm.of_questions for arm in recipe.arms.values()}}
    probes = {label: _task(evaluation) for label, evaluation in recipe.evaluate.items()}
    result = PostTrainingResult(folder)
    for seed in recipe.seeds:
        of_seed = folder / f"seed-{seed}"
        for arm, section in recipe.arms.items():
            data, held_out = rows[section.of_questions]
            options = recipe.options(arm) | {"seed": seed}
            keeper = Keeper(of_seed / arm)
            optimizing = Optimizing(
                of_seed / arm, lambda: load_model(recipe.model, None), data, held_out, options, keeper
            )
            described = {"model": plain(recipe.model), "data": plain(recipe.data), **options}
            result.stages.append(optimizing.stage(f"{arm}, seed {seed}", described))
        if probes and PartialState().is_main_process:
            trained = {arm: of_seed / arm / MODEL_FOLDER for arm in recipe.arms}
            result.comparisons[seed] = compare(
                {BASE: recipe.model, **trained}, probes, extract=of_seed / TOWERS, output=of_seed / COMPARISON
            )
    return result


def _opened(recipe: PostTraining, of_questions: bool) -> tuple[object, object | None]:
    open_one = _questions if of_questions else pairs
    held_out = None if recipe.eval_data is None else open_one(recipe.eval_data, "eval_data")
    return open_one(recipe.data, "data"), held_out


def _questions(data: object, name: str) -> QuestionDataset | PairDataset:
    if isinstance(data, Stored):
        split = {} if data.split is None else {"split": data.split}
        opened: QuestionDataset = sampled(load_questions(data.path, name, None, data.image_folder, **split), data)
        return opened
    return load_questions(made(data) if isinstance(data, Made) else data, name)


def _task(evaluation: Evaluation) -> ProbeTask:
    data = evaluation.data
    data = made(data) if isinstance(data, Made) else data.path if isinstance(data, Stored) else data
    return ProbeTask(evaluation.probe, data, evaluation.options)
