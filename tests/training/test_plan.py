"""What trains: a quantised part is refused before anything is paid for."""

from typing import Any

import pytest
import torch
from torch import nn

from pivot_plugin.errors import ModelError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.testing import build
from pivot_plugin.training.plan import plan


def with_rounded(part: str) -> Any:
    """An adapter of a model, one of whose parts has a weight that is no number by itself."""
    model, _ = build("llava")
    adapter = find_adapter(model)
    name, weight = next((n, w) for n, w in model.named_parameters() if adapter.part_of(n) == part and w.ndim == 2)
    path, _, last = name.rpartition(".")
    setattr(
        model.get_submodule(path), last, nn.Parameter(torch.zeros(weight.shape, dtype=torch.uint8), requires_grad=False)
    )
    return adapter


@pytest.mark.parametrize("lora", [4, None])
@pytest.mark.parametrize(
    ("part", "train"), [("encoder", "encoder"), ("projector", "encoder+projector"), ("language_model", "all")]
)
def test_a_quantised_part_that_should_train_is_refused_by_name(part: str, train: Any, lora: int | None) -> None:
    with pytest.raises(ModelError, match=rf"The {part.replace('_', ' ')} of this Llava.* is quantised .*uint8") as told:
        plan(with_rounded(part), train, lora)
    assert "llm_int8_skip_modules" in told.value.remedy


def test_parts_that_do_not_train_may_be_quantised() -> None:
    assert plan(with_rounded("language_model"), "encoder", 4).lora is not None
