"""Checkpoints of a run, as transformers' trainer writes them."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pivot_plugin.errors import SettingsError, said

logger = logging.getLogger(__name__)

# the trainer writes this file last
STATE_FILE = "trainer_state.json"
# what it would go on without, and not say so, where it is missing
NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
# what FSDP2 gathers, and accelerate writes under names of its own
GATHERED = {"optimizer.pt": "optimizer.bin", "*.safetensors": "pytorch_model_fsdp.bin"}


def last_checkpoint(folder: Path, every: int = 1) -> Path | None:
    """The newest complete checkpoint of a run; one that was being written when the run was killed does not count.

    Args:
        folder: of the run.
        every: only those after a multiple of so many steps count.
    """
    complete = {}
    for checkpoint in folder.glob("checkpoint-*"):
        step = step_of(checkpoint)
        if step is not None and step % every == 0:
            complete[step] = checkpoint
    return complete[max(complete)] if complete else None


def step_of(checkpoint: Path) -> int | None:
    """After which step a checkpoint was written, None where it is not complete."""
    try:
        step = json.loads((checkpoint / STATE_FILE).read_bytes())["global_step"]
    # whatever stands there in place of a state
    except Exception as error:
        if checkpoint.is_dir() and not isinstance(error, FileNotFoundError):
            logger.warning("%s is not gone on from: its %s cannot be read (%s).", checkpoint, STATE_FILE, said(error))
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def final_checkpoint(folder: Path, history: Sequence[dict[str, Any]]) -> Path | None:
    """The checkpoint after the last step of a run that has finished, None where it kept none.

    Args:
        folder: of the run.
        history: the trainer's log.
    """
    last = last_checkpoint(folder)
    steps = [int(entry["step"]) for entry in history if isinstance(entry.get("step"), int | float)]
    return last if last is not None and steps and (step_of(last) or 0) >= max(steps) else None


def check_checkpoint(checkpoint: Path, processes: int = 1) -> None:
    """Make sure that all files of a checkpoint are there and can be read, before anything is loaded from it.

    Args:
        checkpoint: a complete one. What DeepSpeed, and FSDP in shards, keep in folders of their own is left to them.
        processes: that go on from it.

    Raises:
        SettingsError: naming the file, and what can be done.
    """
    if any(path.is_dir() for path in checkpoint.iterdir()):
        return
    remedy = (
        f"Delete {checkpoint} to go on from the checkpoint before it, or from the start where there is none; or put "
        "the file back."
    )
    for pattern in NEEDED:
        files = sorted(checkpoint.glob(pattern)) or sorted(checkpoint.glob(GATHERED.get(pattern, pattern)))
        if len(files) < (processes if "*" in pattern else 1):
            raise SettingsError(f"{checkpoint} has {len(files)} file(s) {pattern}.", remedy)
        for file in files:
            _readable(file, remedy)
    weights = [file for file in checkpoint.glob("*.safetensors") if file.name != "training_args.safetensors"]
    weights += checkpoint.glob(GATHERED["*.safetensors"])
    if not weights:
        raise SettingsError(f"{checkpoint} has no weights (*.safetensors).", remedy)
    for file in weights:
        _readable(file, remedy)


def _readable(file: Path, remedy: str) -> None:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as content:
                content.keys()
        elif file.name.startswith("rng_state"):
            # numpy's state is in classes that are let through by name
            from transformers.trainer_pt_utils import safe_globals

            with safe_globals():
                torch.load(file, weights_only=True)
        else:
            torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        raise SettingsError(f"{file} cannot be read: {said(error)}.", remedy) from error
