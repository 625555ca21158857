"""What goes wrong in one process of several: errors, kills and interrupts at moments of a run that have names."""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.distributed as dist

from pivot_plugin.training.processes import Processes
from tests.helpers import cluster

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[3])
from tests.helpers.breaking import main
main(sys.argv[1], sys.argv[4], sys.argv[5])
"""


def in_each(count: int, does: Callable[[Processes], Any]) -> list[Any]:
    """What a function returns or raises in each of some processes."""
    store = dist.HashStore()
    found: list[Any] = [None] * count

    def process(rank: int) -> None:
        state: Any = SimpleNamespace(process_index=rank, num_processes=count)
        try:
            found[rank] = does(Processes(state, store))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# in place of a rank
ALL = -1


def _before(owner: Any, name: str, happens: Callable[[], None], call: int = 1) -> None:
    """Have something happen when a function is called for the so-manieth time."""
    function, calls = getattr(owner, name), []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            # by its time others know how long they took to hear of it
            Path("fault").touch()
            happens()
        return function(*args, **kwargs)

    setattr(owner, name, called)


def at(moment: str, happens: Callable[[], None]) -> None:
    """Have something happen in this process at a moment of its run, by the name of the moment."""
    import transformers

    from pivot_plugin.data.rows import RowDataset
    from pivot_plugin.encoders import store
    from pivot_plugin.runs import run as runs
    from pivot_plugin.training.pair_trainer import PivotTrainer

    trainer = transformers.Trainer
    moments: dict[str, tuple[Any, str, int]] = {
        "checks": (RowDataset, "verify", 1),
        "reference": (PivotTrainer, "compute_ref_log_probs", 2),
        "first step": (trainer, "training_step", 1),
        "second step": (trainer, "training_step", 2),
        "third step": (trainer, "training_step", 3),
        "in a checkpoint": (trainer, "_save_optimizer_and_scheduler", 1),
        "after a checkpoint": (trainer, "_maybe_log_save_evaluate", 2),
        "saving": (store, "save_model", 1),
        "record": (runs, "write_record", 2),
        "end": (runs.Run, "wait", 1),
    }
    owner, name, call = moments[moment]
    _before(owner, name, happens, call)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")


def _bad_row() -> None:
    from pivot_plugin.errors import DataError

    raise DataError("Row 7 of pairs has no chosen answer.", "Mend it.")


def _mistake() -> None:
    raise ValueError("a reward has divided by nothing")


def _stuck() -> None:
    """An error after which the process stays: the others wait in a collective, whose connection does not break."""
    raise ValueError("the process stays")


def _interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)


FAULTS: dict[str, Callable[[], None]] = {
    "killed": _killed,
    "full disk": _full,
    "bad row": _bad_row,
    "mistake": _mistake,
    "stuck": _stuck,
    "interrupted": _interrupted,
}


def _not_finite() -> None:
    """The loss of the second step of this process is no number."""
    from pivot_plugin.training.tower import TowerTraining

    checked, calls = TowerTraining._checked, []

    def broken(self: Any, loss: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            Path("fault").touch()
            loss = loss * float("nan")
        return checked(self, loss, *args)

    TowerTraining._checked = broken  # type: ignore[method-assign]


def _kept() -> list[torch.nn.Module]:
    """What tiny models are built from now on."""
    from pivot_plugin import testing

    build, built = testing.build, []

    def kept(*args: Any, **kwargs: Any) -> Any:
        model, processor = build(*args, **kwargs)
        built.append(model)
        return model, processor

    testing.build = kept
    return built


def _state(model: torch.nn.Module) -> str:
    """Whether a tiny LLaVA is what it was when it was built."""
    from pivot_plugin.testing import build
    from pivot_plugin.training.sharding import is_divided

    if is_divided(model):
        return "divided"
    before = build("llava")[0].state_dict()
    same = before.keys() == model.state_dict().keys()
    return "as it was" if same and all(model.state_dict()[n].equal(t) for n, t in before.items()) else "changed"


def _outlive(pid: int) -> None:
    """Stay until another process has ended."""
    until = time.monotonic() + 60
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
            time.sleep(0.2)


def main(folder: str, cell: str, broken: str) -> None:
    """One cell of the matrix, which breaks in one process.

    Args:
        folder: of the run.
        cell: as for `cluster.run`, as JSON.
        broken: as JSON: the rank, the fault and the moment; nothing breaks where it is empty.
    """
    torch.set_num_threads(1)
    Path(f"pid-{os.environ.get('RANK')}").write_text(str(os.getpid()))
    told: dict[str, Any] = json.loads(broken)
    breaks = bool(told) and told["rank"] in (int(os.environ.get("RANK", "0")), ALL)
    built = _kept()
    if breaks:
        if told["fault"] == "not finite":
            _not_finite()
        else:
            at(told["moment"], FAULTS[told["fault"]])
    try:
        cluster.run(Path(folder), json.loads(cell))
    except BaseException:
        print(f"the model is {_state(built[0])}", file=sys.stderr)
        if breaks and told["fault"] == "stuck":
            _outlive(int(Path("pid-0" if told["rank"] else "pid-1").read_text()))
        print(f"{time.time() - Path('fault').stat().st_mtime:.1f} s after the fault", file=sys.stderr)
        raise
