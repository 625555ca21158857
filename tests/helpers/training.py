"""What tests of the trainers begin with."""

from pathlib import Path
from typing import Any

from pivot_plugin.preferences import PairDataset


def normal(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pairs = PairDataset(rows)
    return [pairs[index] for index in range(len(pairs))]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_length": None,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        **more,
    }
