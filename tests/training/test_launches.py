"""Launches as people do them: accelerate's launcher on the examples, the SLURM file on two "nodes" of this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from pivot_plugin.testing import build
from tests.helpers import picture
from tests.helpers.processes import ROOT, VARIABLES, pivot

pytestmark = [pytest.mark.training, pytest.mark.distributed, pytest.mark.timeout(600)]

CPU = {
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
SETTINGS = ("max_steps=3", "logging_steps=1", "learning_rate=1e-2", "warmup_steps=0", "gradient_checkpointing=false")


def variables(folder: Path) -> dict[str, str]:
    return {
        **VARIABLES,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PIVOT_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }


def program(folder: Path, name: str, text: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(text)
    (folder / "bin" / name).chmod(0o755)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a model, pairs, and accelerate's configuration."""
    model, processor = build("llava")
    for name in ("model", "llava-hf/llava-1.5-7b-hf"):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    (tmp_path / "pairs").mkdir()
    lines = []
    for number in range(16):
        picture(40, 50, number // 2).save(tmp_path / "pairs" / f"{number}.png")
        lines.append(
            {
                "image": f"{number}.png",
                "prompt": f"number {number}?",
                "chosen": f"it is {number % 10}",
                "rejected": "no",
            }
        )
    (tmp_path / "pairs" / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(CPU))
    return tmp_path


def losses(run: Path) -> list[float]:
    record = json.loads((run / "run.json").read_text())
    assert record["finished"]
    return [log["loss"] for log in record["history"] if "loss" in log]


def test_the_slurm_file_runs_on_two_nodes_and_gives_what_one_process_gives(here: Path) -> None:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    options = ["--lora", "4", "--eval-fraction", "0", *settings]
    alone = pivot(
        *("optimize", "model", "pairs", "-o", "alone", *options, "--set", "per_device_train_batch_size=4"),
        folder=here,
        ACCELERATE_USE_CPU="true",
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    # of SLURM's programs what the file uses: one task on each node, which knows its number
    program(
        here, "scontrol", '#!/bin/bash\n[ "$1 $2 $3" = "show hostnames a,b" ] && echo 127.0.0.1 && echo 127.0.0.1\n'
    )
    program(
        here,
        "srun",
        "#!/bin/bash\nstatus=0\nfor node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do\n"
        '  SLURM_NODEID=$node "$@" &\ndone\nfor task in $(jobs -p); do wait "$task" || status=1; done\nexit $status\n',
    )
    program(here, "pivot", f'#!/bin/bash\nexec {sys.executable} -m pivot_plugin.cli "$@"\n')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = free.getsockname()[1] - 29500
    of_job = {
        "SLURM_SUBMIT_DIR": str(here),
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(job % 1000),
        "PIVOT_ENGINE": "cpu.yaml",
    }
    file = ROOT / "examples" / "cluster" / "optimize.slurm"
    words = ["model", "pairs", "-o", "run", *options, "--set", "per_device_train_batch_size=2"]
    done = subprocess.run(
        ["bash", str(file), *words],
        cwd=here,
        env=variables(here) | of_job,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert len(losses(here / "run")) == 3
    assert losses(here / "run") == pytest.approx(losses(here / "alone"), rel=1e-4)
    one, two = (load_file(here / name / "encoder" / "model.safetensors") for name in ("alone", "run"))
    for name, tensor in one.items():
        assert tensor.allclose(two[name], rtol=1e-3, atol=1e-4), name
    # the job is queued again: there is nothing left to do, and that is no failure
    again = subprocess.run(
        ["bash", str(file), *words], cwd=here, env=variables(here) | of_job, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr[-5000:]
    # a node that fails is a job that fails
    failed = subprocess.run(
        ["bash", str(file), "model", "nowhere", "-o", "other"],
        cwd=here,
        env=variables(here) | of_job,
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode != 0 and "nowhere" in failed.stderr


def launched(here: Path, *words: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "cpu.yaml", *words]
    done = subprocess.run(command, cwd=here, env=variables(here), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]


def test_the_example_of_one_call_saves_a_whole_encoder_under_two_processes(here: Path) -> None:
    images = [{"bytes": (here / "pairs" / f"{n}.png").read_bytes(), "path": None} for n in range(16)] * 4
    rows = {
        "image": images,
        "question": [f"number {n}?" for n in range(64)],
        "chosen": [f"it is {n % 10}" for n in range(64)],
        "rejected": ["no"] * 64,
    }
    (here / "openbmb" / "RLAIF-V-Dataset").mkdir(parents=True)
    Dataset.from_dict(rows).to_parquet(here / "openbmb" / "RLAIF-V-Dataset" / "train.parquet")
    launched(here, str(ROOT / "examples" / "optimize_llava.py"))
    for folder in ("llava-pivot/encoder", "clip-vit-large-patch14-336-pivot"):
        saved = load_file(here / folder / "model.safetensors")
        assert saved and all(tensor.numel() and tensor.isfinite().all() for tensor in saved.values())
        assert (here / folder / "config.json").exists() and (here / folder / "pivot.json").exists()


def test_the_example_with_trl_saves_a_whole_encoder_under_two_processes(here: Path) -> None:
    launched(here, str(ROOT / "examples" / "with_trl.py"), "model", "pairs")
    saved = load_file(here / "with-trl" / "encoder" / "model.safetensors")
    assert saved and all(tensor.numel() and tensor.isfinite().all() for tensor in saved.values())
    assert (here / "with-trl" / "encoder" / "config.json").exists()
