"""In and out of models that an engine divides: what is asked for, and how much of one is whole at once."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pivot_plugin.errors import SettingsError
from pivot_plugin.training.sharding import check_divisible, gather, is_divided, refuse_use


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def divided(model: Any) -> Any:
    """A model as FSDP2 divides it."""
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in model.get_decoder().layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def accelerator(main: bool) -> Any:
    state = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=object())
    return SimpleNamespace(state=state, is_main_process=main)


@pytest.mark.parametrize("main", [True, False])
def test_one_parameter_is_whole_at_a_time(llava: Any, alone: None, monkeypatch: pytest.MonkeyPatch, main: bool) -> None:
    model = llava[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = divided(model)
    assert is_divided(model)
    sizes: list[int] = []
    whole: list[weakref.ref[torch.Tensor]] = []
    gathered = DTensor.full_tensor

    def counted(self: DTensor, **options: Any) -> torch.Tensor:
        assert all(reference() is None for reference in whole), "another parameter is whole still"
        # as if by other processes: nothing of the shard is in what is gathered
        tensor = gathered(self, **options).clone()
        sizes.append(tensor.nbytes)
        whole.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(DTensor, "full_tensor", counted)
    gather(model, accelerator(main))
    everything = sum(tensor.nbytes for tensor in before.values())
    assert len(sizes) > 20 and max(sizes) < everything / 4
    assert is_divided(model) != main
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]) if main else tensor.is_meta, name
    held = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters() if not parameter.is_meta)
    assert held == (everything if main else 0)


def test_a_model_whose_weights_another_process_has_says_so(llava: Any) -> None:
    model = llava[0]
    refuse_use(model)
    assert model.state_dict()
    model.to("meta")
    refuse_use(model)
    for use in (lambda: model(input_ids=torch.ones(1, 2, dtype=torch.long)), model.state_dict):
        with pytest.raises(SettingsError, match="Use the result in the main process"):
            use()


def test_layers_that_a_model_does_not_have_are_refused_by_name(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_divisible(llava[0])
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "CLIPEncoderLayer, LlamaDecoderLayers")
    with pytest.raises(SettingsError, match=r"'LlamaDecoderLayers'.*Did you mean LlamaDecoderLayer"):
        check_divisible(llava[0])


def test_quantised_weights_are_not_divided(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llava[0].is_quantized = True
    check_divisible(llava[0])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    check_divisible(llava[0])
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(SettingsError, match="quantised weights, which ZeRO-3 does not divide"):
        check_divisible(llava[0])


def test_a_model_on_several_devices_is_refused_where_each_process_needs_one(llava: Any) -> None:
    llava[0].hf_device_map = {"model.vision_tower": 0, "model.language_model": "cpu"}
    with pytest.raises(SettingsError, match="spread LlavaForConditionalGeneration over 0, cpu"):
        check_divisible(llava[0])
