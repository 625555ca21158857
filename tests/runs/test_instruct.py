"""Alignment and instruction: what trains, at which rate, by which loss; and that nothing paid for is lost."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import pivot_plugin as pivot
from pivot_plugin.errors import DataError, ModelError, SettingsError, TrainingError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.preferences import load_conversations
from pivot_plugin.training.conversation_batch import ConversationCollator
from pivot_plugin.training.instruct_trainer import InstructTrainer
from pivot_plugin.verdict import Verdict
from tests.helpers import Tiny, picture
from tests.helpers.recipes import QUICK, captions, conversations

pytestmark = pytest.mark.training

FAST = {name: value for name, value in QUICK.items() if name != "batch"} | {"gradient_accumulation_steps": 1}
Make = Callable[[str], Tiny]


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed_parts(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> set[str]:
    adapter = find_adapter(model)
    return {adapter.part_of(n) for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def test_alignment_changes_the_projector_alone(tiny: Tiny, tmp_path: Path) -> None:
    model, processor = tiny
    before = weights(model)
    result = pivot.align(model, captions(), processor=processor, output_dir=tmp_path / "run", **FAST)
    assert result.model is model
    assert changed_parts(model, before) == {"projector"}
    assert result.trained["projector"][0] > 0 == result.trained["encoder"][0] == result.trained["language_model"][0]
    assert not model.training


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ("projector+language_model", {"projector", "language_model"}),
        ("all", {"encoder", "projector", "language_model"}),
        ("language_model", {"language_model"}),
    ],
)
def test_instruction_changes_what_it_says(make: Make, tmp_path: Path, train: Any, parts: set[str]) -> None:
    model, processor = make("llava")
    before = weights(model)
    pivot.instruct(model, conversations(), processor=processor, output_dir=tmp_path / "run", train=train, **FAST)
    assert changed_parts(model, before) == parts


def test_the_model_on_disk_is_the_trained_one_as_plain_transformers(tiny: Tiny, tmp_path: Path) -> None:
    model, processor = tiny
    pivot.instruct(model, conversations(), processor=processor, output_dir=tmp_path / "run", train="all", **FAST)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name
    assert type(AutoProcessor.from_pretrained(tmp_path / "run" / "model")) is type(processor)
    assert not list((tmp_path / "run" / "model").glob("*.bin"))


def test_the_first_loss_is_the_mean_over_the_tokens_of_all_answers(make: Make, tmp_path: Path) -> None:
    model, processor = make("llava")
    rows = conversations(4)
    total, count = 0.0, 0
    for row in rows:
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        pieces = [
            f"<|im_start|>user\n<image>{turns[0]}<|im_end|>\n<|im_start|>assistant\n",
            f"{turns[1]}<|im_end|>\n",
            f"<|im_start|>user\n{turns[2]}<|im_end|>\n<|im_start|>assistant\n",
            f"{turns[3]}<|im_end|>\n",
        ]
        whole = processor(images=[row["image"]], text=["".join(pieces)], return_tensors="pt")
        image_tokens = whole["input_ids"].shape[1] - sum(len(processor.tokenizer(p)["input_ids"]) for p in pieces)
        with torch.no_grad():
            logps = model(**whole).logits.log_softmax(-1)[0, :-1]
        picked = logps.gather(1, whole["input_ids"][0, 1:, None])[:, 0]
        ends = torch.tensor([len(processor.tokenizer(p)["input_ids"]) for p in pieces]).cumsum(0) + image_tokens - 1
        for first, last in ((ends[0], ends[1]), (ends[2], ends[3])):
            total -= float(picked[first:last].sum())
            count += int(last - first)
    settings = FAST | {"max_steps": 1}
    result = pivot.instruct(model, rows, processor=processor, output_dir=tmp_path / "run", **settings)
    assert result.history[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_step_has_the_loss_of_its_tokens_however_it_is_accumulated(tiny: Tiny, tmp_path: Path) -> None:
    """Against each row by itself through the model's own forward: long answers beside short ones, none of them a batch.

    Some families tell transformers that they take no count of tokens, among them Qwen2.5-VL and Qwen3-VL.
    """
    model, processor = tiny
    rows = [{"image": picture(40, 50, n), "caption": "it is " + "very " * 4 * (n % 2) + f"{n}"} for n in range(4)]
    captions_alone = load_conversations(rows)
    collator = ConversationCollator(processor, find_adapter(model).image_token_id, plain=True)
    totals, counts = [], []
    for n in range(len(rows)):
        batch = collator([captions_alone[n]])
        labels = batch.pop("labels")[0, 1:]
        batch.pop("row_ids")
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1]
        totals.append(float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")))
        counts.append(int((labels != -100).sum()))
    expected = sum(totals) / sum(counts)
    of_rows = sum(total / count for total, count in zip(totals, counts, strict=True)) / len(rows)
    assert of_rows != pytest.approx(expected, rel=1e-4)
    lengths = []
    for size, steps in ((4, 1), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        result = pivot.align(
            copy.deepcopy(model), rows, processor=processor, output_dir=tmp_path / f"{size}", **{**FAST, **options}
        )
        assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-5)
        lengths.append(result.history[0]["grad_norm"])
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)


def test_the_papers_rates_and_batch_are_the_defaults(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[Any] = []
    train = InstructTrainer.train
    monkeypatch.setattr(
        InstructTrainer,
        "train",
        lambda self, **_: (seen.append((self.args, self.create_optimizer())), train(self)),
    )
    model, processor = make("llava")
    options = {k: v for k, v in FAST.items() if k not in ("gradient_accumulation_steps", "max_steps")}
    pivot.align(model, captions(4), processor=processor, output_dir=tmp_path / "a", **options)
    pivot.instruct(model, captions(4), processor=processor, output_dir=tmp_path / "b", train="all", **options)
    (first, _), (second, optimizer) = seen
    assert first.learning_rate == 1e-3
    assert first.plain and not second.plain
    assert {group["initial_lr"] if "initial_lr" in group else group["lr"] for group in optimizer.param_groups} == {
        1e-5,
        2e-6,
    }
    for config in (first, second):
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 256
        assert (config.max_length, config.num_train_epochs, config.lr_scheduler_type) == (2048, 1.0, "cosine")


def test_frozen_modules_stay_as_they_are(make: Make, tmp_path: Path) -> None:
    model, processor = make("llava")
    before = weights(model)
    path = "model.multi_modal_projector.linear_1"
    pivot.align(model, captions(), processor=processor, output_dir=tmp_path / "a", frozen=[path], **FAST)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f"model.multi_modal_projector.linear_2.{name}" for name in ("weight", "bias")}
    with pytest.raises(SettingsError, match=r"frozen names 'projector.linear_1', which .* does not have"):
        pivot.align(
            *(model, captions()), processor=processor, output_dir=tmp_path / "b", frozen=["projector.linear_1"], **FAST
        )


def test_lora_trains_the_language_model_and_is_merged(make: Make, tmp_path: Path) -> None:
    model, processor = make("llava")
    before = weights(model)
    pivot.instruct(
        *(model, conversations()), processor=processor, output_dir=tmp_path / "run", lora=4, learning_rate=1e-2, **FAST
    )
    assert changed_parts(model, before) == {"projector", "language_model"}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    options = FAST | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 3, "learning_rate": 1e-2}
    whole, processor = make("llava")
    pivot.instruct(whole, conversations(), processor=processor, output_dir=tmp_path / "whole", **options)
    model, _ = make("llava")
    before = weights(model)
    step = InstructTrainer.training_step

    def cut(self: InstructTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(InstructTrainer, "training_step", cut)
    with pytest.raises(KeyboardInterrupt):
        pivot.instruct(model, conversations(), processor=processor, output_dir=tmp_path / "cut", **options)
    assert changed_parts(model, before) == set()
    monkeypatch.undo()
    with pytest.raises(SettingsError, match="holds an earlier run"):
        pivot.instruct(model, conversations(), processor=processor, output_dir=tmp_path / "cut", **options)
    pivot.instruct(model, conversations(), processor=processor, output_dir=tmp_path / "cut", resume=True, **options)
    for (name, one), other in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


def test_a_loss_that_is_not_finite_names_its_rows(make: Make, tmp_path: Path) -> None:
    model, processor = make("llava")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    rows = [{**row, "id": f"bad-{n}"} for n, row in enumerate(conversations())]
    with pytest.raises(TrainingError, match=r"loss became nan at step 0 on bad-\d"):
        pivot.instruct(model, rows, processor=processor, output_dir=tmp_path / "run", **FAST)


def test_held_out_rows_are_measured(make: Make, tmp_path: Path) -> None:
    model, processor = make("llava")
    rows = conversations(16)
    result = pivot.instruct(model, rows, processor=processor, output_dir=tmp_path / "run", eval_fraction=0.25, **FAST)
    assert result.metrics["eval_loss"] > 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    change = result.verdict.change
    # of the trainer's own last look, whose batches of all held-out rows count tokens alike
    assert change is not None and change.rows == 4
    assert change.after == pytest.approx(result.metrics["eval_loss"], rel=1e-4)
    assert change.before > change.after and change.low <= change.value <= change.high
    assert "on 4 held-out conversations" in repr(result)
    assert Verdict.from_dict(record["verdict"]) == result.verdict
    again = pivot.instruct(
        *(model, rows), processor=processor, output_dir=tmp_path / "run", eval_fraction=0.25, resume=True, **FAST
    )
    assert again.verdict.change == change
    assert record["finished"] and record["origin"]["rows"] == 12


REFUSED = [
    ({"learning_rat": 1.0}, SettingsError, "no option 'learning_rat'"),
    ({"packing": True}, SettingsError, "packing=True is given"),
    ({"assistant_only_loss": True}, SettingsError, "assistant_only_loss=True is given"),
    ({"train": "projektor"}, SettingsError, "train is 'projektor'"),
    ({"eval_fraction": 1.5}, SettingsError, "eval_fraction is 1.5"),
    ({"on_bad_row": "drop"}, SettingsError, "on_bad_row is 'drop'"),
    ({"conversations": []}, DataError, "has no rows"),
    ({"conversations": [{"a": 1}]}, DataError, "is no conversation"),
    ({"conversations": "nowhere.json"}, DataError, "no such file"),
    ({"model": "nowhere/at-all"}, ModelError, "nowhere/at-all"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_input_is_named_before_training(
    make: Make, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, processor = make("llava")
    arguments = {"model": model, "conversations": conversations(2), "processor": processor, **FAST, **options}
    with pytest.raises(error, match=message):
        pivot.instruct(**arguments, output_dir=tmp_path / "run")


def test_text_only_rows_train_too(make: Make, tmp_path: Path) -> None:
    model, processor = make("qwen2_5_vl")
    rows = [{"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "no"}]} for n in range(4)]
    mixed = [*rows, *conversations(4), {"image": picture(300, 40, 5), "question": "wide?", "answer": "yes"}]
    result = pivot.instruct(
        *(model, mixed), processor=processor, output_dir=tmp_path / "run", train="all", **(FAST | {"max_steps": 3})
    )
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert len(losses) == 3
    assert min(losses) > 0
