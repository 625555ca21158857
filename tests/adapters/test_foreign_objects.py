"""Loaded objects of other repositories: trained in place whatever trains, and as they were after a failure."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pivot_plugin as pivot
from pivot_plugin.adapters.foreign import bring_back, write_back
from pivot_plugin.errors import ModelError, TrainingError
from pivot_plugin.models.loading import load_model
from pivot_plugin.training.pair_trainer import PivotTrainer
from tests.helpers import repositories as repo
from tests.helpers.foreign import object_of, tensors

KINDS = ("LLaVA, CLIP", "LLaVA, own SigLIP, tiles", "InternVL, Qwen2", "InternVL, InternLM2")


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_built_around_the_objects_own_parameters(kind: str) -> None:
    theirs, tokens, apart = object_of(kind)
    next(theirs.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in theirs.parameters()]
    model, processor = load_model(theirs, tokens)
    assert apart(theirs, model, processor, (120, 50)) < 1e-6
    assert [parameter.requires_grad for parameter in theirs.parameters()] == flags
    memory = {parameter.untyped_storage().data_ptr() for parameter in theirs.parameters()}
    copies = [name for name, own in model.named_parameters() if own.untyped_storage().data_ptr() not in memory]
    expected = {"q_proj", "k_proj", "v_proj"} if kind == "InternVL, InternLM2" else set()
    assert {name.split(".")[-2] for name in copies if "language_model" in name} == expected
    assert not [name for name in copies if "language_model" not in name]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    bring_back(model)
    assert apart(theirs, model, processor, (120, 50)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_the_tower_trains_the_object_in_place(kind: str, rows: Any, fast: Any) -> None:
    theirs, tokens, apart = object_of(kind)
    before = snapshot(theirs)
    result = pivot.optimize(theirs, rows, processor=tokens, **fast)
    touched = changed(theirs, before)
    assert any("layers.0" in name for name in touched)
    assert all("vision" in name for name in touched)
    assert any("qkv" in name for name in touched) == kind.startswith("InternVL")
    assert apart(theirs, result.model, result.processor, (120, 50)) < 1e-6


@pytest.mark.parametrize("kind", ["LLaVA, own SigLIP, tiles", "InternVL, InternLM2"])
@pytest.mark.parametrize(
    "settings", [{"train": "encoder+projector"}, {"train": "all", "lora": None}], ids=["projector", "all weights"]
)
def test_whatever_trains_ends_in_the_object(kind: str, settings: dict[str, Any], rows: Any, fast: Any) -> None:
    theirs, tokens, apart = object_of(kind)
    before = snapshot(theirs)
    result = pivot.optimize(theirs, rows, processor=tokens, **settings, **fast)
    touched = changed(theirs, before)
    assert any("mm_projector" in name or "mlp1" in name for name in touched)
    assert any("layers.0" in name and "vision" not in name for name in touched) == (settings["train"] == "all")
    assert apart(theirs, result.model, result.processor, (120, 50)) < 1e-6
    assert bring_back(result.model) in ([], [name for name in before if "wqkv" in name])


def test_parameters_that_were_moved_away_are_brought_back_and_shared_again() -> None:
    theirs, tokens, apart = object_of("InternVL, Qwen2")
    model, processor = load_model(theirs, tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.q_proj" in name:
                # as a move to another device does
                parameter.data = parameter.data * 1.5
    assert apart(theirs, model, processor, (56, 56)) > 1e-4
    parted = bring_back(model)
    assert parted == [f"vision_model.encoder.layers.{n}.attn.qkv.{k}" for n in range(3) for k in ("weight", "bias")]
    assert apart(theirs, model, processor, (56, 56)) < 1e-6
    assert bring_back(model) == []


@pytest.mark.parametrize("settings", [{}, {"train": "all", "lora": None}], ids=["lora", "all weights"])
def test_after_a_failure_the_object_is_as_it_was(
    settings: dict[str, Any], rows: Any, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, tokens, _ = object_of("InternVL, Qwen2")
    before = snapshot(theirs)
    step = PivotTrainer.training_step
    taken = []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        if len(taken) == 3:
            raise RuntimeError("no luck")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PivotTrainer, "training_step", failing)
    with pytest.raises(TrainingError, match="no luck"):
        pivot.optimize(theirs, rows, processor=tokens, **settings, **fast)
    assert not changed(theirs, before)


@pytest.mark.parametrize("counted", [2, 3])
def test_the_deleted_block_may_be_counted_or_not(counted: int) -> None:
    theirs, tokens, apart = object_of("LLaVA, own SigLIP, tiles")
    theirs.model.vision_tower.vision_tower.config.num_hidden_layers = counted
    model, processor = load_model(theirs, tokens)
    assert model.config.vision_config.num_hidden_layers == 2
    assert apart(theirs, model, processor, (120, 50)) < 1e-6


def test_a_model_around_an_object_is_written_back_whole(tmp_path: Path) -> None:
    theirs, tokens, _ = object_of("InternVL, Qwen2")
    template = repo.write(tmp_path / "template", dict(theirs.config), repo.stored(theirs), tokens)
    model, _ = load_model(theirs, tokens)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.01)
    back = tensors(write_back(model, template, tmp_path / "back"))
    expected = repo.stored(theirs)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in back)


def test_a_copy_of_the_model_shares_nothing() -> None:
    theirs, tokens, _ = object_of("InternVL, Qwen2")
    before = snapshot(theirs)
    model, _ = load_model(theirs, tokens)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert bring_back(twin) == []
    assert not changed(theirs, before)


def test_the_model_is_saved_whole_although_it_has_views(tmp_path: Path) -> None:
    theirs, tokens, apart = object_of("InternVL, Qwen2")
    model, processor = load_model(theirs, tokens)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = load_model(tmp_path, None)
    assert apart(theirs, again, same, (120, 50)) < 1e-6


@pytest.mark.parametrize("kind", ["LLaVA, CLIP", "InternVL, Qwen2"])
def test_an_object_that_knows_its_folder_needs_no_tokenizer(kind: str, tmp_path: Path) -> None:
    theirs, tokens, apart = object_of(kind)
    tokens.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    if kind.startswith("LLaVA"):
        theirs.config._name_or_path = str(tmp_path)
    else:
        theirs.config["_name_or_path"] = str(tmp_path)
    model, processor = load_model(theirs, None)
    assert model.name_or_path == str(tmp_path)
    assert apart(theirs, model, processor, (120, 50)) < 1e-6


def test_an_object_without_a_tokenizer_is_refused() -> None:
    theirs, _, _ = object_of("LLaVA, CLIP")
    with pytest.raises(ModelError, match=r"No tokenizer was given with this LlavaLlamaForCausalLM.*Pass processor="):
        load_model(theirs, None)


def test_something_that_is_no_tokenizer_is_refused() -> None:
    theirs, _, _ = object_of("LLaVA, CLIP")
    with pytest.raises(ModelError, match="is a str"):
        load_model(theirs, "tokenizer")  # type: ignore[arg-type]
