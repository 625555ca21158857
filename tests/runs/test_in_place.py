"""A model in training: trained after success, exactly what it was after a failure, and random numbers as they were."""

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pivot_plugin.errors import DataError, TrainingError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.runs.in_place import in_place
from pivot_plugin.training.plan import TrainingPlan, plan


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def train_by_hand(model: Any, training_plan: TrainingPlan) -> None:
    """What training does to a model: weights, gradient flags, modes, dropout, the forward pass."""
    model.train()
    model.forward = lambda *args, **kwargs: None
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name in training_plan.parameters:
            parameter.data.add_(1.0)
    model.config.get_text_config().use_cache = False
    model.model_tags = ["trl"]


def state_of(model: Any) -> dict[str, Any]:
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "modules": {name: type(module) for name, module in model.named_modules()},
        "cache": model.config.get_text_config().use_cache,
        "tags": model.model_tags,
        "forward": "forward" in vars(model),
        "dropout": [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)],
        "training": model.training,
    }


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert {name: one[name] for name in one if name != "weights"} == {
        name: other[name] for name in other if name != "weights"
    }
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (RuntimeError("the cable was pulled"), TrainingError, "RuntimeError: the cable was pulled"),
        (DataError("row 3 is bad.", "Mend it."), DataError, "row 3 is bad"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_failure_leaves_the_model_exactly_as_it_was(
    llava: Any, tmp_path: Path, error: BaseException, raised: type[BaseException], message: str | None
) -> None:
    adapter = find_adapter(llava[0])
    training_plan = plan(adapter, "all", None)
    before = state_of(adapter.model)
    with pytest.raises(raised, match=message), in_place(adapter, training_plan, tmp_path, seed=1):
        train_by_hand(adapter.model, training_plan)
        adapter.model.lm_head = torch.nn.Sequential(adapter.model.lm_head)
        raise error
    assert_equal(state_of(adapter.model), before)


def test_success_keeps_the_weights_and_switches_the_rest_back(llava: Any, tmp_path: Path) -> None:
    adapter = find_adapter(llava[0])
    training_plan = plan(adapter, "all", None)
    before = state_of(adapter.model)
    with in_place(adapter, training_plan, tmp_path, seed=1) as training:
        train_by_hand(adapter.model, training_plan)
    after = state_of(adapter.model)
    assert set(training.before) == set(training_plan.parameters)
    for name, weight in training.before.items():
        assert torch.equal(weight, before["weights"][name]), name
        assert torch.equal(after["weights"][name], weight + 1.0), name
    assert_equal(after | {"weights": {}}, before | {"weights": {}})
    assert training.cost.seconds > 0


def test_an_interrupt_names_the_checkpoint_that_is_kept(
    llava: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = find_adapter(llava[0])
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text('{"global_step": 7}')
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(KeyboardInterrupt),
        in_place(adapter, plan(adapter, "encoder", 4), tmp_path, seed=1),
    ):
        raise KeyboardInterrupt
    assert "checkpoint-7 is kept; go on with resume=True" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_training_draws_by_its_seed_and_the_caller_goes_on_with_his_own_numbers(
    llava: Any, tmp_path: Path, fails: bool
) -> None:
    adapter = find_adapter(llava[0])
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    seeded = draws()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = draws()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    try:
        with in_place(adapter, plan(adapter, "encoder", 4), tmp_path, seed=3):
            in_training = draws()
            if fails:
                raise RuntimeError("later")
    except TrainingError:
        assert fails
    assert in_training == seeded
    assert draws() == expected


def test_the_random_states_of_all_cuda_devices_are_put_back(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices whose states are numbers: what stands there after training is what stood there before."""
    states = {0: torch.tensor([10]), 1: torch.tensor([11])}

    def put(state: torch.Tensor, device: Any) -> None:
        states[int(device)] = state

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: [put(torch.tensor([seed]), n) for n in states])
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[int(device)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", put)
    adapter = find_adapter(llava[0])
    with in_place(adapter, plan(adapter, "encoder", 4), tmp_path, seed=1):
        assert [int(state) for state in states.values()] == [1, 1]
    assert [int(state) for state in states.values()] == [10, 11]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_caller_goes_on_with_his_own_numbers(llava: Any, tmp_path: Path) -> None:
    adapter = find_adapter(llava[0])
    torch.cuda.manual_seed_all(5)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed_all(5)
    with in_place(adapter, plan(adapter, "encoder", 4), tmp_path, seed=3):
        torch.rand(7, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_out_of_memory_says_what_needs_less(llava: Any, tmp_path: Path) -> None:
    adapter = find_adapter(llava[0])
    with (
        pytest.raises(TrainingError, match=r"halve per_device_train_batch_size and double gradient_accumulation_steps"),
        in_place(adapter, plan(adapter, "encoder", None), tmp_path, seed=1),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
