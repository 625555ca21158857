"""Processes that tests start: programs, the `pivot` command, and scripts in several processes."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# as a user has them: accelerate leaves some of its own behind in a process that has trained
VARIABLES = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1"}
# of all variables, libraries may read these no earlier than when they are used
READ_LATER = ("PIVOT_", "PYTHONPATH")


class Warm:
    """A process that runs programs in forks of itself (see warm.py)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=VARIABLES,
        )

    def run(
        self, code: str, arguments: list[str], folder: Path, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        assert self.process.stdin and self.process.stdout
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
            order = {
                "code": code,
                "arguments": arguments,
                "folder": str(folder),
                "environment": environment,
                "output": [out.name, err.name],
            }
            try:
                print(json.dumps(order), file=self.process.stdin, flush=True)
                status = self.process.stdout.readline()
            except BaseException:
                # a time limit, say: the next answer would be this program's
                self.process.kill()
                _warm.cache_clear()
                raise
            assert status, "the warm interpreter ended"
            printed, said = (Path(file.name).read_text() for file in (out, err))
        return subprocess.CompletedProcess([code, *arguments], int(status), printed, said)


@functools.cache
def _warm() -> Warm:
    return Warm()


def python(
    code: str, *arguments: str | Path, folder: Path, cold: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, in a folder, with more environment variables.

    `cold` is an interpreter that imports the libraries itself; so is one with variables that they may read meanwhile.
    """
    words = list(map(str, arguments))
    now = {name: value for name, value in os.environ.items() if name.startswith(READ_LATER)}
    environment = {**VARIABLES, **now, **variables}
    if not cold and all(name.startswith(READ_LATER) for name in variables):
        return _warm().run(code, words, folder, environment)
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def script(file: Path, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A script, as `python FILE ...` runs it."""
    code = f"import runpy, sys; sys.argv[0] = {str(file)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    return python(code, *arguments, folder=folder)


def pivot(*arguments: str | Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, as a user types it."""
    return python("from pivot_plugin.cli import main; main()", *arguments, folder=folder, **variables)


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
