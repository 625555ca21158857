"""Training a model that belongs to the caller: trained after success, exactly as it was after a failure."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.adapters.foreign import settle
from pivot_plugin.errors import PivotError, TrainingError
from pivot_plugin.training.checkpoints import last_checkpoint
from pivot_plugin.training.cost import Cost, metered
from pivot_plugin.training.plan import TrainingPlan
from pivot_plugin.training.snapshot import restored_on_failure, trainable_weights

logger = logging.getLogger(__name__)


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
def in_place(adapter: VisionAdapter, planned: TrainingPlan, folder: Path) -> Iterator[InPlace]:
    """Train a model meanwhile. Random number generators are left as they were.

    Args:
        adapter: of the model.
        planned: what trains.
        folder: of the run, with its checkpoints.

    Raises:
        TrainingError: for whatever goes wrong; the model is as it was then, after a keyboard interrupt too.
    """
    before = trainable_weights(adapter, planned)
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with restored_on_failure(adapter.model), metered(adapter) as cost:
            yield InPlace(before, cost)
    except BaseException as error:
        own = dict(adapter.model.named_parameters())
        with torch.no_grad():
            for name, weight in before.items():
                own[name].copy_(weight)
        if isinstance(error, PivotError):
            raise
        found = last_checkpoint(folder)
        kept = f"Checkpoint {found} is kept; go on with resume=True." if found else "There is no checkpoint yet."
        if isinstance(error, KeyboardInterrupt):
            logger.warning("Interrupted. The model is as it was. %s", kept)
            raise
        raise TrainingError(f"Training stopped with {type(error).__name__}: {error}.", kept) from error
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
    # where the model was built around an object of another repository, that object is the caller's
    settle(adapter.model)
    adapter.model.eval()
