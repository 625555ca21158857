"""Checkpoints of a run, as transformers' trainer writes them."""

import json
from pathlib import Path


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; one that was being written when the run was killed does not count.

    Args:
        folder: of the run.
    """
    complete = {}
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            # the trainer writes this file last
            step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        except (OSError, ValueError, KeyError):
            continue
        complete[int(step)] = checkpoint
    return complete[max(complete)] if complete else None
