"""Seconds from the command to the first step of `pivot optimize`, and where they go.

    python -m benchmarks.startup                       # 10,000 pairs, a first and a second start
    python -m benchmarks.startup --pairs 1000 --model internvl

The model is a tiny one, so that what is left is the machinery; each pair has a picture of its own, in parquet files as
data sets have them. A start is a process of its own that ends after its first step. The second start meets the same
data and the caches that the first one left. Parts are clocked where the run passes from one to the next, each without
what it calls of the others; their sum is the time from the command on. Beside seconds stand those of processor cores,
which other work on the machine changes less (workers count when they have ended). `--pairs 1000000` takes hours on two
cores: `python -m benchmarks.preferences` has what loading and checking cost at that size.
"""

import argparse
import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SEED = 0
# where each part is entered: by any of these; that there is none is an error
SEAMS: dict[str, list[str]] = {
    "model loaded": ["pivot_plugin.runs.run:load_model"],
    "data opened": ["pivot_plugin.data.pairs:open_source"],
    "rows checked": ["pivot_plugin.data.rows:RowDataset.verify"],
    "contents hashed": [
        "pivot_plugin.data.rows:RowDataset.content_key",
        "pivot_plugin.data.remembered:RememberedBlocks.read",
    ],
    "rows held out": ["pivot_plugin.runs.run:hold_out"],
    "model hashed": ["pivot_plugin.training.pair_trainer:model_fingerprint"],
    "forest check": ["pivot_plugin.training.tower:read_rows"],
    "reference pass": [
        "pivot_plugin.training.pair_trainer:PivotTrainer._fill",
        "pivot_plugin.training.reference_pass:ReferencePass.__call__",
    ],
    "reference read": ["pivot_plugin.training.reference:ReferenceCache.look_up"],
    "saliency and held-out metrics": [
        "pivot_plugin.runs.monitoring:Monitoring.add_to",
        "pivot_plugin.training.pair_trainer:PivotTrainer.reference_metrics",
    ],
    "first step": ["pivot_plugin.runs.run:Run.train"],
}
PYTHON, IMPORTS, REST = "Python starts", "imports", "the rest"


class Clock:
    """Seconds by part, a part's own without those of the parts inside it."""

    def __init__(self, begun: float) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._inside = [PYTHON]
        self._last = [begun, 0.0]

    def _turn(self) -> None:
        now = [time.time(), _processor_seconds()]
        before = self.seconds.get(self._inside[-1], [0.0, 0.0])
        self.seconds[self._inside[-1]] = [
            spent + then - last for spent, then, last in zip(before, now, self._last, strict=True)
        ]
        self._last = now

    def started(self) -> None:
        """Python is there; what follows outside of the parts is the rest."""
        self._turn()
        self._inside = [REST]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count for a part meanwhile."""
        self._turn()
        self._inside.append(name)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    def stop(self) -> dict[str, list[float]]:
        """Seconds of all parts until now, and those of processor cores, in the order in which they were left."""
        self._turn()
        return self.seconds


def _processor_seconds() -> float:
    """Of this process, and of its workers that have ended."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def clocked(clock: Clock, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose calls count for a part."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.part(part):
            return function(*args, **kwargs)

    return call


def holder(place: str) -> tuple[Any, str] | None:
    """The module or class that holds a function, and the function's name there; None where there is no such.

    Args:
        place: "module:function" or "module:Class.method".
    """
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    try:
        owner = functools.reduce(getattr, owners, import_module(module))
    except (ModuleNotFoundError, AttributeError):
        return None
    return (owner, name) if hasattr(owner, name) else None


def enter(clock: Clock, seams: dict[str, list[str]]) -> None:
    """Have every part counted from now on.

    Args:
        clock: that counts.
        seams: for each part the functions that it is entered by, of which one at least must exist.

    Raises:
        SystemExit: for a part that has no seam any more.
    """
    for part, places in seams.items():
        holders = [found for place in places if (found := holder(place))]
        if not holders:
            raise SystemExit(f"{part!r} is entered by none of {', '.join(places)}: mend benchmarks.startup.SEAMS.")
        for owner, name in holders:
            setattr(owner, name, clocked(clock, part, getattr(owner, name)))


def child(begun: float, out: Path, arguments: list[str]) -> None:
    """Run `pivot` with some arguments in this process until its first step is done.

    Args:
        begun: when the command was given, in seconds since 1970.
        out: file for the seconds of each part.
        arguments: of `pivot`.
    """
    clock = Clock(begun)
    clock.started()
    with clock.part(IMPORTS):
        from transformers import Trainer, TrainerCallback

        from pivot_plugin.cli import main

        import_module("pivot_plugin.runs.optimize")

    class Ends(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            out.write_text(json.dumps(clock.stop()))
            sys.stdout.flush()
            # what is measured is over; nothing of the folder is wanted
            os._exit(0)

    constructor = Trainer.__init__

    def constructed(self: Trainer, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        self.add_callback(Ends())

    Trainer.__init__ = constructed
    enter(clock, SEAMS)
    sys.argv = ["pivot", *arguments]
    main()
    raise SystemExit("the run ended without a step")


@dataclass
class Start:
    """One start.

    Attributes:
        pairs: of the data.
        number: 1 for the first with these data.
        parts: for each part its seconds, and those of processor cores.
    """

    pairs: int
    number: int
    parts: dict[str, list[float]]

    @property
    def total(self) -> list[float]:
        """From the command to the end of the first step."""
        return [sum(column) for column in zip(*self.parts.values(), strict=True)]


def start(folder: Path, pairs: int, number: int, data: str, batch: int) -> Start:
    """Start once, in a process of its own, with the caches below a folder."""
    out = folder / f"seconds-{number}.json"
    words = ["optimize", str(folder / "model"), data, "-o", str(folder / f"run-{number}")]
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": batch}
    for name, value in {**settings, "per_device_eval_batch_size": batch, "disable_tqdm": True}.items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    caches = {"HF_HOME": str(folder / "hf"), "PIVOT_CACHE": str(folder / "pivot"), "HF_HUB_OFFLINE": "1"}
    log = folder / f"log-{number}"
    with log.open("w") as told:
        begun = time.time()
        command = [sys.executable, "-m", "benchmarks.startup", "--child", str(begun), str(out), *words]
        ended = subprocess.run(command, env={**os.environ, **caches}, stdout=told, stderr=told, check=False)
    if ended.returncode or not out.exists():
        raise SystemExit(log.read_text())
    return Start(pairs, number, json.loads(out.read_text()))


def show(starts: list[Start]) -> str:
    """A table of starts, in Markdown, a row per part: seconds, and in brackets those of processor cores."""
    names = list(dict.fromkeys(name for one in starts for name in one.parts))
    names.sort(key=lambda name: name == REST)
    head = ["part", *(f"{one.pairs:,} pairs, start {one.number}" for one in starts)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        lines.append("| " + " | ".join([name, *(_cell(one.parts.get(name, [0.0, 0.0])) for one in starts)]) + " |")
    lines.append("| " + " | ".join(["**together**", *(f"**{_cell(one.total)}**" for one in starts)]) + " |")
    return "\n".join(lines)


def _cell(seconds: list[float]) -> str:
    return "{:.1f} ({:.1f})".format(*seconds)


def measure(pairs: int, family: str, batch: int, starts: int) -> list[Start]:
    """Some starts, one after the other, with the same data and caches."""
    import torch

    from benchmarks.preferences import write
    from pivot_plugin.testing.families import FAMILIES

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(SEED)
        FAMILIES[family].build_model().save_pretrained(folder / "model")
        FAMILIES[family].build_processor().save_pretrained(folder / "model")
        data = write(folder, pairs)["parquet"]
        return [start(folder, pairs, number + 1, data, batch) for number in range(starts)]


def main() -> None:
    """Measure, print the table and write the JSON."""
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000])
    parser.add_argument("--model", default="llava", help="a tiny one, by the name of its family")
    parser.add_argument("--batch", type=int, default=16, help="pairs")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    starts = [one for pairs in options.pairs for one in measure(pairs, options.model, options.batch, options.starts)]
    print(show(starts))
    options.out.mkdir(parents=True, exist_ok=True)
    from benchmarks.machine import described

    record = {**described("cpu"), "model": options.model, "starts": [asdict(one) for one in starts]}
    (options.out / "startup.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
