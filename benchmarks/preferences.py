"""Peak memory and rows per second of loading and checking preference pairs, at two sizes side by side.

    python -m benchmarks.preferences                      # 10,000 and 200,000 rows, about five minutes
    python -m benchmarks.preferences --rows 1000 20000
    python -m benchmarks.preferences --rows 1000000 --starts 1 2 8    # until the first step of a run; see starts.py

Every case runs in a process of its own. Memory is the proportional set size (shared pages counted once) summed over
that process and its workers, sampled twice a second; `anonymous` leaves out pages of files, which the kernel takes back
when it needs them. Each row of the table has an image of its own; the .jsonl rows share 1,000 files.
"""

import argparse
import contextlib
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import starts

RESULTS = Path(__file__).parent / "results"
SIDE = 64
FILES = 1000
SHARD = 20_000
WORDS = ("red", "blue", "green", "round", "square", "cat", "dog", "tree", "house", "left", "right", "one", "two")

CASES = {
    "import only": "import pivot_plugin.preferences",
    "check, parquet": "from pivot_plugin.preferences import check; check({parquet!r})",
    "check, jsonl and image files": "from pivot_plugin.preferences import check; check({jsonl!r})",
    "load and read all, stream": (
        "import datasets; from pivot_plugin.preferences import load\n"
        "files = {parquet!r} + '/*.parquet'\n"
        "rows = datasets.load_dataset('parquet', data_files=files, split='train', streaming=True)\n"
        "for pair in load(rows): pass"
    ),
}


@dataclass(frozen=True)
class Measured:
    """One case at one size.

    Attributes:
        case: its name.
        rows: how many.
        seconds: for the whole process, start included.
        peak_mb: peak proportional set size of the process and its workers, in 10^6 bytes.
        anonymous_mb: of this, what is not backed by files.
    """

    case: str
    rows: int
    seconds: float
    peak_mb: float
    anonymous_mb: float


def write(folder: Path, rows: int) -> dict[str, str]:
    """A parquet folder with an image per row, and a .jsonl file beside image files."""
    rng = np.random.default_rng(0)
    parquet, jsonl = folder / f"parquet-{rows}", folder / f"jsonl-{rows}"
    parquet.mkdir(), jsonl.mkdir()
    for number in range(min(rows, FILES)):
        (jsonl / f"{number}.jpg").write_bytes(_jpeg(rng))
    with (jsonl / "pairs.jsonl").open("w") as lines:
        for start in range(0, rows, SHARD):
            shard = [_row(rng, number) for number in range(start, min(start + SHARD, rows))]
            for number, row in enumerate(shard, start):
                lines.write(json.dumps({**row, "image": f"{number % FILES}.jpg"}) + "\n")
            images = [{"bytes": _jpeg(rng), "path": None} for _ in shard]
            features = datasets.Features(
                {**{name: datasets.Value("string") for name in shard[0]}, "image": datasets.Image()}
            )
            table = pa.table({**{name: [row[name] for row in shard] for name in shard[0]}, "image": images})
            table = table.cast(features.arrow_schema)
            pq.write_table(table, parquet / f"train-{start:08d}.parquet")
    return {"parquet": str(parquet), "jsonl": str(jsonl)}


def _row(rng: np.random.Generator, number: int) -> dict[str, str]:
    answers = [" ".join(rng.choice(WORDS, 12)) for _ in range(2)]
    return {"question": f"what is in picture {number}?", "chosen": answers[0], "rejected": answers[1] + " no"}


def _jpeg(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((SIDE, SIDE)).save(buffer, "JPEG")
    return buffer.getvalue()


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _tree(int(child))


def _memory(pid: int) -> tuple[float, float]:
    """Proportional set size of a process and those below it, and its anonymous part, in 10^6 bytes."""
    total = anonymous = 0
    for process in _tree(pid):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("Pss", "Pss_Anon"):
                kibibytes = int(value.split()[0])
                total += kibibytes * (name == "Pss")
                anonymous += kibibytes * (name == "Pss_Anon")
    return total * 1024 / 1e6, anonymous * 1024 / 1e6


def measure(case: str, rows: int, folders: dict[str, str], cache: Path) -> Measured:
    """Run one case in a process of its own and watch it."""
    started = time.perf_counter()
    environment = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    with (cache / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", CASES[case].format(**folders)], stderr=log, stdout=log, env=environment
        )
        peaks = [0.0, 0.0]
        while process.poll() is None:
            # a process that ends meanwhile has no numbers
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                peaks = [max(peak, now) for peak, now in zip(peaks, _memory(process.pid), strict=True)]
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit((cache / "log").read_text())
    return Measured(case, rows, time.perf_counter() - started, *peaks)


def show(results: list[Measured]) -> Table:
    table = Table(title=f"Preference pairs, {platform.machine()}, datasets {datasets.__version__}")
    for column in ("case", "rows", "seconds", "rows/s", "peak MB", "anonymous MB", "anonymous, to fewest rows"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for result in results:
        fewest = min((other for other in results if other.case == result.case), key=lambda other: other.rows)
        values: list[Any] = [
            result.rows,
            f"{result.seconds:.1f}",
            f"{result.rows / result.seconds:,.0f}",
            f"{result.peak_mb:,.0f}",
            f"{result.anonymous_mb:,.0f}",
            f"{result.anonymous_mb / fewest.anonymous_mb:.2f}",
        ]
        table.add_row(result.case, *map(str, values))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 200_000])
    parser.add_argument("--starts", type=int, nargs="+", help="numbers of processes, of which one's start is measured")
    asked = parser.parse_args()
    if asked.starts:
        started = [start for rows in asked.rows for start in starts.run(rows, asked.starts, _jpeg)]
        Console(width=160).print(starts.show(started))
        (RESULTS / "starts.json").write_text(json.dumps([asdict(start) for start in started], indent=1) + "\n")
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in asked.rows:
            folders = write(Path(folder), rows)
            for case in CASES:
                cache = Path(folder) / f"cache-{rows}-{len(results)}"
                cache.mkdir()
                results.append(measure(case, rows, folders, cache))
                print(f"{case}, {rows} rows: done", file=sys.stderr)
    results.sort(key=lambda result: (list(CASES).index(result.case), result.rows))
    Console(width=130).print(show(results))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "preferences.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
