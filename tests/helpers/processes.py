"""Processes that tests start: the `pivot` command, and scripts in several processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pivot(*arguments: str | Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1", **variables}
    command = [sys.executable, "-c", "from pivot_plugin.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def launched(code: str, processes: int, size: int, folder: Path) -> "subprocess.CompletedProcess[str]":
    """A script in some processes, each with its batch size, its run in `run` below the folder."""
    folder.mkdir()
    (folder / "script.py").write_text(code)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [sys.executable, *launch, str(folder / "script.py"), str(folder / "run"), str(size), str(ROOT)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PIVOT_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        },
        check=False,
    )
