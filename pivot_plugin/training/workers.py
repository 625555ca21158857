"""How many processes prepare batches beside the one that trains."""

import multiprocessing
import os

# more prepare faster than one device computes
MOST = 4
VARIABLE = "PIVOT_WORKERS"


def default_workers() -> int:
    """Worker processes for each training process: the cores that it has beside its own, at most four.

    None where a process is not forked, because each would read and keep the data anew. `$PIVOT_WORKERS` says otherwise.
    """
    if (said := os.environ.get(VARIABLE, "")).isdigit():
        return int(said)
    if multiprocessing.get_start_method() != "fork":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
