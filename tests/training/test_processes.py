"""Two processes on the CPU (gloo) against one with the same global batch."""

import json
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.processes import launched

pytestmark = pytest.mark.training

SCRIPT = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[3])
    import pivot_plugin as pivot
    from pivot_plugin.testing import build
    from tests.helpers import picture
    from tests.helpers import row

    model, processor = build("llava")
    pairs = [row(f"number {n}?", f"it is {n % 10}", "no no no", picture(40, 50, n // 2)) for n in range(16)]
    pivot.optimize(
        model, pairs, processor=processor, output_dir=sys.argv[1], lora=4, eval_prefs=pairs[:4], max_steps=6,
        per_device_train_batch_size=int(sys.argv[2]), learning_rate=1e-2, use_cpu=True, logging_steps=1,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, warmup_steps=0,
    )
""")


ONLINE = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[3])
    import pivot_plugin as pivot
    from pivot_plugin.testing import build
    from tests.helpers import picture

    def by_length(prompts, completions, **columns):
        return [float(len(completion[0]["content"])) for completion in completions]

    model, processor = build("llava")
    questions = [{"images": [picture(40, 50, n)], "question": f"number {n}?"} for n in range(8)]
    pivot.optimize(
        model, questions, processor=processor, output_dir=sys.argv[1], lora=4, objective="grpo", rewards=by_length,
        num_generations=4, per_device_train_batch_size=int(sys.argv[2]), max_steps=3, max_completion_length=5,
        learning_rate=1e-2, use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, eval_fraction=0,
        gradient_checkpointing=False, warmup_steps=0,
    )
""")


PICTURES = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[3])
    import pivot_plugin as pivot
    from pivot_plugin.testing import build
    from tests.helpers import picture, row

    model, processor = build("llava")
    pairs = [row(f"number {n}?", f"it is {n % 10}", "no no no", picture(40, 50, n)) for n in range(8)]
    pivot.optimize(
        model, pairs, processor=processor, output_dir=sys.argv[1], lora=4, eval_prefs=pairs[:4], max_steps=3,
        objective="mdpo", rejected_images="other_picture", per_device_train_batch_size=int(sys.argv[2]),
        learning_rate=1e-2, use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, warmup_steps=0,
    )
""")


@pytest.mark.timeout(300)
def test_two_processes_hold_pictures_against_each_other_as_one_does(tmp_path: Path) -> None:
    runs = {}
    for processes, size in ((1, 4), (2, 2)):
        done = launched(PICTURES, processes, size, tmp_path / str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        runs[processes] = json.loads((tmp_path / str(processes) / "run" / "run.json").read_text())
    for name in ("loss", "rewards/image_margins", "image_terms/conditional"):
        curves = [[log[name] for log in run["history"] if name in log] for run in runs.values()]
        assert len(curves[0]) == 3
        assert curves[1] == pytest.approx(curves[0], rel=1e-4, abs=1e-5), name
    assert runs[2]["metrics"]["after"] == pytest.approx(runs[1]["metrics"]["after"], rel=1e-3, abs=1e-4)


@pytest.mark.timeout(300)
def test_groups_of_rollouts_may_lie_across_processes(tmp_path: Path) -> None:
    done = launched(ONLINE, 2, 2, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "two" / "run" / "run.json").read_text())["history"]
    steps = [log for log in history if "loss" in log]
    assert len(steps) == 3
    # one group of four, two roll-outs in each process: advantages come from all four
    assert any(log["reward_std"] > 0 and log["grad_norm"] > 0 for log in steps)


@pytest.mark.timeout(300)
def test_processes_that_groups_do_not_fill_are_refused_by_number(tmp_path: Path) -> None:
    done = launched(ONLINE, 3, 2, tmp_path / "three")
    assert done.returncode != 0
    assert "SettingsError" in done.stderr
    assert "generation_batch_size (6) must be divisible by num_generations (4)" in done.stderr


@pytest.mark.timeout(300)
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    runs = {}
    for processes, size in ((1, 4), (2, 2)):
        done = launched(SCRIPT, processes, size, tmp_path / str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        runs[processes] = json.loads((tmp_path / str(processes) / "run" / "run.json").read_text())
    curves = [[log["loss"] for log in run["history"] if "loss" in log] for run in runs.values()]
    assert len(curves[0]) == 6
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert runs[2]["metrics"]["after"] == pytest.approx(runs[1]["metrics"]["after"], rel=1e-3)
    one, two = (load_file(tmp_path / number / "run" / "encoder" / "model.safetensors") for number in ("1", "2"))
    for name, tensor in one.items():
        assert tensor.allclose(two[name], rtol=1e-3, atol=1e-4), name
