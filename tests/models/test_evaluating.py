"""A model that was looked at is as it was, and so are the random numbers."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from pivot_plugin.models.evaluating import evaluating, undisturbed


def test_every_module_has_its_mode_again_also_after_an_exception() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model.train()
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, False]


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_random_numbers_go_on_as_if_nothing_had_been_drawn() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), undisturbed():
        draws()
        raise ZeroDivisionError
    assert draws() == expected


def test_a_seed_holds_meanwhile_alone() -> None:
    torch.manual_seed(7)
    seven = torch.rand(3)
    torch.manual_seed(1)
    with undisturbed(seed=7):
        assert torch.equal(torch.rand(3), seven)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)


def test_the_states_of_all_cuda_devices_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    forked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    real = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: (forked.append(devices), real(devices=[]))[1])
    with undisturbed():
        pass
    assert forked == [[0, 1]]
