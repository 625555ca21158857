"""A recipe in types: what each section holds, and what of it the trainers get."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from accelerate import PartialState
from peft import LoraConfig

from pivot_plugin.config import InstructConfig, PivotConfig, Train
from pivot_plugin.data.rows import OnBadRow
from pivot_plugin.errors import SettingsError
from pivot_plugin.objectives import ONLINE, resolve
from pivot_plugin.probes.lookup import NEED_MLLM
from pivot_plugin.typed import shown

from .door import Key, RecipeError, Section, plain, read, values_of

SeedsFrom = Literal["assemble", "optimize", "transplant"]
Examined = Literal["encoder", "optimized", "transplant"]
BENCHMARKS = "lmms-eval"
ORIGINAL, STAGE_1 = CONTROLS = ("original", "stage-1")
VARIANT = re.compile(r"0|(1\+1)|(2\+2)")
FRESH = "0"


# What is named, and opened later


@dataclass(frozen=True)
class Stored(Section):
    """Rows that lie somewhere.

    Attributes:
        path: of a file, folder or zip, or a Hub id.
        split: of a data set with several.
        image_folder: what relative image paths start from.
        rows: how many there are, for a plan that opens nothing.
        sample: how many of them to draw; all where None.
        seed: of that draw.
    """

    path: str | Path
    split: str | None = None
    image_folder: str | Path | None = None
    rows: int | None = None
    sample: int | None = None
    seed: int = 0

    def check(self, key: Key) -> None:
        _at_least(1, "rows", self.rows, key)
        _at_least(1, "sample", self.sample, key)

    @property
    def declared(self) -> int | None:
        """How many rows the recipe says there are; None where it says nothing."""
        return self.rows if self.sample is None else self.sample


@dataclass(frozen=True)
class Made(Section):
    """What a plugin's maker makes (hook `pivot_sources`).

    Attributes:
        source: name of the maker.
        rows: how many rows it makes, for a plan that makes nothing.
        options: which the maker takes.
    """

    source: str
    rows: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def declared(self) -> int | None:
        """How many rows the recipe says that it makes; None where it says nothing."""
        told = [self.options[name] for name in ("sample", "count") if isinstance(self.options.get(name), int)]
        return self.rows if self.rows is not None or not told else int(told[0])

    def as_dict(self) -> dict[str, Any]:
        rows = {} if self.rows is None else {"rows": self.rows}
        return {"source": self.source, **rows, **plain(self.options)}


def _made(value: Mapping[Any, Any], key: Key) -> Made:
    source, rows = value["source"], value.get("rows")
    if not isinstance(source, str):
        raise RecipeError(f"{'.'.join(key)}.source is {shown(source)}.", "Give the name of one.", (*key, "source"))
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool)):
        raise RecipeError(f"{'.'.join(key)}.rows is {shown(rows)}.", "Give a whole number.", (*key, "rows"))
    # what a plugin's maker takes is its own affair
    return Made(source, rows, {str(k): v for k, v in value.items() if k not in ("source", "rows")})


def rows_of(value: object, key: Key) -> object:
    """Rows by name, made by a plugin, or themselves."""
    # other mappings, such as a DatasetDict, are data themselves
    if type(value) is dict:
        if "source" in value:
            return _made(value, key)
        if not set(value) & {"path"} and set(value) <= {"split", "image_folder", "rows", "sample", "seed"}:
            raise RecipeError(f"{'.'.join(key)} has neither path nor source.", "Give one of them.", key)
        return read(Stored, value, key)
    if isinstance(value, Stored):
        return read(Stored, value, key)
    if isinstance(value, bool | int | float) or value == "":
        raise RecipeError(
            f"{'.'.join(key)} is {shown(value)}.", "Give a path, a Hub id, or {source: name} of a plugin.", key
        )
    return value


def _probed(value: object, key: Key) -> object:
    """Data of a probe, which opens it itself: by name, made by a plugin, or itself."""
    rows = rows_of(value, key)
    if isinstance(rows, Stored) and rows != Stored(rows.path, rows=rows.rows):
        raise RecipeError(
            f"{'.'.join(key)} has more than a path.", "Give the path alone; a probe opens its data itself.", key
        )
    return rows


def part_of(value: object, key: Key) -> object:
    """An encoder or language model: by name, made by a plugin, or itself."""
    if isinstance(value, Mapping):
        if "source" not in value:
            raise RecipeError(f"{'.'.join(key)} names no source.", "Give its folder, Hub id, or {source: name}.", key)
        return _made(value, key)
    if value is None or isinstance(value, bool | int | float | list) or value == "":
        raise RecipeError(f"{'.'.join(key)} is {shown(value)}.", "Give its folder, Hub id, or {source: name}.", key)
    return value


def _part_or_none(value: object, key: Key) -> object:
    return None if value is None else part_of(value, key)


# What trains


@dataclass(frozen=True)
class Tuning(Section):
    """Alignment of a projector.

    Attributes:
        data: rows as `preferences.load_conversations` takes them, `Stored` or `Made`; None for those of the first MLLM.
        image_folder: what relative image paths start from.
        batch: rows of an optimiser step over all processes; the verb's own where None.
        eval_fraction: share of the rows to hold out.
        on_bad_row: as for `pivot.align`.
        settings: of the trainer.
    """

    CONFIG: ClassVar[type | None] = InstructConfig

    data: Annotated[Any, rows_of] = None
    image_folder: str | Path | None = None
    batch: int | None = None
    eval_fraction: float = 0.0
    on_bad_row: OnBadRow = "raise"
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self, key: Key) -> None:
        _check_share(self.eval_fraction, key)
        _at_least(1, "batch", self.batch, key)

    def trainer(self) -> dict[str, Any]:
        """Settings of the trainer, the batch in its words.

        Raises:
            SettingsError: if the processes cannot make up such a batch.
        """
        return accumulated(self.settings, self.batch)

    def options(self) -> dict[str, Any]:
        """What the verb gets beside model, rows and folder; raises as `trainer`."""
        return {"eval_fraction": self.eval_fraction, "on_bad_row": self.on_bad_row, **self.trainer()}


@dataclass(frozen=True)
class Instruction(Tuning):
    """Instruction of an MLLM.

    Attributes:
        train: which parts train.
        lora: LoRA rank or peft configuration; None trains the weights themselves.
    """

    train: Train = "all"
    lora: int | LoraConfig | None = None

    def options(self) -> dict[str, Any]:
        return {"train": self.train, "lora": self.lora, **super().options()}


@dataclass(frozen=True)
class TransplantInstruction(Tuning):
    """Instruction of a new MLLM, whose encoder is frozen.

    Attributes:
        lora: LoRA rank or peft configuration; None trains the weights themselves.
    """

    lora: int | LoraConfig | None = None

    def options(self) -> dict[str, Any]:
        return {"train": "projector+language_model", "lora": self.lora, **super().options()}


def _probe(value: object, key: Key) -> object:
    if not isinstance(value, str) and not callable(value):
        raise RecipeError(f"{'.'.join(key)} is {shown(value)}.", "Give the name of a probe.", key)
    return value


@dataclass(frozen=True)
class Evaluation(Section):
    """A probe with its data.

    Attributes:
        probe: its name, "lmms-eval", or a function as for `probes.ProbeTask`.
        data: of the probe.
        of: what is examined; None for what the probe is made for: transplanted MLLMs, or encoders.
        options: of the probe.
    """

    probe: Annotated[Any, _probe] = None
    data: Annotated[Any, _probed] = None
    of: Examined | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, key: Key) -> None:
        if self.probe is None:
            raise RecipeError(
                f"{'.'.join(key)} names no probe.", "Give probe, data, and options where it has any.", key
            )

    @property
    def examines(self) -> Examined:
        """What is examined."""
        return self.of or ("transplant" if self.probe in (*NEED_MLLM, BENCHMARKS) else "encoder")


@dataclass(frozen=True)
class Arm(Section):
    """One arm of the comparison: what it has of its own.

    Attributes:
        objective: its own; the arm's name where None.
        learning_rate: one, or several to choose from; the section's where None.
        train: which parts train; the section's where None.
        settings: of the trainer.
    """

    CONFIG: ClassVar[type | None] = PivotConfig

    objective: str | list[str] | None = None
    learning_rate: float | list[float] | None = None
    train: Train | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def _select(value: object, key: Key) -> object:
    return value if value is None or isinstance(value, str) else read(Evaluation, value, key)


@dataclass(frozen=True)
class Optimization(Section):
    """Arms on the same pairs.

    Attributes:
        data: pairs as `preferences.load` takes them, `Stored` or `Made`.
        eval_data: held-out pairs; a share of `data` where None.
        arms: by name.
        select: what chooses among the learning rates of an arm: a metric of held-out pairs, or a probe.
        learning_rate: of arms without one of their own; their objective's where None.
        batch: pairs of an optimiser step over all processes.
        train: which parts train; the paper trains all.
        lora: LoRA rank or peft configuration; None trains the weights themselves, as the paper does.
        eval_fraction: share of the pairs to hold out where there is no `eval_data`.
        on_bad_row: as for `pivot.optimize`.
        saliency: held-out pairs whose gradient maps are kept.
        settings: of the trainer.
    """

    CONFIG: ClassVar[type | None] = PivotConfig

    data: Annotated[Any, rows_of] = None
    eval_data: Annotated[Any, rows_of] = None
    arms: dict[str, Arm] = field(default_factory=dict)
    select: Annotated[Any, _select] = None
    learning_rate: float | list[float] | None = None
    batch: int | None = None
    train: Train = "all"
    lora: int | LoraConfig | None = None
    eval_fraction: float = 0.02
    on_bad_row: OnBadRow = "raise"
    saliency: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self, key: Key) -> None:
        _check_share(self.eval_fraction, key)
        _at_least(1, "batch", self.batch, key)
        _at_least(0, "saliency", self.saliency, key)
        for name in ("data", "eval_data"):
            rows = getattr(self, name)
            if isinstance(rows, Stored) and rows.image_folder is not None:
                raise RecipeError(
                    f"{'.'.join(key)}.{name} has an image_folder.",
                    "Leave it out: the paths in pairs start from the folder of their file.",
                    (*key, name, "image_folder"),
                )
        if not self.arms:
            raise RecipeError(f"{'.'.join(key)}.arms names no arm.", "For example: arms: {sft: {}, dpo: {}}.", key)
        for arm in self.arms:
            self._check_arm(arm, (*key, "arms", arm))

    def _check_arm(self, arm: str, key: Key) -> None:
        if arm in CONTROLS:
            raise RecipeError(f"{'.'.join(key)} is the name of a control.", "Choose another.", key)
        objective = self.objective(arm)
        try:
            resolve(objective)
        except SettingsError as error:
            raise RecipeError(f"{'.'.join(key)}: {error.finding}", error.remedy, key) from error
        if objective in ONLINE:
            raise RecipeError(
                f"{'.'.join(key)} is {objective}, which learns from questions.", "Arms learn from the same pairs.", key
            )
        rates = self.rates(arm)
        if not rates:
            raise RecipeError(f"{'.'.join(key)} has an empty list of learning rates.", "Give one or more.", key)
        if len(rates) > 1 and self.select is None:
            raise RecipeError(
                f"{'.'.join(key)} has {len(rates)} learning rates, and nothing says how to choose.",
                "Give optimize.select: a probe on validation data, or a held-out metric such as preference_accuracy.",
                key,
            )

    def objective(self, arm: str) -> str | list[str]:
        """What an arm learns by."""
        return self.arms[arm].objective or arm

    def rates(self, arm: str) -> tuple[float | None, ...]:
        """Learning rates that an arm has to choose from; None stands for its objective's."""
        own = self.arms[arm].learning_rate
        rates = self.learning_rate if own is None else own
        return tuple(rates) if isinstance(rates, list | tuple) else (rates,)

    def described(self, arm: str, rate: float | None) -> dict[str, Any]:
        """All that decides a run of an arm, in the recipe's words; its pairs and its start aside."""
        return {
            **self._of_verb(arm),
            **{"batch": self.batch, "learning_rate": rate},
            **self.settings,
            **self.arms[arm].settings,
        }

    def trainer(self, arm: str, rate: float | None) -> dict[str, Any]:
        """Settings of an arm's trainer at a learning rate; raises as `Tuning.trainer`."""
        settings = accumulated(self.settings | self.arms[arm].settings, self.batch)
        return settings if rate is None else settings | {"learning_rate": rate}

    def options(self, arm: str, rate: float | None) -> dict[str, Any]:
        """What `pivot.optimize` gets beside model, rows and folder; raises as `Tuning.trainer`."""
        return {**self._of_verb(arm), **self.trainer(arm, rate)}

    def _of_verb(self, arm: str) -> dict[str, Any]:
        return {
            "objective": self.objective(arm),
            "train": self.arms[arm].train or self.train,
            "lora": self.lora,
            "eval_fraction": self.eval_fraction,
            "on_bad_row": self.on_bad_row,
            "saliency": self.saliency,
        }


# What an MLLM is made of


@dataclass(frozen=True)
class Assembly(Section):
    """How encoder and language model are joined.

    Attributes:
        feature_layer: hidden state of the encoder that the projector reads; that of `pivot.assemble` where None.
        chat_template: as for `pivot.assemble`.
    """

    feature_layer: int | None = None
    chat_template: str | None = None

    def options(self) -> dict[str, Any]:
        """What `pivot.assemble` gets beside its parts."""
        return self.as_dict()


def _variants(value: object, key: Key) -> tuple[str, ...]:
    if value is None:
        return (FRESH,)
    if not isinstance(value, list | tuple):
        raise RecipeError(f"{'.'.join(key)} is {shown(value)}.", "Give a list of '0', '1+1' and '2+2'.", key)
    for variant in value:
        if not VARIANT.fullmatch(str(variant)):
            raise RecipeError(f"{'.'.join(key)} has {variant!r}.", "Choose of '0', '1+1' and '2+2'.", key)
    return tuple(map(str, value)) or (FRESH,)


@dataclass(frozen=True)
class Transplant(Section):
    """Every encoder, frozen, in a new MLLM.

    Attributes:
        language_model: of the new MLLM; that of the first where None.
        chat_template: as for `pivot.assemble`; that of the first where None.
        projectors: "0" (new), "1+1" (first layer of the tuned one, frozen, and a new one) or "2+2".
        align, instruct: of the new MLLM.
    """

    language_model: Annotated[Any, _part_or_none] = None
    chat_template: str | None = None
    projectors: Annotated[tuple[str, ...], _variants] = (FRESH,)
    align: Tuning = field(default_factory=Tuning)
    instruct: TransplantInstruction = field(default_factory=TransplantInstruction)


def checked_seeds(value: object, key: Key) -> list[int]:
    seeds = list(value) if isinstance(value, list | tuple | range) else []
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise RecipeError(f"seeds is {shown(value)}.", "Give a list of different whole numbers.", key)
    return seeds


@dataclass
class PivotRecipe(Section):
    """The whole recipe, stage by stage. Sections may be given as mappings, and are typed from then on.

    Attributes:
        encoder: a loaded encoder, its folder or Hub id, or {"source": name, ...} of a plugin (hook `pivot_sources`).
        language_model: the same of a causal language model.
        align, instruct: `data`, `batch` (rows of a step over all processes), and settings as for `pivot.align` and
            `pivot.instruct`.
        optimize: `data`, `batch`, settings as for `pivot.optimize`; `arms`: by name its `objective` (the name itself
            where not given), and settings of its own, of which `learning_rate` may be a list to choose from, by what
            `select`, a probe or a held-out metric of pairs, says of the optimised MLLM.
        transplant: `language_model` (the same where not given), `projectors`, `align` and `instruct` of the new MLLM.
            None: no transplant.
        evaluate: by label `probe`, `data`, `options`, and `of`: "encoder", "optimized" or "transplant".
        assemble: settings as for `pivot.assemble`.
        seeds: of everything from `seeds_from` on; stages before it are run once, with the first.
        seeds_from: "assemble", "optimize" or "transplant".
        output_dir: gets a folder per seed and stage.

    Raises:
        RecipeError: for a key or value that cannot be used, a `SettingsError` that names it.
    """

    encoder: Annotated[Any, part_of]
    language_model: Annotated[Any, part_of]
    align: Tuning
    instruct: Instruction
    optimize: Optimization
    transplant: Transplant | None = None
    evaluate: dict[str, Evaluation] = field(default_factory=dict)
    assemble: Assembly = field(default_factory=Assembly)
    seeds: Annotated[list[int], checked_seeds] = field(default_factory=lambda: [0])
    seeds_from: SeedsFrom = "assemble"
    output_dir: str | Path = "pivot-recipe"

    def __post_init__(self) -> None:
        for name, value in values_of(type(self), self, ()).items():
            setattr(self, name, value)
        self.check(())

    def check(self, key: Key) -> None:
        for name in ("align", "instruct", "optimize"):
            if getattr(self, name).data is None:
                raise RecipeError(
                    f"{name} has no data.", "Give a path, a Hub id, or {source: name} of a plugin.", (*key, name)
                )
        for label, evaluation in self.evaluate.items():
            if evaluation.examines == "transplant" and self.transplant is None:
                raise RecipeError(
                    f"evaluate.{label}.of is 'transplant', and there is none.",
                    f"Describe transplant, or choose another of {', '.join(get_args(Examined)[:2])}.",
                    (*key, "evaluate", label),
                )

    def described(self) -> dict[str, Any]:
        """The recipe in words that JSON has, its folder aside; what is loaded already by its class and size."""
        return {name: value for name, value in self.as_dict().items() if name != "output_dir"}


def accumulated(settings: Mapping[str, Any], batch: int | None) -> dict[str, Any]:
    """Settings with the rows of an optimiser step over all processes, in the trainer's words.

    Args:
        settings: of the trainer.
        batch: rows of a step; None leaves it to the settings.

    Raises:
        SettingsError: if the processes cannot make up such a batch.
    """
    if batch is None:
        return dict(settings)
    sized = {"per_device_train_batch_size": PivotConfig.per_device_train_batch_size, **settings}
    each, processes = int(sized["per_device_train_batch_size"]), PartialState().num_processes
    steps, rest = divmod(batch, each * processes) if each > 0 else (0, 0)
    if rest or not steps or "gradient_accumulation_steps" in settings:
        raise SettingsError(
            f"A batch of {batch} cannot be made up of {processes} process(es) with per_device_train_batch_size={each}.",
            "Choose sizes that divide it, and leave gradient_accumulation_steps out.",
        )
    return sized | {"gradient_accumulation_steps": steps}


def declared_rows(data: object) -> int | None:
    """How many rows a recipe says that data has; None where it says nothing."""
    if isinstance(data, Stored | Made):
        return data.declared
    return len(data) if hasattr(data, "__len__") and not isinstance(data, str) else None


def _at_least(least: int, name: str, value: int | None, key: Key) -> None:
    if value is not None and value < least:
        raise RecipeError(f"{'.'.join((*key, name))} is {value}.", f"Give {least} or more.", (*key, name))


def _check_share(share: float, key: Key) -> None:
    if not 0 <= share < 1:
        raise RecipeError(
            f"{'.'.join(key)}.eval_fraction is {share}.",
            "Give a share of at least 0 and below 1.",
            (*key, "eval_fraction"),
        )
