"""Killed and started again: the same weights as an undisturbed run. Real processes, SIGKILL at random moments."""

import json
import random
import textwrap
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pivot_plugin.training.checkpoints import last_checkpoint
from tests.helpers.processes import ROOT, Program

RUN = textwrap.dedent("""
    import sys
    from pathlib import Path
    import pivot_plugin as pivot
    from pivot_plugin.testing import build
    from pivot_plugin.training import reference_pass
    sys.path.insert(0, sys.argv[2])
    from tests.helpers import picture, row

    reference_pass.SECONDS_BETWEEN_PARTS = 0
    folder = Path(sys.argv[1])
    model, processor = build("llava")
    pairs = [row(f"number {n}?", f"it is {n}", "no", picture(40, 50, n // 2)) for n in range(48)]
    print("begun", flush=True)
    pivot.optimize(
        model, pairs, processor=processor, output_dir=folder, lora=4, eval_fraction=0, resume=True, num_train_epochs=8,
        per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True, save_steps=5, save_total_limit=2,
        logging_steps=1, disable_tqdm=True, gradient_checkpointing=False,
    )
""")


def start(folder: Path) -> Program:
    """Start a run and wait until it begins its work."""
    variables = {"PIVOT_CACHE": str(folder.with_name(f"{folder.name}-cache"))}
    process = Program(RUN, [str(folder), str(ROOT)], folder.parent, variables, listened=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n", process.wait().stderr[-2000:]
    return process


def finish(process: Program) -> None:
    run = process.wait()
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.training
def test_a_run_killed_at_a_dozen_moments_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    finish(start(tmp_path / "straight"))

    rng = random.Random(0)
    folder = tmp_path / "killed"
    reached = set()
    for number in range(12):
        process = start(folder)
        assert process.stdout is not None
        if number >= 4:
            # between steps and while checkpoints are written, every fifth step: the run prints a line per step
            for _ in range(rng.randint(8, 20)):
                process.stdout.readline()
            time.sleep(rng.uniform(0, 0.05))
        else:
            # while it is set up and in the reference pass
            time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.wait()
        reached.add(last_checkpoint(folder))
    assert len(reached) > 2, f"the kills fell on {reached} only"
    finish(start(folder))
    expected = load_file(tmp_path / "straight" / "encoder" / "model.safetensors")
    found = load_file(folder / "encoder" / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.equal(found[name]), name


def test_a_checkpoint_that_was_being_written_does_not_count(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, state in ((2, json.dumps({"global_step": 2})), (4, '{"global_st'), (6, None), (10, "{}")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
