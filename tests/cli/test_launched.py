"""The command as accelerate's launcher: what it says and how it ends when a process fails, is killed or interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pivot_plugin.testing import build
from tests.helpers import picture, row
from tests.helpers.processes import ROOT, VARIABLES

pytestmark = [pytest.mark.training, pytest.mark.timeout(300)]

CONFIG = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "use_cpu": True,
    "mixed_precision": "no",
    "main_training_function": "main",
    "rdzv_backend": "static",
}
QUICK = ("use_cpu=true", "max_steps=40", "per_device_train_batch_size=2", "save_steps=1000", "logging_steps=1")


def start(folder: Path, pairs: list[dict[str, object]]) -> subprocess.Popen[str]:
    """`pivot optimize` on two processes of this machine; it runs, and its output goes to a file."""
    model, processor = build("llava")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "images").mkdir()
    lines = []
    for number, pair in enumerate(pairs):
        images = [f"images/{number}-{place}.png" for place, _ in enumerate(pair["images"])]  # type: ignore[arg-type]
        for name, image in zip(images, pair["images"], strict=True):  # type: ignore[call-overload]
            image.save(folder / name)
        lines.append(json.dumps({**pair, "images": images}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    (folder / "cpu.yaml").write_text(yaml.safe_dump(CONFIG))
    words = ["optimize", "model", "pairs.jsonl", "-o", "run", "--lora", "4", "--eval-fraction", "0"]
    words += [word for setting in QUICK for word in ("--set", setting)]
    environment = {**VARIABLES, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with (folder / "said").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "pivot_plugin.cli", *words, "--accelerate-config", "cpu.yaml"],
            cwd=folder,
            env=environment,
            stdout=said,
            stderr=said,
            text=True,
        )


def rows(count: int) -> list[dict[str, object]]:
    return [row(f"number {n}?", f"it is {n}", "no", picture(40, 50, n // 2)) for n in range(count)]


def once_training(process: subprocess.Popen[str], folder: Path, does: Callable[[], None]) -> str:
    """What was said in the end, after something was done while the run trained."""
    log = folder / "run" / "log.jsonl"
    while not log.exists() or '"loss"' not in log.read_text():
        assert process.poll() is None, (folder / "said").read_text()[-3000:]
        time.sleep(0.1)
    does()
    began = time.monotonic()
    process.wait(60)
    assert time.monotonic() - began < 30
    return (folder / "said").read_text()


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The launched processes, in the order of their ranks."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found.update({int(v[5:]): int(pid) for v in variables if v.startswith(b"RANK=")})
    return [found[rank] for rank in sorted(found)]


def test_an_interrupt_of_the_launcher_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = start(tmp_path, rows(16))
    said = once_training(process, tmp_path, lambda: os.kill(process.pid, signal.SIGINT))
    assert process.returncode == 130
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert said.count(f"Checkpoint run/{checkpoint.name} is kept; go on with resume=True") == 1
    assert said.count("pivot: interrupted; checkpoints are kept. Go on by: pivot optimize") == 1
    assert 1 <= int(checkpoint.name.split("-")[1]) < 40
    assert "Traceback" not in said and "Connection" not in said
    assert not (tmp_path / "run" / "encoder").exists()


@pytest.mark.distributed
def test_a_killed_process_ends_the_launcher_with_its_name(tmp_path: Path) -> None:
    process = start(tmp_path, rows(16))
    said = once_training(process, tmp_path, lambda: os.kill(workers(process)[1], signal.SIGKILL))
    assert process.returncode == 1
    assert said.count("Process 1 was ended by SIGKILL") == 1
    assert "Traceback" not in said


@pytest.mark.distributed
def test_what_a_failing_process_says_stands_once_in_what_the_command_says(tmp_path: Path) -> None:
    process = start(tmp_path, [*rows(15), row("what?", "", "no", picture(40, 50, 9))])
    assert process.wait(100) == 1
    said = (tmp_path / "said").read_text()
    assert said.count("pivot: ") == 1 and "pivot: In process " in said and "row 15" in said
    assert "Traceback" not in said and "Connection" not in said
