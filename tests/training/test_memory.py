"""What a run takes of memory is told beforehand, and is what it takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForImageTextToText

import pivot_plugin as pivot
from pivot_plugin import PivotConfig, PivotTrainer
from pivot_plugin.errors import SettingsError
from pivot_plugin.training.memory import ENGINES
from tests.helpers.processes import pivot as command
from tests.helpers.training import settings


def in_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def without_weights(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    with init_empty_weights():
        return AutoModelForImageTextToText.from_config(model.config, dtype=dtype)


@pytest.mark.training
@pytest.mark.parametrize("what", [{"lora": 4}, {"lora": None}, {"train": "encoder+projector", "lora": 4}])
def test_the_plan_of_one_process_is_what_a_run_of_it_holds(tiny: Any, rows: Any, what: Any, tmp_path: Path) -> None:
    model, processor = tiny
    told = pivot.plan(without_weights(model), processes=1, **what).plans[ENGINES.index("ddp")]
    train = what.get("train", "encoder")
    trainer = PivotTrainer(
        model,
        PivotConfig(**settings(tmp_path, max_steps=1, train=train)),
        rows,
        processing_class=processor,
        lora=what["lora"],
    )
    trainer.train()
    parameters = list(trainer.model.parameters())
    assert told.weights == pytest.approx(in_bytes(parameters), rel=1e-3)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert told.gradients == in_bytes(trained)
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if value.ndim]
    assert told.optimiser == in_bytes(states)
    assert told.reference == 0 and trainer.ref_model is None


def test_engines_divide_what_they_divide(make: Any) -> None:
    model, _ = make("qwen2_5_vl")
    made = pivot.plan(without_weights(model, torch.bfloat16), train="all", lora=None, processes=8, pairs=1)
    of = {plan.engine: plan for plan in made.plans}
    count = sum(parameter.numel() for parameter in model.parameters())
    assert {engine: plan.whole_model for engine, plan in of.items()} == dict.fromkeys(ENGINES, 2 * count)
    # arXiv 1910.02054, figure 1: 2 + 2 + K bytes of a parameter, K = 12 with the full-precision copy
    assert of["zero3"].weights + of["zero3"].gradients + of["zero3"].optimiser == pytest.approx(16 * count / 8, abs=8)
    assert of["zero2"].weights == 2 * count and of["zero2"].gradients == count * 2 // 8
    assert of["fsdp2"].weights == count * 4 // 8 and of["fsdp2"].optimiser == count * 8 // 8
    assert of["zero3"].gathered > 0 == of["zero2"].gathered
    assert of["zero3"].peak == max(of["zero3"].training, 2 * count + of["zero3"].images + of["zero3"].activations)


def test_more_pairs_and_kept_activations_take_more(make: Any) -> None:
    model = without_weights(make("llava")[0])
    plans = [
        pivot.plan(model, processes=2, pairs=pairs, gradient_checkpointing=again).plans[0].activations
        for pairs, again in ((1, True), (4, True), (4, False))
    ]
    assert plans[0] * 4 <= plans[1] < plans[2]


def test_numbers_that_cannot_be_are_refused(make: Any) -> None:
    with pytest.raises(SettingsError, match="processes is 0"):
        pivot.plan(without_weights(make("llava")[0]), processes=0)


def test_the_command_prints_the_plan_and_loads_nothing(make: Any, tmp_path: Path) -> None:
    model, processor = make("internvl")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    told = command("optimize", "model", "no-pairs", "--plan", "--num-processes", "4", "--lora", "none", folder=tmp_path)
    assert told.returncode == 0, told.stderr
    for word in ("4 process(es)", "ddp", "fsdp2", "zero2", "zero3", "optimiser", "before the first step: whole model"):
        assert word in told.stdout
    assert not (tmp_path / "pivot-run").exists()
