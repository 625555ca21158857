"""Settings of a run: TRL's configurations with a few fields of our own and the defaults of this package."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, RLOOConfig, SFTConfig

from pivot_plugin.choices import IMAGE_TERMS as IMAGE_TERMS
from pivot_plugin.choices import TRAIN_CHOICES as TRAIN_CHOICES
from pivot_plugin.choices import Train as Train
from pivot_plugin.errors import SettingsError, unknown

SftAverage = Literal["token", "sequence"]
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# of one call of a reward
TIME_LIMIT_S = 60.0
PARTS = ("encoder", "projector", "language_model")


if TYPE_CHECKING:
    _Settings = TrainingArguments
else:
    # a dataclass hands on the defaults of its parents too, and TRL's must win over those of TrainingArguments
    _Settings = object


@dataclass
class TowerConfig(_Settings):  # type: ignore[misc, valid-type]
    """What every run of this package is told beside TRL's settings.

    Defaults that differ from TRL's: `lr_scheduler_type="cosine"` and `warmup_steps=0.03` (arXiv 2510.16333, appendix
    E.1), `bf16` only where the device has it, `dataloader_pin_memory` only with a GPU, `remove_unused_columns=False`,
    `report_to="none"`, and `restore_callback_states_from_checkpoint=True`, so that a resumed run stops where an
    undisturbed one does.

    Args:
        train: which parts train: "encoder" (the vision tower), "encoder+projector", "all" (the paper's setting); with
            the tower as it is: "language_model" (cold starts that teach format), "projector" (alignment) or
            "projector+language_model" (instruction, transplants).
        dataloader_num_workers: processes that read and process images ahead of training; by default as many as there
            are cores beside the training's own, at most four (`$PIVOT_WORKERS`), for data that are no stream.
        frozen: paths of modules that stay as they are although their part trains.
        learning_rates: rates of single parts ("encoder", "projector", "language_model"); others use `learning_rate`.
        patience: evaluations in a row without a better one before the run stops early; None never stops early. Counts
            from the first evaluation, of which there are several only with held-out rows and an `eval_strategy`.
        min_delta: by how much an evaluation must be better to count.

    Raises:
        SettingsError: for a value of these fields that is none of the allowed ones.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run."})
    lr_scheduler_type: Any = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or their share below 1."})
    bf16: bool | None = field(default=None, metadata={"help": "Train in bfloat16; default where the GPU has it."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Rows are read as a whole."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin host memory; default where there is a GPU."}
    )
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that prepare batches; default the free cores, at most four."}
    )
    report_to: Any = field(default="none", metadata={"help": "Where metrics are sent."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run goes on counting, towards its early stop too."}
    )
    train: Train = field(default="encoder", metadata={"help": f"One of {', '.join(TRAIN_CHOICES)}."})
    frozen: list[str] | None = field(default=None, metadata={"help": "Modules that stay as they are."})
    learning_rates: dict[str, float] | None = field(default=None, metadata={"help": "Learning rate per part."})
    patience: int | None = field(default=3, metadata={"help": "Evaluations without a better one before stopping."})
    min_delta: float = field(default=0.0, metadata={"help": "By how much an evaluation must be better to count."})

    def __post_init__(self) -> None:
        if self.train not in TRAIN_CHOICES:
            raise SettingsError(f"train is {self.train!r}.", f"Choose one of {', '.join(map(repr, TRAIN_CHOICES))}.")
        if unknown := sorted(set(self.learning_rates or {}) - set(PARTS)):
            raise SettingsError(f"learning_rates names {unknown}.", f"Its keys are {', '.join(map(repr, PARTS))}.")
        if self.patience is not None and self.patience < 1:
            raise SettingsError(f"patience is {self.patience}.", "Give 1 or more evaluations, or None.")
        # transformers renames these; TRL still sets the old names, which warns
        for old, new in _RENAMED.items():
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        # the trainer decides, once it has seen the data
        self.default_workers = self.dataloader_num_workers is None
        self.dataloader_num_workers = self.dataloader_num_workers or 0
        super().__post_init__()


@dataclass
class PivotConfig(TowerConfig, DPOConfig):
    """Preference optimisation: TRL's DPOConfig and `TowerConfig`. `max_length` is None: truncation cuts image tokens.

    Args:
        group_by_image: put pairs that share an image into one batch, so that they share its tokens; the order of
            images, and of the pairs of an image, is drawn anew each epoch.
        max_nodes: tokens, shared ones counted once, that are computed together at most, so that memory is bounded: a
            batch that has more is computed in parts, with the loss and the gradient of the whole. None computes every
            batch at once. A single pair may have more. In one process alone.
        reference_cache: folder of the reference log-probabilities; default `~/.cache/pivot_plugin/reference`, or
            `$PIVOT_CACHE/reference`.
        image_terms: terms of the loss that hold pictures against each other, beside `loss_type`: "conditional" and
            "anchor" (mDPO), "attend" and "reject" (S-VCO); see `training.image_terms`. Rows need `rejected_images`.
        image_weights: of each of them; 1 where None.
        rejected_images: name of a maker of rejected images for rows without ("other_picture", "patch_shuffle",
            "region_blackout", "crop", or a plugin's), made of the rows that train and of those held out apart.
        rejected_difficulty: of what it makes, from 0, quite another picture, to 1, a hardly different one.
        sft_average: what the "sft" loss averages: "token", the mean over all chosen tokens of an optimiser step, over
            accumulated batches and processes, in which long answers weigh more, or "sequence", the mean over answers
            of the mean over their tokens.

    Raises:
        SettingsError: as `TowerConfig`.
    """

    max_length: int | None = field(default=None, metadata={"help": "Cut sequences to this many tokens."})
    group_by_image: bool = field(default=True, metadata={"help": "Batch pairs that share an image together."})
    max_nodes: int | None = field(default=None, metadata={"help": "Tokens computed together at most."})
    reference_cache: str | None = field(default=None, metadata={"help": "Folder of the reference cache."})
    image_terms: list[str] | None = field(default=None, metadata={"help": f"Of {', '.join(IMAGE_TERMS)}."})
    image_weights: list[float] | None = field(default=None, metadata={"help": "Of the image terms."})
    rejected_images: str | None = field(default=None, metadata={"help": "Maker of rejected images."})
    rejected_difficulty: float = field(default=0.5, metadata={"help": "Of rejected images that are made."})
    sft_average: SftAverage = field(default="token", metadata={"help": "Mean over tokens, or over sequences."})

    def __post_init__(self) -> None:
        if self.sft_average not in ("token", "sequence"):
            raise SettingsError(f"sft_average is {self.sft_average!r}.", "Choose 'token' or 'sequence'.")
        if self.max_nodes is not None and self.max_nodes < 1:
            raise SettingsError(f"max_nodes is {self.max_nodes}.", "Give 1 or more tokens, or None.")
        super().__post_init__()
        self._check_image_terms()

    def _check_image_terms(self) -> None:
        names = self.image_terms or []
        for name in names:
            if name not in IMAGE_TERMS:
                raise unknown("term", name, IMAGE_TERMS, f"image_terms names {name!r}.")
        if len(set(names)) < len(names):
            raise SettingsError(f"image_terms names one twice: {names}.", "Give each once, with image_weights.")
        if self.image_weights is not None and len(self.image_weights) != len(names):
            raise SettingsError(
                f"There are {len(names)} image_terms and {len(self.image_weights)} image_weights.", "Give one for each."
            )
        # what TRL makes of log-probabilities in these cases it makes of a pair's own two answers alone; and a cut at a
        # length leaves different words of one answer about pictures of different sizes
        others = {"max_length": None, "ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl"}
        for name, plain in others.items():
            value = getattr(self, name)
            if names and getattr(value, "value", value) != plain:
                raise SettingsError(f"{name} is {value!r}, with image_terms {names}.", f"Leave {name} out.")


@dataclass
class RolloutConfig(TowerConfig):
    """What training on a model's own roll-outs is told beside TRL's settings.

    Args:
        group_rollouts: keep the roll-outs of a prompt in one batch, so that they share its tokens; which batch they
            come in is drawn as TRL draws it.
        reward_time_limit: seconds that one call of a reward function may take.
        redraw: how many times a generation batch asks other questions in place of those whose roll-outs all scored
            alike, which teach nothing (arXiv 2503.14476); those that stay silent are kept then.

    Raises:
        SettingsError: as `TowerConfig`; for a redraw in several processes, or with advantages that are scaled over the
            whole batch.
    """

    redraw: int = field(default=0, metadata={"help": "Times to ask others in place of questions without spread."})
    group_rollouts: bool = field(default=True, metadata={"help": "Batch the roll-outs of a prompt together."})
    reward_time_limit: float = field(default=TIME_LIMIT_S, metadata={"help": "Seconds for one call of a reward."})
    num_generations_eval: int | None = field(default=1, metadata={"help": "Roll-outs of a held-out question."})

    def __post_init__(self) -> None:
        if isinstance(self.redraw, bool) or not isinstance(self.redraw, int) or self.redraw < 0:
            raise SettingsError(f"redraw is {self.redraw!r}.", "Give 0 or more times.")
        super().__post_init__()
        over_the_batch = (
            getattr(self, "scale_rewards", "group") == "batch"
            or getattr(self, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize"
            or getattr(self, "normalize_advantages", False)
        )
        if self.redraw and (over_the_batch or self.world_size > 1):
            what = (
                "advantages are scaled over the whole batch" if over_the_batch else f"{self.world_size} processes train"
            )
            raise SettingsError(
                f"redraw is {self.redraw}, and {what}.",
                "Leave redraw out, or scale by group, in one process.",
            )


@dataclass
class PivotGRPOConfig(RolloutConfig, GRPOConfig):
    """Group-relative policy optimisation: TRL's GRPOConfig, `RolloutConfig` and `TowerConfig`."""


@dataclass
class PivotRLOOConfig(RolloutConfig, RLOOConfig):
    """REINFORCE leave-one-out: TRL's RLOOConfig, `RolloutConfig` and `TowerConfig`."""


@dataclass
class InstructConfig(TowerConfig, SFTConfig):
    """Supervised fine-tuning on conversations: TRL's SFTConfig and `TowerConfig`.

    Defaults that differ: `max_length=2048`, one epoch, no weight decay (arXiv 2510.16333, appendix E.1).

    Args:
        plain: leave questions out, an image and its caption alone, as LLaVA aligns a projector.
    """

    max_length: int | None = field(default=2048, metadata={"help": "Cut sequences to this many tokens."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    plain: bool = field(default=False, metadata={"help": "An image and its caption, without a question."})
