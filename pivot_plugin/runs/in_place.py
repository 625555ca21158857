"""Training a model that belongs to the caller: trained after success, exactly as it was after a failure."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import set_seed

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.errors import PivotError, TrainingError
from pivot_plugin.files import is_full, unwritten
from pivot_plugin.hooks import collect
from pivot_plugin.models.evaluating import undisturbed
from pivot_plugin.training.checkpoints import last_checkpoint
from pivot_plugin.training.cost import Cost, metered
from pivot_plugin.training.plan import TrainingPlan
from pivot_plugin.training.sharding import is_divided
from pivot_plugin.training.snapshot import Snapshot

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    " To need less memory: halve per_device_train_batch_size and double gradient_accumulation_steps, which computes "
    "the same; gradient_checkpointing=True; smaller or fewer images a row (the processor's size, max_pixels); "
    "train='encoder' with lora=. All but the last two can be changed when a run is resumed."
)


@dataclass(frozen=True)
class InPlace:
    """What is known of a model in training.

    Attributes:
        before: copies, on the host, of the weights that may change.
        cost: of the training, whole when it has ended.
    """

    before: dict[str, torch.Tensor]
    cost: Cost


@contextmanager
def in_place(adapter: VisionAdapter, plan: TrainingPlan, folder: Path, seed: int) -> Iterator[InPlace]:
    """Train a model meanwhile, from seeded random numbers; the caller's generators are left as they were, CUDA's too.

    Args:
        adapter: of the model.
        plan: what trains.
        folder: of the run, with its checkpoints.
        seed: of every random number generator meanwhile.

    Raises:
        TrainingError: for whatever goes wrong; the model is as it was then, after a keyboard interrupt too.
    """
    snapshot = Snapshot(adapter, plan)
    try:
        with undisturbed(), metered(adapter) as cost:
            set_seed(seed)
            yield InPlace(snapshot.weights, cost)
    except BaseException as error:
        if is_divided(adapter.model):
            # the others may be gone, and without them its weights are not whole; the failure itself must be seen
            if PartialState().is_main_process:
                logger.warning("The model's weights are divided among processes, and stay so: load it again.")
        else:
            snapshot.restore()
        if isinstance(error, PivotError):
            raise
        if is_full(error):
            raise _unwritten(folder, error) from error
        checkpoint = last_checkpoint(folder)
        remedy = (
            f"Checkpoint {checkpoint} is kept; go on with resume=True (--resume)."
            if checkpoint
            else "There is no checkpoint yet."
        )
        if isinstance(error, KeyboardInterrupt):
            if PartialState().is_main_process:
                logger.warning("Interrupted. The model is as it was. %s", remedy)
            raise
        if _is_out_of_memory(error):
            remedy += OUT_OF_MEMORY
        raise TrainingError(f"Training stopped with {type(error).__name__}: {error}.", remedy) from error
    snapshot.settle()
    # where the model was built around an object of another repository, that object is the caller's
    collect("pivot_model_trained", model=adapter.model)
    adapter.model.eval()


def _unwritten(folder: Path, error: BaseException) -> TrainingError:
    """What is said of a checkpoint that found no room."""
    reason, checkpoint = unwritten(Path(getattr(error, "filename", None) or folder), error), last_checkpoint(folder)
    go_on = f"from {checkpoint}, which is whole" if checkpoint else "from the start: no checkpoint was whole by then"
    return TrainingError(
        f"Training stopped: {reason.finding}",
        f"{reason.remedy.partition(',')[0]}, and go on with resume=True {go_on}; save_total_limit= keeps fewer.",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower()
