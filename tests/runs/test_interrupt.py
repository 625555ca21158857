"""Ctrl-C: the step is finished, a checkpoint is written, and the run goes on from there as if nothing had been."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin.testing import build
from pivot_plugin.training.pair_trainer import PivotTrainer
from tests.helpers import picture, row

pytestmark = pytest.mark.training

PAIRS = [row(f"{n}?", f"yes {n}", f"no! {n}", picture(20, 20, n)) for n in range(16)]


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "eval_fraction": 0.0,
        "save_strategy": "no",
        "saliency": 0,
        "display": "none",
        **more,
    }


def test_a_first_ctrl_c_ends_behind_a_checkpoint_and_less_memory_goes_on_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, processor = build("llava")
    pivot.optimize(whole, PAIRS, processor=processor, **options(tmp_path / "whole"))
    step = PivotTrainer.training_step

    def pressed(self: PivotTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    handler = signal.getsignal(signal.SIGINT)
    cut, _ = build("llava")
    before = {name: weight.clone() for name, weight in cut.state_dict().items()}
    monkeypatch.setattr(PivotTrainer, "training_step", pressed)
    with pytest.raises(KeyboardInterrupt):
        pivot.optimize(cut, PAIRS, processor=processor, **options(tmp_path / "cut"))
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-3"]
    assert all(torch.equal(before[name], weight) for name, weight in cut.state_dict().items())
    # half the batch, twice as often: what an out-of-memory error advises
    lighter = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    pivot.optimize(cut, PAIRS, processor=processor, resume=True, **options(tmp_path / "cut", **lighter))
    for (name, one), other in zip(whole.named_parameters(), cut.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(self: PivotTrainer, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    model, processor = build("llava")
    monkeypatch.setattr(PivotTrainer, "training_step", pressed)
    with pytest.raises(KeyboardInterrupt):
        pivot.optimize(model, PAIRS, processor=processor, **options(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
