"""What trains: a quantised part is refused before anything is paid for."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from pivot_plugin.errors import ModelError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.testing import build
from pivot_plugin.training.plan import count_parameters, places_of_parts, plan


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


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_the_modules_of_parts_are_told_with_a_projector_inside_the_tower_left_out(family: str) -> None:
    model, _ = build(family)
    adapter = find_adapter(model)
    places = places_of_parts(adapter)
    within = {
        "llava": ("model.vision_tower", "model.multi_modal_projector"),
        "qwen2_5_vl": ("model.visual without model.visual.merger", "model.visual.merger"),
        "qwen3_vl": (
            "model.visual without model.visual.merger and model.visual.deepstack_merger_list",
            "model.visual.merger, model.visual.deepstack_merger_list",
        ),
    }
    assert (places["encoder"], places["projector"]) == within[family]
    assert places["language_model"] == "model.language_model, lm_head"
    left_out = places["encoder"].partition(" without ")[2].split(" and ")
    counted = sum(
        weight.numel()
        for name, weight in model.get_submodule(adapter.tower_path).named_parameters(adapter.tower_path)
        if not any(path and name.startswith(f"{path}.") for path in left_out)
    )
    assert counted == count_parameters(adapter, model)["encoder"][1]


def test_the_modules_of_parts_are_those_of_the_model_with_its_lora() -> None:
    model, _ = build("qwen2_5_vl")
    adapter = find_adapter(model)
    before = places_of_parts(adapter)
    wrapped = get_peft_model(model, plan(adapter, "encoder+projector", 4).lora)
    assert wrapped is not None and places_of_parts(adapter) == before
