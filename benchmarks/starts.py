"""Seconds from the command to the first step on many pairs, by part, and the memory of a process: what a start costs
beside the model. `python -m benchmarks.preferences --rows 1000000 --starts 1 2 8` runs it.

The pairs are a .jsonl file with ten pairs to an image file. Each start is one process: the first of so many of a
launch, which looks at its share of the rows; what the others would have found, it is given. A second start meets the
same data again. Of the reference everything is in the cache, which holds all pairs: what its pass takes is the model's
affair. Seconds are those of processor cores, of workers too: a look is spread over the cores that a process has.
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

PAIRS_PER_IMAGE = 10
PARTS = ("import", "open", "look", "hold out", "pointers", "reference", "order", "first rows")


@dataclass
class Start:
    """One start.

    Attributes:
        rows: of the data.
        processes: of the launch.
        number: 1 for the first with these data, 2 for the second.
        seconds: by part.
        peak_mb: peak resident memory of the process, workers not counted, in 10^6 bytes.
        imported_mb: of it, what it takes to import the libraries.
        files: of the caches, in the end.
    """

    rows: int
    processes: int
    number: int
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mb: float = 0.0
    imported_mb: float = 0.0
    files: int = 0


def write_lines(folder: Path, rows: int, jpeg: Any) -> Path:
    """A .jsonl file with so many pairs, and its image files.

    Args:
        folder: to write into.
        rows: how many.
        jpeg: makes an image's bytes from a random generator.
    """
    rng = np.random.default_rng(0)
    images = -(-rows // PAIRS_PER_IMAGE)
    for number in range(images):
        file = folder / "images" / f"{number // 1000}" / f"{number}.jpg"
        if number % 1000 == 0:
            file.parent.mkdir(parents=True)
        file.write_bytes(jpeg(rng))
    with (folder / "pairs.jsonl").open("w") as lines:
        for number in range(rows):
            image = number // PAIRS_PER_IMAGE
            pair = {
                "image": f"images/{image // 1000}/{image}.jpg",
                "question": f"what is in picture {image}, asked for the {number % PAIRS_PER_IMAGE}th time?",
                "chosen": f"a red cube, two green cylinders and a small blue ball number {number}",
                "rejected": f"nothing but {number} yellow cones, as far as one can see from here",
            }
            lines.write(json.dumps(pair) + "\n")
    return folder / "pairs.jsonl"


def measure(file: Path, rows: int, processes: int, number: int, cache: Path) -> Start:
    """One start, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.starts", str(file), str(rows), str(processes), str(number)]
    environment = {"PIVOT_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        words, env=environment | {"PYTHONPATH": str(root)}, capture_output=True, text=True, cwd=root, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    start = Start(**json.loads(done.stdout.splitlines()[-1]))
    start.files = sum(1 for path in cache.rglob("*") if path.is_file())
    return start


def begin(file: Path, rows: int, processes: int, number: int) -> Start:
    """What a run does with its pairs until the first step, in this process."""
    made = Start(rows, processes, number)
    with _timed(made, "import"):
        from pivot_plugin.data.launch import Launch
        from pivot_plugin.data.looking import BLOCKS_PER_ROUND, ROWS_PER_BLOCK
        from pivot_plugin.data.looks import Looks
        from pivot_plugin.data.pairs import load_pairs
        from pivot_plugin.data.remembered import Block
        from pivot_plugin.data.split import hold_out
        from pivot_plugin.files import cache_folder
        from pivot_plugin.training.reference import KEY, ReferenceCache
        from pivot_plugin.training.reference_pass import ReferencePass
        from pivot_plugin.training.rows import pointing
        from pivot_plugin.training.sampler import ImageGroupSampler
    made.imported_mb = _resident()

    class Others(Launch):
        """The others of a launch, who have found as much as this one."""

        def gather(self, mine: Any) -> list[Any]:
            if not isinstance(mine, dict) or self.count == 1:
                return [mine]
            first = min(mine)
            theirs = {}
            for block in set(range(first, first + max(BLOCKS_PER_ROUND, self.count))) - mine.keys():
                length = min(ROWS_PER_BLOCK, rows - block * ROWS_PER_BLOCK)
                if length > 0:
                    rng = np.random.default_rng(block)
                    looks = Looks.empty(length)
                    images = (block * ROWS_PER_BLOCK + np.arange(length)) // PAIRS_PER_IMAGE
                    looks.keys[:] = [f"{image:032d}" for image in images]
                    looks.contents[:] = rng.integers(0, 256, looks.contents.shape, dtype=np.uint8)
                    theirs[block] = Block(None, looks, fresh=False)
            return [mine, theirs]

    launch = Others(0, processes, 0, processes)
    with _timed(made, "open"):
        pairs = load_pairs(file)
    with _timed(made, "look"):
        pairs.verify(launch=launch)
    with _timed(made, "hold out"):
        training, held_out = hold_out(pairs, 0.02, 42)
    assert held_out is not None
    with _timed(made, "pointers"):
        pointers = pointing([training, held_out])
    cache = ReferenceCache(cache_folder("reference"), {"benchmark": processes})
    if not any(cache.folder.glob("*.arrow")):
        contents = np.ascontiguousarray(pairs.looks.contents).view(KEY)[:, 0]
        for start in range(0, len(contents), 100_000):
            part = contents[start : start + 100_000]
            cache.add(part, np.zeros((len(part), 2), dtype=np.float32))
        cache.merge()
    with _timed(made, "reference"):
        known = ReferencePass(cache, _never, 8, Launch())
        for data, table in zip((training, held_out), pointers, strict=True):
            logps = known(data, "all", quiet=True)
            table.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1])
    with _timed(made, "order"):
        order = iter(ImageGroupSampler(training.image_keys, 42))
        first = [next(order) for _ in range(8)]
    with _timed(made, "first rows"):
        for position in first:
            training[position]
    made.peak_mb = _resident()
    return made


def _never(pairs: Any, positions: Any, size: int) -> Iterator[tuple[list[int], np.ndarray]]:
    raise AssertionError("everything is in the cache")


@contextmanager
def _timed(made: Start, part: str) -> Iterator[None]:
    started = _processor_seconds()
    yield
    made.seconds[part] = _processor_seconds() - started


def _processor_seconds() -> float:
    """Of this process, and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def show(starts: list[Start]) -> Table:
    """The table of some starts."""
    table = Table(title="Processor seconds until the first step, beside what the model takes")
    for column in ("rows", "processes", "start", *PARTS, "together", "peak MB", "MB beside imports", "files of caches"):
        table.add_column(column, justify="right")
    for start in starts:
        table.add_row(
            f"{start.rows:,}",
            str(start.processes),
            str(start.number),
            *(f"{start.seconds[part]:.1f}" for part in PARTS),
            f"{sum(start.seconds.values()):.1f}",
            f"{start.peak_mb:,.0f}",
            f"{start.peak_mb - start.imported_mb:,.0f}",
            str(start.files),
        )
    return table


def run(rows: int, processes: list[int], jpeg: Any) -> list[Start]:
    """First and second starts with so many pairs, for several numbers of processes."""
    starts = []
    with tempfile.TemporaryDirectory() as folder:
        file = write_lines(Path(folder), rows, jpeg)
        for count in processes:
            cache = Path(folder) / f"cache-{count}"
            for number in (1, 2):
                starts.append(measure(file, rows, count, number, cache))
                print(asdict(starts[-1]), file=sys.stderr)
    return starts


if __name__ == "__main__":
    _file, _rows, _processes, _number = sys.argv[1:]
    print(json.dumps(asdict(begin(Path(_file), int(_rows), int(_processes), int(_number)))))
