"""Settings of a run: TRL's DPOConfig with a few fields of our own and the defaults of this package."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from trl import DPOConfig

from pivot_plugin.errors import SettingsError

Train = Literal["encoder", "encoder+projector", "all"]
TRAIN_CHOICES = ("encoder", "encoder+projector", "all")
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
PARTS = ("encoder", "projector", "language_model")


@dataclass
class PivotConfig(DPOConfig):
    """TRL's DPOConfig, plus what trains.

    Defaults that differ from DPOConfig's: `max_length=None` (truncation cuts image tokens),
    `lr_scheduler_type="cosine"` and `warmup_steps=0.03` (arXiv 2510.16333, appendix E.1), `bf16` only where the device
    has it, `dataloader_pin_memory` only with a GPU, `remove_unused_columns=False`, `report_to="none"`.

    Args:
        train: which parts train: "encoder" (the vision tower), "encoder+projector", or "all" (the paper's setting).
        learning_rates: rates of single parts ("encoder", "projector", "language_model"); others use `learning_rate`.
        group_by_image: put pairs that share an image into one batch, so that they share its tokens; the order of
            images, and of the pairs of an image, is drawn anew each epoch.
        reference_cache: folder of the reference log-probabilities; default `~/.cache/pivot_plugin/reference`, or
            `$PIVOT_CACHE/reference`.

    Raises:
        SettingsError: for a value of these fields that is none of the allowed ones.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run."})
    max_length: int | None = field(default=None, metadata={"help": "Cut sequences to this many tokens."})
    lr_scheduler_type: Any = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or their share below 1."})
    bf16: bool | None = field(default=None, metadata={"help": "Train in bfloat16; default where the GPU has it."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Rows are read as a whole."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin host memory; default where there is a GPU."}
    )
    report_to: Any = field(default="none", metadata={"help": "Where metrics are sent."})
    train: Train = field(default="encoder", metadata={"help": f"One of {', '.join(TRAIN_CHOICES)}."})
    learning_rates: dict[str, float] | None = field(default=None, metadata={"help": "Learning rate per part."})
    group_by_image: bool = field(default=True, metadata={"help": "Batch pairs that share an image together."})
    reference_cache: str | None = field(default=None, metadata={"help": "Folder of the reference cache."})

    def __post_init__(self) -> None:
        if self.train not in TRAIN_CHOICES:
            raise SettingsError(f"train is {self.train!r}.", f"Choose one of {', '.join(map(repr, TRAIN_CHOICES))}.")
        if unknown := sorted(set(self.learning_rates or {}) - set(PARTS)):
            raise SettingsError(f"learning_rates names {unknown}.", f"Its keys are {', '.join(map(repr, PARTS))}.")
        # transformers renames these; TRL still sets the old names, which warns
        for old, new in _RENAMED.items():
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()
