"""Two and three processes under accelerate's engines against one process with the same global batch."""

import functools
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.cluster import ENGINES, FSDP2, VARIABLES
from tests.helpers.processes import launched

pytestmark = [pytest.mark.training, pytest.mark.timeout(300)]

CODE = """
import sys
sys.path.insert(0, sys.argv[3])
from tests.helpers.cluster import main
main(sys.argv[1], sys.argv[4])
"""
LORA = {"lora": 4, "learning_rate": 1.0}
TOWER = {"lora": None, "learning_rate": 0.1}
ALL = {"lora": None, "train": "all", "learning_rate": 0.1}
TALK = {"verb": "instruct", "train": "all", "learning_rate": 0.1}
LEARNING_RATES = {"llava": 1.0, "qwen2_5_vl": 30.0, "internvl": 300.0}
Run = tuple[list[float], dict[str, torch.Tensor]]


def run(folder: Path, engine: str, processes: int, cell: dict[str, Any]) -> Run:
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    cell = {"per_device_train_batch_size": cell.get("batch", 4) // processes, **cell}
    cell.pop("batch", None)
    done = launched(CODE, processes, 0, folder, json.dumps(cell), **VARIABLES[engine])
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((folder / "run" / "run.json").read_text())["history"]
    losses = [log["loss"] for log in history if "loss" in log]
    made = "model" if (folder / "run" / "model").exists() else "encoder"
    return losses, load_file(folder / "run" / made / "model.safetensors")


@functools.cache
def alone(cell: str) -> tuple[Run, dict[str, Any]]:
    """What one process gives, the same for every engine that is compared with it; and the record of its run."""
    with tempfile.TemporaryDirectory() as folder:
        given = run(Path(folder), "ddp", 1, json.loads(cell))
        return given, json.loads((Path(folder) / "run" / "run.json").read_text())


def compare(tmp_path: Path, engine: str, cell: dict[str, Any], processes: int = 2) -> None:
    (losses, weights), _ = alone(json.dumps(cell))
    divided_losses, divided = run(tmp_path / "several", engine, processes, cell)
    assert len(losses) == 3 and losses[0] != pytest.approx(losses[-1], rel=1e-4)
    assert divided_losses == pytest.approx(losses, rel=1e-4)
    assert divided.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(divided[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("engine", "cell"),
    [
        pytest.param("ddp", {**LORA, "images": "mixed", "gradient_checkpointing": True}, id="ddp-lora-mixed"),
        pytest.param("ddp", {**ALL, "objective": "sft"}, id="ddp-sft"),
        pytest.param("fsdp2", {**LORA, "images": "mixed"}, id="fsdp2-lora-mixed"),
        pytest.param("fsdp2", ALL, id="fsdp2-all"),
        pytest.param("zero2", {**TALK, "images": "mixed"}, id="zero2-instruct-mixed"),
        pytest.param("zero3", TOWER, id="zero3-tower"),
    ],
)
def test_an_engine_gives_what_one_process_gives(tmp_path: Path, engine: str, cell: dict[str, Any]) -> None:
    compare(tmp_path, engine, cell)


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param({**LORA, "images": "mixed"}, id="lora-mixed"),
        pytest.param({**TOWER, "gradient_checkpointing": True}, id="tower-checkpointing"),
        pytest.param({**ALL, "objective": "sft"}, id="all-sft"),
        pytest.param({**TALK, "images": "mixed"}, id="instruct-mixed"),
        pytest.param({"verb": "align", "learning_rate": 0.1}, id="align"),
    ],
)
def test_the_matrix(tmp_path: Path, engine: str, family: str, cell: dict[str, Any]) -> None:
    if cell.get("lora"):
        # so that the loss moves
        cell = {**cell, "learning_rate": LEARNING_RATES[family]}
    compare(tmp_path, engine, {**cell, "family": family})


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_three_processes_whose_rows_do_not_divide(tmp_path: Path, engine: str) -> None:
    compare(tmp_path, engine, {**LORA, "batch": 3, "rows": 17}, processes=3)


ROLLOUTS = [
    pytest.param({**LORA, "learning_rate": 30.0}, id="lora"),
    pytest.param({**TOWER, "learning_rate": 3.0, "beta": 0.1}, id="tower-beta"),
    pytest.param({**ALL, "images": "mixed"}, id="all-mixed"),
]


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", ROLLOUTS)
def test_rollouts_train_as_in_one_process(tmp_path: Path, engine: str, cell: dict[str, Any]) -> None:
    cell = {**cell, "objective": "grpo"}
    (_, weights), record = alone(json.dumps(cell))
    _, divided = run(tmp_path / "several", engine, 2, cell)
    several = json.loads((tmp_path / "several" / "run" / "run.json").read_text())["history"]
    one = record["history"]
    assert max(record["weight_change"].values()) > 1e-4
    for name in ("reward", "reward_std", "grad_norm", "completions/mean_length"):
        values = [log[name] for log in one if name in log]
        assert len(values) == 3 and any(values)
        assert [log[name] for log in several if name in log] == pytest.approx(values, rel=1e-3), name
    assert divided.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(divided[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({**FSDP2, **VARIABLES["ddp"]}, "accelerate runs DDP instead"),
        ({**VARIABLES["fsdp2"], "FSDP_VERSION": "1"}, "FSDP 1 is asked for"),
    ],
)
def test_a_launch_that_would_run_something_else_is_refused(
    tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    done = launched(CODE, 2, 0, tmp_path / "two", json.dumps(LORA), **variables)
    assert done.returncode != 0
    assert "SettingsError" in done.stderr and said in done.stderr
