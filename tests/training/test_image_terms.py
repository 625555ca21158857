"""Objectives about pictures against a plain computation: each answer about each picture a forward pass of its own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from pivot_plugin import PivotConfig, PivotTrainer, choices, objectives
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.preferences import PairStream
from pivot_plugin.training.image_terms import IMAGE_TERMS
from pivot_plugin.training.plan import plan
from tests.helpers import picture
from tests.helpers.training import settings

BETA = 0.1
OBJECTIVES = ("mdpo", "svco")
FAMILIES = ("llava", "qwen2_5_vl", "internvl")


@pytest.fixture
def two_sided() -> list[dict[str, Any]]:
    """Pairs of pictures: of one size and of several, two questions on one, two pictures to one question."""
    first, second, wide, tall = (
        picture(60, 60, 1),
        picture(60, 60, 2),
        picture(112, 56, 3),
        picture(56, 84, 4),
    )

    def pair(question: str, chosen: str, rejected: str, images: list[Any], others: list[Any]) -> dict[str, Any]:
        return {
            "prompt": question,
            "chosen": chosen,
            "rejected": rejected,
            "images": images,
            "rejected_images": others,
        }

    return [
        pair("what is it?", "a red cat", "a red dog!", [first], [second]),
        pair("where?", "here", "over there", [first], [second]),
        # the other way round: each picture is the rejected one of the other
        pair("what is it?", "a red dog!", "a red cat", [second], [first]),
        pair("<image>which of <image> both?", "left", "the right one", [wide, first], [tall, first]),
        pair("how many?", "one", "two", [tall], [wide]),
    ]


def plain_logp(model: Any, processor: Any, question: str, answer: str, images: list[Any]) -> torch.Tensor:
    """The log-probability of an answer, as anybody would compute it: the processor, the model, a sum."""
    parts = question.split("<image>")
    content: list[dict[str, str]] = []
    if images and len(parts) == 1:
        content += [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    else:
        for number, text in enumerate(parts):
            content += [{"type": "image"}] if number and images else []
            content += [{"type": "text", "text": text}] if text else []
    asked = [{"role": "user", "content": content}]
    said = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    prompt = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = processor.apply_chat_template(said, tokenize=False)
    assert whole.startswith(prompt)
    given = {"images": [images]} if images else {}
    inputs = processor(text=[prompt], return_tensors="pt", add_special_tokens=False, **given)
    completion = processor.tokenizer(whole[len(prompt) :], add_special_tokens=False, return_tensors="pt")["input_ids"]
    length = inputs["input_ids"].shape[1]
    outputs = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in outputs:
        outputs["mm_token_type_ids"] = torch.nn.functional.pad(outputs["mm_token_type_ids"], (0, completion.shape[1]))
    ids = torch.cat([inputs["input_ids"], completion], dim=1)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **outputs).logits[0].log_softmax(-1)
    return logits[:-1].gather(1, ids[0, 1:, None])[length - 1 :, 0].sum()


def plain_loss(objective: str, policy: Any, reference: Any, processor: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The equations as the papers' own trainers have them."""
    losses = []
    for row in rows:

        def ratio(answer: str, images: list[Any], row: dict[str, Any] = row) -> torch.Tensor:
            question = row["prompt"] if images else row["prompt"].replace("<image>", "")
            with torch.no_grad():
                before = plain_logp(reference, processor, question, answer, images)
            return plain_logp(policy, processor, question, answer, images) - before

        win, lose, image, other = row["chosen"], row["rejected"], row["images"], row["rejected_images"]
        of = torch.nn.functional.logsigmoid
        if objective == "mdpo":
            loss = -of(BETA * (ratio(win, image) - ratio(lose, image)))
            loss = loss - of(BETA * (ratio(win, image) - ratio(win, other))) - of(BETA * ratio(win, image))
        else:
            loss = -of(BETA * (ratio(win, image) - ratio(win, [])))
            loss = loss - of(BETA * (ratio(win, []) - ratio(win, other)))
            loss = loss - of(BETA * (ratio(lose, other) - ratio(lose, [])))
            loss = loss - of(BETA * (ratio(lose, []) - ratio(lose, image)))
        losses.append(loss)
    return torch.stack(losses).mean()


def trainer_of(tiny: Any, rows: Any, folder: Path, objective: str, **more: Any) -> PivotTrainer:
    lora, held_out = more.pop("lora", 4), more.pop("eval_dataset", None)
    preset = dict(objectives.resolve(objective))
    trainer = PivotTrainer(
        model=tiny[0],
        args=PivotConfig(**settings(folder, **preset, **more)),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tiny[1],
        lora=lora,
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def moved(model: Any) -> None:
    """Away from the start, where policy and reference are equal and every comparison is log 2."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_separate_forward_passes(
    family: str, objective: str, make: Any, two_sided: list[dict[str, Any]], tmp_path: Path
) -> None:
    model, processor = make(family)
    reference = copy.deepcopy(model)
    by_hand = get_peft_model(copy.deepcopy(model), plan(find_adapter(model), "encoder", 4).lora)
    trainer = trainer_of((model, processor), two_sided, tmp_path, objective)
    moved(trainer.model)
    by_hand.load_state_dict(trainer.model.state_dict())
    expected = plain_loss(objective, by_hand, reference, processor, two_sided)
    expected.backward()
    found = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = dict(by_hand.named_parameters())
    scale = max(p.grad.abs().max() for p in gradients.values() if p.grad is not None).item()
    compared = 0
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            compared += 1
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-4 * scale)
    assert compared == 2 * len(find_adapter(reference).lora_targets())


@pytest.mark.training
@pytest.mark.parametrize(
    ("objective", "family", "lora"), [("mdpo", "qwen2_5_vl", 4), ("svco", "llava", 4), ("mdpo", "llava", None)]
)
def test_the_loss_curve_is_that_of_one_sequence_a_pass(
    objective: str, family: str, lora: int | None, make: Any, two_sided: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = two_sided[:3]
    model, processor = make(family)
    reference, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    trainer = trainer_of((model, processor), rows, tmp_path, objective, max_steps=3, lora=lora, max_grad_norm=1e9)
    adapter = find_adapter(by_hand)
    if lora is None:
        trained = set(plan(adapter, "encoder", None).parameters)
        for name, parameter in by_hand.named_parameters():
            parameter.requires_grad_(name in trained)
        policy = by_hand
    else:
        policy = get_peft_model(by_hand, plan(adapter, "encoder", lora).lora)
        policy.load_state_dict(trainer.model.state_dict())
    trainer.train()
    # the trainer leaves dropout, of which there is none here, and everything else of TRL's step as it is
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    curve = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = plain_loss(objective, policy, reference, processor, rows)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(curve, rel=2e-4)
    assert abs(curve[-1] - curve[0]) > 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_picture_is_encoded_once_and_shared_words_are_read_once(
    objective: str, llava: Any, two_sided: list[dict[str, Any]], tmp_path: Path
) -> None:
    trainer = trainer_of(llava, two_sided[:3], tmp_path, objective)
    encoded: list[int] = []
    tower = find_adapter(trainer.model.get_base_model()).tower
    hook = tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.compute_loss(trainer.model, batch)
    hook.remove()
    # six answers a pair, three pairs, two pictures
    assert sum(encoded) == 2
    forest = batch["forest"].forest
    sequences = {"mdpo": 3, "svco": 6}[objective] * 3
    assert len(forest.paths) == sequences
    # of one picture one tree, and the questions without a picture in one more; all of them in one row
    assert len(batch["forest"].tree_images) == {"mdpo": 2, "svco": 3}[objective]
    assert len(forest.tokens) == 1
    distinct = {
        # a tree by its root
        (int(path[0]), *forest.tokens[row, path[:end]].tolist())
        for row, path in forest.placed()
        for end in range(1, len(path) + 1)
    }
    assert forest.node_count == len(distinct) < forest.sequence_token_count / 2


def test_a_rejected_answer_is_about_the_rejected_pictures_where_no_term_holds_them_against_each_other(
    make: Any, two_sided: list[dict[str, Any]], tmp_path: Path
) -> None:
    """As in ms-swift: the pair is chosen answer and images, rejected answer and rejected images."""
    model, processor = make("qwen2_5_vl")
    reference = copy.deepcopy(model)
    trainer = trainer_of((model, processor), two_sided, tmp_path, "dpo")
    batch = trainer.data_collator(list(trainer.train_dataset))
    for side, column in (("chosen", "images"), ("rejected", "rejected_images")):
        with torch.no_grad():
            expected = [
                plain_logp(reference, processor, row["prompt"], row[side], row[column]).item() for row in two_sided
            ]
        assert batch[f"ref_{side}_logps"].tolist() == pytest.approx(expected, abs=1e-4)
    one_answer = [{**{k: v for k, v in row.items() if k != "rejected"}} for row in two_sided]
    again = trainer_of((copy.deepcopy(reference), processor), one_answer, tmp_path / "one", "dpo")
    expected = [
        plain_logp(reference, processor, row["prompt"], row["chosen"], row["rejected_images"]).item()
        for row in two_sided
    ]
    assert again.train_dataset["ref_rejected_logps"][:] == pytest.approx(expected, abs=1e-4)


def test_the_reference_is_kept_by_the_rejected_pictures_too(
    llava: Any, two_sided: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    original = PivotTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        PivotTrainer,
        "compute_ref_log_probs",
        lambda trainer, model, inputs: (
            computed.append(len(inputs["forest"].pair_ids)) or original(trainer, model, inputs)
        ),
    )

    def paid(rows: list[dict[str, Any]], objective: str) -> int:
        computed.clear()
        trainer_of(copy.deepcopy(llava), rows, tmp_path, objective)
        return sum(computed)

    assert paid(two_sided, "mdpo") == 5
    assert paid(two_sided[::-1], "mdpo") == 0
    other = [{**two_sided[0], "rejected_images": [picture(60, 60, 9)]}, *two_sided[1:]]
    assert paid(other, "mdpo") == 1
    assert paid(other, "svco") == 5
    assert paid(other, "dpo") == 5
    assert paid([{k: v for k, v in row.items() if k != "rejected_images"} for row in other], "dpo") == 5


@pytest.mark.training
def test_held_out_pictures_are_measured_and_a_stream_gives_the_same_loss(
    make: Any, two_sided: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A stream has no reference on disk: the policy without its LoRA answers for it, beside too."""
    model, processor = make("llava")
    curves = []
    for name, rows in (("set", two_sided), ("stream", PairStream(two_sided))):
        trainer = trainer_of(
            (copy.deepcopy(model), processor),
            rows,
            tmp_path / name,
            "svco",
            max_steps=2,
            per_device_train_batch_size=2,
            eval_dataset=two_sided[3:],
            eval_strategy="steps",
            eval_steps=1,
        )
        before = trainer.reference_metrics()
        trainer.train()
        curves.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        looks = [log for log in trainer.state.log_history if "eval_loss" in log]
        assert {"eval_rewards/image_accuracies", "eval_image_terms/attend", "eval_rewards/accuracies"} <= looks[
            0
        ].keys()
        after = trainer.held_out_metrics()
        assert before.keys() == after.keys() >= {"image_accuracy", "image_margin"}
        assert abs(after["image_margin"] - before["image_margin"]) > 1e-4
        with torch.no_grad():
            base = copy.deepcopy(model)
            margins = [
                plain_logp(base, processor, row["prompt"], row["chosen"], row["images"])
                - plain_logp(base, processor, row["prompt"], row["chosen"], row["rejected_images"])
                for row in two_sided[3:]
            ]
        assert before["image_margin"] == pytest.approx(torch.stack(margins).mean().item(), abs=1e-4)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_rows_that_lack_rejected_pictures_are_refused_with_their_count(
    llava: Any, two_sided: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = copy.copy(two_sided)
    rows[1] = {k: v for k, v in rows[1].items() if k != "rejected_images"}
    rows[2] = {**rows[2], "rejected_images": rows[2]["images"]}
    for objective in OBJECTIVES:
        with pytest.raises(DataError, match=r"2 of 5 rows of prefs have no rejected images.*row 1, row 2") as error:
            trainer_of(llava, rows, tmp_path, objective)
        assert "other_picture" in error.value.remedy
    one_answer = [{**row, "rejected": row["chosen"]} for row in two_sided]
    with pytest.raises(DataError, match="5 of 5 rows of prefs have one answer"):
        trainer_of(llava, one_answer, tmp_path, "svco")


@pytest.mark.parametrize(
    ("more", "finding"),
    [
        ({"image_terms": ["conditionl"]}, "no term 'conditionl'|image_terms names 'conditionl'"),
        ({"image_terms": ["anchor", "anchor"]}, "twice"),
        ({"image_terms": ["anchor"], "image_weights": [1.0, 2.0]}, "1 image_terms and 2 image_weights"),
        ({"image_terms": ["anchor"], "ld_alpha": 0.5}, "ld_alpha is 0.5"),
        ({"image_terms": ["anchor"], "max_length": 64}, "max_length is 64"),
        ({"image_terms": ["anchor"], "use_weighting": True}, "use_weighting is True"),
    ],
)
def test_settings_that_terms_about_pictures_cannot_have(more: dict[str, Any], finding: str) -> None:
    with pytest.raises(SettingsError, match=finding):
        PivotConfig(output_dir="unused", use_cpu=True, bf16=False, **more)


def test_the_terms_that_can_be_named_are_those_there_are() -> None:
    assert set(choices.IMAGE_TERMS) == set(IMAGE_TERMS)
