"""Under every engine: a process that is killed, and held-out rows that are watched, change nothing of the encoder."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.breaking import PROGRAM
from tests.helpers.cluster import ENGINES, VARIABLES
from tests.helpers.processes import ROOT, started_in

pytestmark = [pytest.mark.training, pytest.mark.timeout(300)]

CELL = {
    "per_device_train_batch_size": 2,
    "lora": 4,
    "learning_rate": 1e-2,
    "optim": "adamw_torch",
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 4,
}
# of a run, in their order: what it is killed at, and which process
MOMENTS = [
    ("checks", 1),
    ("reference", 0),
    ("second step", 1),
    ("in a checkpoint", 0),
    ("after a checkpoint", 1),
    ("second step", 0),
    ("saving", 0),
    ("record", 0),
]


def run(folder: Path, engine: str, broken: dict[str, Any], processes: int = 2, **cell: Any) -> list[int]:
    """A run in some processes, in which one may break; the status of each."""
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    words = [str(folder / "run"), "0", str(ROOT), json.dumps({**CELL, **cell}), json.dumps(broken)]
    done = [process.wait() for process in started_in(PROGRAM, processes, folder, words, VARIABLES[engine])]
    if not broken:
        assert not any(ended.returncode for ended in done), "\n".join(ended.stderr[-1500:] for ended in done)
    return [ended.returncode for ended in done]


def encoder(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "encoder" / "model.safetensors")


def record(folder: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((folder / "run" / "run.json").read_text())
    return written


def killed(tmp_path: Path, engine: str, moments: list[tuple[str, int]], **cell: Any) -> None:
    """Kill a run at some moments, each time going on with it, and compare its end with an undisturbed one's."""
    run(tmp_path / "straight", engine, {}, **cell)
    folder = tmp_path / "killed"
    for moment, rank in moments:
        statuses = run(folder, engine, {"rank": rank, "fault": "killed", "moment": moment}, resume=True, **cell)
        assert statuses[rank] == -9, f"{moment} never came"
        assert statuses[1 - rank] == 1, moment
        assert not (folder / "run" / "run.json").exists() or not record(folder)["finished"], moment
    run(folder, engine, {}, resume=True, **cell)
    expected, found = encoder(tmp_path / "straight"), encoder(folder)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # reference log-probabilities that were computed in other batches are rounded differently
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    losses = [
        [log["loss"] for log in record(tmp_path / of)["history"] if "loss" in log] for of in ("straight", "killed")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert [path.name for path in (folder / "run").glob(".*")] == []


def test_a_process_killed_in_a_checkpoint_and_while_saving(tmp_path: Path) -> None:
    killed(tmp_path, "ddp", [("in a checkpoint", 1), ("saving", 0)], max_steps=2)


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_killed_at_eight_moments(tmp_path: Path, engine: str) -> None:
    killed(tmp_path, engine, MOMENTS)


WATCHED = {
    "held_out": 4,
    "eval_steps": 1,
    "eval_strategy": "steps",
    "max_steps": 8,
    "patience": 2,
    "load_best_model_at_end": True,
    # Adam makes noise of gradients near nothing as large as a gradient
    "optim": "sgd",
    "learning_rate": 10.0,
    "save_total_limit": 2,
}


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_the_watch_decides_as_one_process_does(tmp_path: Path, engine: str) -> None:
    run(tmp_path / "one", "ddp", {}, 1, **WATCHED, per_device_train_batch_size=4)
    run(tmp_path / "two", engine, {}, **WATCHED)
    one, two = (record(tmp_path / of) for of in ("one", "two"))
    looks = [[log["eval_loss"] for log in of["history"] if "eval_loss" in log] for of in (one, two)]
    assert 2 <= len(looks[0]) < WATCHED["max_steps"]
    assert looks[1] == pytest.approx(looks[0], rel=1e-4)
    ends = [
        {name: log[name] for log in of["history"] for name in log if name.startswith("watch/best")} for of in (one, two)
    ]
    assert ends[0] == ends[1] and ends[0]
    for name, value in one["metrics"]["after"].items():
        assert two["metrics"]["after"][name] == pytest.approx(value, rel=1e-4, abs=1e-5)
    expected, found = encoder(tmp_path / "one"), encoder(tmp_path / "two")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
