"""One process fails, all do: with the first one's message, soon, and with nothing else on top."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pivot_plugin.errors import DataError, PeerError, PivotError, SettingsError, TrainingError
from pivot_plugin.training.processes import Processes
from tests.helpers.breaking import ALL, PROGRAM, in_each
from tests.helpers.cluster import ENGINES, VARIABLES
from tests.helpers.processes import ROOT, started_in

# Processes as threads of one, with one store: what they say to each other, without what they train


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pivot_plugin.training.processes.SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr("pivot_plugin.training.processes.SECONDS_TO_BE_HEARD", 1.0)
    monkeypatch.setattr("pivot_plugin.training.processes.SECONDS_TO_FAIL_ALIKE", 1.0)
    monkeypatch.setattr("pivot_plugin.training.processes.SECONDS_OF_BEATS", 0.5)


BROKEN = "[../third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:427."


def test_the_first_error_is_the_error_of_all(quick: None) -> None:
    left = threading.Event()

    def run(processes: Processes) -> None:
        with processes.together():
            if processes.rank == 1:
                left.set()
                raise DataError("Row 7 is bad.", "Mend it.")
            left.wait()
            time.sleep(0.2)
            raise TrainingError("Training stopped.") from RuntimeError(BROKEN)

    first, second, third = in_each(3, run)
    assert isinstance(second, DataError) and str(second) == "In process 1 of 3: Row 7 is bad. Mend it."
    for other in (first, third):
        assert isinstance(other, PeerError) and "In process 1 of 3: Row 7 is bad." in other.finding
        assert other.remedy == "Mend it." and BROKEN not in str(other)


def test_an_error_of_others_is_told_as_one_of_ours(quick: None) -> None:
    def run(processes: Processes) -> None:
        with processes.together():
            if processes.rank == 0:
                raise OSError(28, "No space left on device", "/data")
            time.sleep(0.3)
            raise RuntimeError(BROKEN)

    full, other = in_each(2, run)
    assert isinstance(full, TrainingError) and isinstance(full.__cause__, OSError)
    assert "In process 0 of 2: Stopped by No space left on device" in str(full)
    assert isinstance(other, PeerError) and "No space left on device" in str(other)


def test_a_process_that_has_gone_is_named(quick: None) -> None:
    def run(processes: Processes) -> None:
        if processes.rank == 1:
            # it is there, and then it is not
            processes._store.set("place/1", "node-7, process id 11")  # type: ignore[union-attr]
            return
        with processes.together():
            raise RuntimeError(BROKEN)

    there, _ = in_each(2, run)
    assert isinstance(there, TrainingError) and not isinstance(there, PeerError)
    assert str(there).startswith("Process 1 of 2 (node-7, process id 11) has gone without a word")
    assert there.__cause__ is None


def test_an_interrupt_ends_the_others_as_one(quick: None) -> None:
    def run(processes: Processes) -> None:
        with processes.together():
            if processes.rank == 0:
                raise KeyboardInterrupt
            time.sleep(0.3)
            raise RuntimeError(BROKEN)

    interrupted, other = in_each(2, run)
    assert isinstance(interrupted, KeyboardInterrupt)
    assert isinstance(other, PeerError) and other.code == 130


def test_an_error_of_another_process_is_silent_where_nobody_catches_it() -> None:
    error = PeerError("Process 1 has ended the run.", "Mend it.")
    assert isinstance(error, PivotError) and isinstance(error, SystemExit) and error.code == 1
    assert str(error) == "Process 1 has ended the run. Mend it."


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ([{"lora": 4}, {"lora": 4}, {"lora": 4}], None),
        ([{"lora": 4}, {"lora": 4}, {"lora": 8}], "Process 2 of 3 (on "),
        ([{"reward": object()}, {"reward": object()}, {"reward": object()}], None),
        ([{"target": {"q", "k", "v"}}, {"target": {"v", "k", "q"}}, {"target": {"k", "v", "q"}}], None),
        ([{"versions": {"torch": "2.14"}}, {"versions": {"torch": "2.13"}}, {"versions": {"torch": "2.14"}}], "torch"),
    ],
)
def test_what_differs_is_named_by_the_process_in_which_it_does(facts: list[Any], named: str | None) -> None:
    found = in_each(3, lambda processes: processes.compare("code", facts[processes.rank]))
    differ = [error for error in found if error is not None]
    assert bool(differ) == (named is not None)
    for error in differ:
        assert isinstance(error, SettingsError) and named is not None and named in str(error)
        assert "process 0 has" in str(error)


def test_the_first_process_decides() -> None:
    found = in_each(3, lambda processes: processes.decided("checkpoint", f"of {processes.rank}"))
    assert found == ["of 0"] * 3
    assert in_each(1, lambda processes: processes.decided("checkpoint", 7)) == [7]


def test_all_wait_for_the_last() -> None:
    arrived: list[int] = []

    def run(processes: Processes) -> int:
        if processes.rank == 2:
            time.sleep(0.3)
        arrived.append(processes.rank)
        processes.wait("here")
        return len(arrived)

    assert in_each(3, run) == [3, 3, 3]


@pytest.mark.parametrize(("every", "last"), [(1, 4), (3, 6)])
def test_all_stop_after_the_same_step_of_those_to_go_on_from(every: int, last: int) -> None:
    step = threading.Barrier(2)

    def run(processes: Processes) -> int:
        for number in range(1, 20):
            # the gradients of all
            step.wait()
            if processes.rank == 1 and number == 3:
                processes._store.set("interrupted", "1")  # type: ignore[union-attr]
            step.wait()
            if processes.stops_after(number, every):
                return number
        return 0

    assert in_each(2, run) == [last, last]


def test_processes_that_fail_alike_are_told_from_one_that_fails_alone(quick: None) -> None:
    error = TrainingError("The gradient became nan.")
    assert in_each(2, lambda processes: processes.failed_alike(error)) == [True, True]
    assert in_each(2, lambda processes: processes.rank == 1 and processes.failed_alike(error)) == [False, False]


# Real ones, that train

CELL = {"per_device_train_batch_size": 2, "lora": 4, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def broken(
    folder: Path, engine: str, rank: int, fault: str, moment: str, **cell: Any
) -> tuple[list[int], list[str], float]:
    """Two processes, of which one breaks: their status, what each has said, and the longest run's seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"rank": rank, "fault": fault, "moment": moment}
    words = [str(folder / "run"), "0", str(ROOT), json.dumps({**CELL, **cell}), json.dumps(told)]
    done = [process.wait() for process in started_in(PROGRAM, 2, folder, words, VARIABLES[engine])]
    said = [run.stderr for run in done]
    seconds = [float(found) for text in said for found in re.findall(r"(\d+\.\d) s after the fault", text)]
    return [run.returncode for run in done], said, max(seconds, default=0.0)


SAID = {
    "bad row": "DataError: In process {rank} of 2: Row 7 of pairs has no chosen answer. Mend it.",
    "full disk": "TrainingError: In process {rank} of 2: Training stopped: '",
    "mistake": "In process {rank} of 2: Training stopped with ValueError: a reward has divided by nothing",
    "not finite": "TrainingError: In process {rank} of 2: The loss became nan at step 1 on row",
    "stuck": "In process {rank} of 2: Training stopped with ValueError: the process stays",
}
CASES = [
    ("ddp", 1, "bad row", "checks"),
    ("ddp", 0, "full disk", "in a checkpoint"),
    ("fsdp2", 1, "not finite", "a step"),
    ("ddp", 0, "mistake", "reference"),
    ("fsdp2", 0, "full disk", "in a checkpoint"),
    ("zero2", 1, "mistake", "second step"),
    ("zero3", 1, "not finite", "a step"),
    ("fsdp2", 1, "stuck", "second step"),
]


@pytest.mark.training
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("engine", "rank", "fault", "moment"),
    [
        pytest.param(*case, id="-".join(map(str, case)), marks=[pytest.mark.distributed] if number > 2 else [])
        for number, case in enumerate(CASES)
    ],
)
def test_an_error_in_one_process_ends_all_with_its_message(
    tmp_path: Path, engine: str, rank: int, fault: str, moment: str
) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    statuses, said, seconds = broken(tmp_path / "two", engine, rank, fault, moment)
    assert all(status == 1 for status in statuses)
    message = SAID[fault].format(rank=rank)
    assert message in said[rank]
    other = said[1 - rank]
    assert "Traceback" not in other and "Connection" not in other and message not in other
    assert 0 < seconds < 30


@pytest.mark.training
@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", ENGINES)
def test_processes_that_fail_alike_leave_the_model_as_it_was_in_the_main_one(tmp_path: Path, engine: str) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    statuses, said, _ = broken(tmp_path / "two", engine, ALL, "bad row", "third step")
    assert all(status == 1 for status in statuses)
    assert "the model is as it was" in said[0]
    assert ("the model is as it was" in said[1]) == (engine in ("ddp", "zero2"))
    # one of them has said so
    assert sum("Row 7 of pairs has no chosen answer" in text for text in said) == 1
