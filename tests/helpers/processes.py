"""Processes that tests start: programs, the `pivot` command, and scripts in several processes."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# as a user has them: accelerate leaves some of its own behind in a process that has trained
VARIABLES = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1"}
# of all variables, libraries may read these no earlier than when they are used
READ_LATER = ("PIVOT_", "PYTHONPATH")
# of a process that has failed, while others that heard of it have left
SECONDS_TO_SAY_WHY = 3.0


class Warm:
    """A process that runs programs in forks of itself (see warm.py)."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=VARIABLES,
        )
        self._running: set[int] = set()
        self._ended: dict[int, int] = {}

    def start(self, order: dict[str, Any]) -> int:
        """Start a program; returns the number of its process."""
        (pid,) = self._asked(order)
        self._running.add(pid)
        return pid

    def wait(self, *pids: int) -> dict[int, int]:
        """Wait until one of some programs has ended; returns the status of all that have."""
        while not (ended := {pid: self._ended[pid] for pid in pids if pid in self._ended}):
            pid, status = self._asked({})
            self._running.remove(pid)
            self._ended[pid] = status
        return ended

    def _asked(self, order: dict[str, Any]) -> list[int]:
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
            reply = self._process.stdout.readline()
            assert reply, "the warm interpreter ended"
        except BaseException:
            # a time limit, say: the next reply would be this order's
            self._process.kill()
            for pid in self._running:
                os.kill(pid, signal.SIGKILL)
            _warm.cache_clear()
            raise
        return list(map(int, reply.split()))


@functools.cache
def _warm() -> Warm:
    return Warm()


class Program:
    """A program in a fork of the warm interpreter.

    Args:
        code: of the program.
        arguments: of its command line.
        folder: to run in.
        variables: environment variables beside those of a user; libraries have been imported before they are set.
        listened: whether the program's standard output is read while it runs, from `stdout`, and not kept.
    """

    def __init__(
        self, code: str, arguments: list[str], folder: Path, variables: dict[str, str], listened: bool = False
    ) -> None:
        now = {name: value for name, value in os.environ.items() if name.startswith(READ_LATER)}
        self._arguments = [code, *arguments]
        self._kept = tempfile.TemporaryDirectory()
        self._files = [Path(self._kept.name) / name for name in ("stdout", "stderr")]
        self._files[1].touch()
        os.mkfifo(self._files[0]) if listened else self._files[0].touch()
        order = {
            "code": code,
            "arguments": arguments,
            "folder": str(folder),
            "environment": {**VARIABLES, **now, **variables},
            "output": list(map(str, self._files)),
        }
        self.pid = _warm().start(order)
        self.stdout = self._files[0].open() if listened else None

    def kill(self) -> None:
        """End it at once; it may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """What it has printed, and its status, when it has ended."""
        printed = self.stdout.read() if self.stdout else ""
        status = _warm().wait(self.pid)[self.pid]
        if self.stdout:
            self.stdout.close()
        else:
            printed = self._files[0].read_text()
        said = self._files[1].read_text()
        self._kept.cleanup()
        return subprocess.CompletedProcess(self._arguments, status, printed, said)


def python(
    code: str, *arguments: str | Path, folder: Path, cold: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, in a folder, with more environment variables.

    `cold` is an interpreter that imports the libraries itself; so is one with variables that they may read meanwhile.
    """
    words = list(map(str, arguments))
    if not cold and all(name.startswith(READ_LATER) for name in variables):
        return Program(code, words, folder, variables).wait()
    command, environment = [sys.executable, "-c", code, *words], {**VARIABLES, **variables}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def script(file: Path, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A script, as `python FILE ...` runs it."""
    code = f"import runpy, sys; sys.argv[0] = {str(file)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    return python(code, *arguments, folder=folder)


def pivot(*arguments: str | Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, as a user types it."""
    return python("from pivot_plugin.cli import main; main()", *arguments, folder=folder, **variables)


def launched(
    code: str, processes: int, size: int, folder: Path, *arguments: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """A script in some processes, each with its batch size, its run in `run` below the folder.

    When one fails the others are ended, as torchrun does; what is returned are the status of the first to fail, and
    what all have said.

    Args:
        code: of the script; its arguments are the run's folder, the batch size, this repository, and more.
        processes: how many.
        size: of a batch.
        folder: to be made.
        *arguments: more for the script.
        **variables: of the environment; those of DDP on the CPU where there are none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = started_in(code, processes, folder, [str(folder / "run"), str(size), str(ROOT), *arguments], variables)
    return first_failure(code, started)


def started_in(
    code: str, processes: int, folder: Path, arguments: list[str], variables: dict[str, str]
) -> list[Program]:
    """A script in some processes that find each other; they run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address, port = free.getsockname()
    started = []
    for rank in range(processes):
        of_rank = {
            "PIVOT_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            **(variables or {"ACCELERATE_USE_CPU": "true"}),
        }
        started.append(Program(code, arguments, folder, of_rank))
    return started


def first_failure(code: str, started: list[Program]) -> "subprocess.CompletedProcess[str]":
    """Wait for processes of one script; when one fails the others are ended."""
    pids = {program.pid for program in started}
    failure = 0
    while pids and not failure:
        ended = _warm().wait(*pids)
        pids -= ended.keys()
        failure = next(filter(None, ended.values()), 0)
    if failure and pids:
        # who failed first may still be printing why, when another that heard of it has left
        time.sleep(SECONDS_TO_SAY_WHY)
    for program in started:
        program.kill()
    done = [program.wait() for program in started]
    printed, said = ("".join(getattr(run, stream) for run in done) for stream in ("stdout", "stderr"))
    return subprocess.CompletedProcess(code, failure, printed, said)
