"""How many processes prepare batches beside the one that trains."""

import os

# more prepare faster than one device computes
MOST = 4
VARIABLE = "PIVOT_WORKERS"


def default_workers() -> int:
    """Worker processes for each training process: the cores that it has beside its own, at most four.

    `$PIVOT_WORKERS` says otherwise.
    """
    if (said := os.environ.get(VARIABLE, "")).isdigit():
        return int(said)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
