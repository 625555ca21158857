"""`pivot.optimize` end to end, on every family."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import pivot_plugin as pivot
from pivot_plugin.errors import DataError, ModelError, SettingsError, TrainingError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.testing import FAMILIES
from pivot_plugin.training.pair_trainer import PivotTrainer
from pivot_plugin.training.snapshot import is_checkpointing
from tests.helpers import Tiny, picture, row


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_as_it_was(model: Any, before: dict[str, torch.Tensor], structure: dict[str, type]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: type(module) for name, module in model.named_modules()} == structure
    assert "forward" not in model.__dict__
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def structure_of(model: torch.nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_loss_falls_and_only_the_tower_changes(tiny: Any, rows: list[dict[str, Any]], fast: dict[str, Any]) -> None:
    model, processor = tiny
    before, structure = weights(model), structure_of(model)
    result = pivot.optimize(model, rows, processor=processor, eval_fraction=0, **{**fast, "max_steps": 12})
    losses = [log["loss"] for log in result.history if "loss" in log]
    # two batches are an epoch here
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.01
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    adapter = find_adapter(model)
    assert {adapter.part_of(name) for name in changed} == {"encoder"}
    assert changed == {f"{target}.weight" for target in adapter.lora_targets()}
    assert structure_of(model) == structure
    assert result.model is model
    moved = {block for block, change in result.weight_change.items() if change > 1e-4}
    assert moved == set(adapter.blocks()) - set(adapter.unread_paths())


def test_encoder_goes_to_disk_and_back_and_into_another_model(
    tiny: Any, rows: list[dict[str, Any]], fast: dict[str, Any], tmp_path: Path
) -> None:
    model, processor = tiny
    second = copy.deepcopy(model)
    result = pivot.optimize(model, rows, processor=processor, eval_fraction=0, **fast)
    folder = result.save(tmp_path / "encoder")
    encoder = pivot.load_encoder(folder)
    for name, tensor in result.encoder.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name]), name
    inputs = processor(
        images=[[picture(80, 60, 9)]], text=[processor.image_token], return_tensors="pt", add_special_tokens=False
    )
    images = {
        name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw", "image_sizes")
    }
    with torch.no_grad():
        inside = result.adapter.patch_features(images)
        outside = result.adapter.patch_features(images, encoder)
        assert len(inside) >= 1
        for one, other in zip(inside, outside, strict=True):
            assert one.grid == other.grid
            assert torch.equal(one.values, other.values)
        pivot.graft(second, encoder)
        assert torch.equal(second(**inputs).logits, model(**inputs).logits)


def test_metrics_compare_the_same_held_out_pairs_before_and_after(
    llava: Any, rows: list[dict[str, Any]], fast: dict[str, Any]
) -> None:
    model, processor = llava
    untouched = copy.deepcopy(model)
    result = pivot.optimize(model, rows, processor=processor, eval_prefs=rows[:3], **fast)
    assert result.metrics["before"].keys() == {"preference_accuracy", "margin", "logps_chosen", "logps_rejected"}
    # nothing trains in a second run, so its "before" are the numbers of the trained and of the untouched model
    for candidate, expected in ((untouched, "before"), (model, "after")):
        again = pivot.optimize(
            candidate,
            rows,
            processor=processor,
            eval_prefs=rows[:3],
            **{**fast, "output_dir": fast["output_dir"].with_name(expected), "max_steps": 1, "learning_rate": 0.0},
        )
        assert again.metrics["before"] == pytest.approx(result.metrics[expected], rel=1e-4)


# the encoder alone, by LoRA and in every family: test_loss_falls_and_only_the_tower_changes
@pytest.mark.parametrize(
    ("family", "train", "lora"),
    [(family, train, 4) for family in FAMILIES for train in ("encoder+projector", "language_model", "all")]
    + [("llava", train, None) for train in ("encoder", "encoder+projector", "language_model", "all")],
)
def test_only_what_should_train_changes(
    tiny: Any, rows: list[dict[str, Any]], fast: dict[str, Any], train: Any, lora: int | None
) -> None:
    model, processor = tiny
    before = weights(model)
    pivot.optimize(
        model, rows, processor=processor, train=train, lora=lora, eval_fraction=0, **{**fast, "max_steps": 2}
    )
    adapter = find_adapter(model)
    changed = {
        adapter.part_of(name)
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    everything = {"encoder", "projector", "language_model"}
    assert changed == (everything if train == "all" else set(train.split("+")))


@pytest.mark.parametrize("targets", [["q_proj"], r".*vision_tower.*layers\.0.*q_proj"], ids=["ends", "pattern"])
def test_a_lora_config_with_targets_of_the_user_s_own_is_accounted_for(
    llava: Any, rows: list[dict[str, Any]], fast: dict[str, Any], targets: Any
) -> None:
    model, processor = llava
    config = LoraConfig(r=4, target_modules=targets)
    result = pivot.optimize(model, rows, processor=processor, lora=config, eval_fraction=0, **fast)
    assert result.weight_change["model.vision_tower.encoder.layers.0"] > 1e-4
    assert (result.weight_change["model.vision_tower.encoder.layers.1"] > 1e-4) == isinstance(targets, list)


@pytest.mark.parametrize(("family", "checkpointing"), [*((family, True) for family in FAMILIES), ("llava", False)])
def test_checkpointing_and_bfloat16_train_the_tower(
    tiny: Any, rows: list[dict[str, Any]], fast: dict[str, Any], checkpointing: bool
) -> None:
    model, processor = tiny
    model.to(torch.bfloat16)
    before = weights(model)
    result = pivot.optimize(
        model, rows, processor=processor, eval_fraction=0, gradient_checkpointing=checkpointing, bf16=True, **fast
    )
    assert model.dtype == torch.bfloat16
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert max(result.weight_change.values()) > 0
    assert not is_checkpointing(model)


def test_parts_take_their_own_learning_rates(llava: Any, rows: list[dict[str, Any]], fast: dict[str, Any]) -> None:
    model, processor = llava
    before = weights(model)
    pivot.optimize(
        model,
        rows,
        processor=processor,
        train="encoder+projector",
        learning_rates={"encoder": 0.0, "projector": 1e-2},
        eval_fraction=0,
        **fast,
    )
    adapter = find_adapter(model)
    changed = {adapter.part_of(n) for n, t in model.named_parameters() if not torch.equal(t, before[n])}
    assert changed == {"projector"}


def test_a_failure_leaves_the_model_as_it_was(
    tiny: Any, rows: list[dict[str, Any]], fast: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny
    before, structure = weights(model), structure_of(model)
    from pivot_plugin.training.pair_trainer import PivotTrainer

    original = PivotTrainer.compute_loss

    def fail_later(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise RuntimeError("the cable was pulled")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PivotTrainer, "compute_loss", fail_later)
    for lora in (4, None):
        folder = fast["output_dir"].with_name(str(lora))
        with pytest.raises(TrainingError, match="the cable was pulled"):
            pivot.optimize(
                model, rows, processor=processor, lora=lora, eval_fraction=0, **{**fast, "output_dir": folder}
            )
        assert_as_it_was(model, before, structure)


def test_an_interrupt_leaves_the_model_as_it_was(
    llava: Any, rows: list[dict[str, Any]], fast: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = llava
    before, structure = weights(model), structure_of(model)
    from pivot_plugin.training.pair_trainer import PivotTrainer

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(PivotTrainer, "compute_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pivot.optimize(model, rows, processor=processor, eval_fraction=0, **fast)
    assert_as_it_was(model, before, structure)


def test_a_part_without_gradient_is_named(
    llava: Any, rows: list[dict[str, Any]], fast: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = llava
    tower = type(model.model.vision_tower)
    original = tower.forward

    def detached(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return original(self, *args, **kwargs)

    monkeypatch.setattr(tower, "forward", detached)
    with pytest.raises(TrainingError, match="encoder got no gradient"):
        pivot.optimize(model, rows, processor=processor, eval_fraction=0, **fast)


def test_a_batch_without_images_does_not_stop_the_run(llava: Any, fast: dict[str, Any]) -> None:
    model, processor = llava
    texts = [row(f"say {word}", word, "no") for word in ("one", "two", "three")]
    mixed = [*texts, row("what?", "this", "that", picture(50, 50, 1))]
    result = pivot.optimize(
        model, mixed, processor=processor, eval_fraction=0, **{**fast, "per_device_train_batch_size": 1}
    )
    assert len([log for log in result.history if "loss" in log]) == 4


def test_a_loss_that_is_not_finite_names_its_pairs(
    llava: Any, rows: list[dict[str, Any]], fast: dict[str, Any]
) -> None:
    model, processor = llava
    rows[0]["id"] = "the-bad-one"
    with pytest.raises(TrainingError, match=r"(?s)became inf.*the-bad-one"):
        beyond = {"loss_type": "ipo", "beta": 1e-50, "max_steps": 1}
        pivot.optimize(model, rows[:1], processor=processor, eval_fraction=0, **fast | beyond)


@pytest.mark.parametrize("form", ["dataset", "stream", "folder", "jsonl"])
def test_every_form_of_pairs_trains(form: str, llava: Any, fast: dict[str, Any], tmp_path: Path) -> None:
    model, processor = llava
    pairs = [row(f"number {n}?", f"it is {n}", "no", picture(40 + n, 50, n)) for n in range(6)]
    source: Any
    if form == "dataset":
        source = datasets.Dataset.from_list(pairs)
    elif form == "stream":
        source = datasets.Dataset.from_list(pairs).to_iterable_dataset()
    else:
        (tmp_path / "data" / "images").mkdir(parents=True)
        lines = []
        for number, pair in enumerate(pairs):
            pair["images"][0].save(tmp_path / "data" / "images" / f"{number}.png")
            lines.append(json.dumps({**pair, "images": [f"images/{number}.png"]}))
        (tmp_path / "data" / "pairs.jsonl").write_text("\n".join(lines))
        source = tmp_path / "data" if form == "folder" else tmp_path / "data" / "pairs.jsonl"
    result = pivot.optimize(model, source, processor=processor, eval_fraction=0, **fast)
    assert len([log for log in result.history if "loss" in log]) == 4


def test_a_model_and_its_processor_are_found_by_path(
    llava: Any, rows: list[dict[str, Any]], fast: dict[str, Any], tmp_path: Path
) -> None:
    model, processor = llava
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    result = pivot.optimize(tmp_path / "model", rows, eval_fraction=0, **fast)
    assert type(result.model) is type(model)
    assert (fast["output_dir"] / "encoder" / "model.safetensors").exists()


# Bad input: the message names the thing, the finding, the expectation and the next step


def refuse(error: type[Exception], match: str, model: Any, prefs: Any, **settings: Any) -> None:
    before = None if not isinstance(model, torch.nn.Module) else weights(model)
    with pytest.raises(error, match=match) as caught:
        pivot.optimize(model, prefs, **settings)
    assert caught.value.remedy, "an error says what to do next"  # type: ignore[attr-defined]
    if before is not None:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_empty_prefs(llava: Any, fast: dict[str, Any]) -> None:
    refuse(DataError, "has no rows", llava[0], [], processor=llava[1], **fast)


def test_a_stream_without_max_steps(llava: Any, fast: dict[str, Any]) -> None:
    stream = datasets.Dataset.from_list([row("a", "b", "c")]).to_iterable_dataset()
    refuse(SettingsError, "max_steps", llava[0], stream, processor=llava[1], **{**fast, "max_steps": -1})


def test_a_model_without_a_vision_tower(fast: dict[str, Any], llava: Any) -> None:
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9, intermediate_size=8)
    refuse(ModelError, "LlamaForCausalLM has no vision tower", LlamaForCausalLM(config), [], processor=llava[1], **fast)


def test_an_unknown_model_class(fast: dict[str, Any], llava: Any) -> None:
    refuse(ModelError, "Linear, not a transformers", torch.nn.Linear(2, 2), [], processor=llava[1], **fast)


def test_a_tower_without_linear_layers(llava: Any, rows: Any, fast: dict[str, Any]) -> None:
    model, processor = llava
    model.model.vision_tower.encoder.layers = torch.nn.ModuleList()
    refuse(ModelError, "no linear layer", model, rows, processor=processor, **fast)


def test_a_processor_of_another_family(make: Any, rows: Any, fast: dict[str, Any]) -> None:
    refuse(ModelError, "does not belong to Llava", make("llava")[0], rows, processor=make("qwen2_vl")[1], **fast)


def test_a_missing_processor(llava: Any, rows: Any, fast: dict[str, Any]) -> None:
    refuse(ModelError, "no name_or_path", llava[0], rows, **fast)


def test_a_model_path_that_is_none(rows: Any, fast: dict[str, Any], tmp_path: Path) -> None:
    refuse(ModelError, "No MLLM could be loaded", tmp_path / "nothing", rows, **fast)


def test_an_output_dir_that_cannot_be_written(llava: Any, fast: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    prefs = object()  # never looked at: the folder comes first
    refuse(
        SettingsError,
        "cannot be written",
        llava[0],
        prefs,
        processor=llava[1],
        **{**fast, "output_dir": tmp_path / "file/x"},
    )


def test_an_output_dir_with_another_run(llava: Any, rows: Any, fast: dict[str, Any]) -> None:
    model, processor = llava
    pivot.optimize(model, rows, processor=processor, eval_fraction=0, **{**fast, "max_steps": 1})
    refuse(SettingsError, "holds an earlier run", model, rows, processor=processor, eval_fraction=0, **fast)
    refuse(
        SettingsError,
        "had max_steps=1, now it is 4",
        model,
        rows,
        processor=processor,
        eval_fraction=0,
        resume=True,
        **fast,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1.0}, "Did you mean learning_rate"),
        ({"train": "tower"}, "train is 'tower'"),
        ({"lora": 0}, "lora is 0"),
        ({"objective": "sigmod"}, "Did you mean sigmoid"),
        ({"objective": "mpo", "loss_type": "ipo"}, "Both objective='mpo' and loss_type='ipo'"),
        ({"learning_rates": {"head": 1.0}}, r"learning_rates names \['head'\]"),
        ({"eval_fraction": 1.5}, "eval_fraction is 1.5"),
        ({"lr_scheduler_type": "cosin"}, "cosin"),
    ],
)
def test_an_option_that_cannot_be(llava: Any, rows: Any, fast: dict[str, Any], settings: Any, message: str) -> None:
    refuse(SettingsError, message, llava[0], rows, processor=llava[1], **{**fast, **settings})


def test_importing_the_module_does_not_hide_the_verb() -> None:
    import pivot_plugin.runs.optimize

    assert callable(pivot.optimize)
    assert pivot_plugin.runs.optimize.optimize is pivot.optimize


def test_an_image_given_as_a_path_is_opened(llava: Any, fast: dict[str, Any], tmp_path: Path) -> None:
    Image.new("L", (30, 30)).save(tmp_path / "grey.png")
    pairs = [row("?", "a", "b")] * 3
    pairs = [{**pair, "images": [str(tmp_path / "grey.png")]} for pair in pairs]
    result = pivot.optimize(llava[0], pairs, processor=llava[1], eval_fraction=0, **fast | {"max_steps": 1})
    config = result.adapter.tower.config
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    # for the reference and for the step once each; and to check the forest, both answers of a pair through the model's
    # own head and TRL's, and once in a tree
    assert result.cost.tower_tokens == (1 + 1 + 2 * 2 + 1) * tokens


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_whole_weights_are_resumed_and_the_best_are_taken_up(
    make: Callable[[str], Tiny], fast: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    options = {k: v for k, v in fast.items() if k != "output_dir"} | {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-3,
    }
    options |= {"train": "all", "lora": None, "saliency": 0}
    rows = [row(f"number {n}?", f"it is {n}", "no", picture(40, 50, n)) for n in range(16)]
    whole, processor = make(family)
    pivot.optimize(whole, rows, processor=processor, output_dir=tmp_path / "whole", eval_fraction=0, **options)
    step = PivotTrainer.training_step

    def cut(self: PivotTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    model, _ = make(family)
    monkeypatch.setattr(PivotTrainer, "training_step", cut)
    given = {"processor": processor, "output_dir": tmp_path / "cut", "eval_fraction": 0, **options}
    with pytest.raises(KeyboardInterrupt):
        pivot.optimize(model, rows, **given)
    monkeypatch.undo()
    pivot.optimize(model, rows, resume=True, **given)
    for (name, one), other in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name

    # what is held out wants the opposite, so that the best checkpoint is the start
    spoilt, _ = make(family)
    options |= {"learning_rate": 1e-2, "save_steps": 1, "eval_steps": 1, "lr_scheduler_type": "constant"}
    turned = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in rows[:4]]
    best = pivot.optimize(spoilt, rows, processor=processor, output_dir=tmp_path / "best", eval_prefs=turned, **options)
    losses = [entry["eval_loss"] for entry in best.history if "eval_loss" in entry]
    assert losses[-1] > min(losses) == losses[0]
    kept = load_file(tmp_path / "best" / "checkpoint-0" / "model.safetensors")
    own = dict(spoilt.named_parameters())
    assert kept.keys() <= own.keys() and len(kept) > 10
    for name, weight in kept.items():
        assert torch.equal(own[name], weight), name
