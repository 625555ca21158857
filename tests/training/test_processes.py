"""Two processes on the CPU (gloo) against one with the same global batch."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[3])
    import pivot_plugin as pivot
    from pivot_plugin.testing import build
    from tests.conftest import picture, row

    model, processor = build("llava")
    pairs = [row(f"number {n}?", f"it is {n % 10}", "no no no", picture(40, 50, n // 2)) for n in range(16)]
    pivot.optimize(
        model, pairs, processor=processor, output_dir=sys.argv[1], lora=4, eval_prefs=pairs[:4], max_steps=6,
        per_device_train_batch_size=int(sys.argv[2]), learning_rate=1e-2, use_cpu=True, logging_steps=1,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, warmup_steps=0,
    )
""")


@pytest.mark.timeout(300)
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    runs = {}
    for processes, size in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        done = subprocess.run(
            [sys.executable, *launch, str(processes), str(script), str(folder), str(size), str(ROOT)],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PIVOT_CACHE": str(tmp_path / f"cache-{processes}"),
                "PYTHONPATH": str(ROOT),
                "ACCELERATE_USE_CPU": "true",
                "OMP_NUM_THREADS": "1",
            },
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        runs[processes] = json.loads((folder / "run.json").read_text())
    curves = [[log["loss"] for log in run["history"] if "loss" in log] for run in runs.values()]
    assert len(curves[0]) == 6
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert runs[2]["metrics"]["after"] == pytest.approx(runs[1]["metrics"]["after"], rel=1e-3)
    one, two = (load_file(tmp_path / number / "encoder" / "model.safetensors") for number in ("1", "2"))
    for name, tensor in one.items():
        assert tensor.allclose(two[name], rtol=1e-3, atol=1e-4), name
