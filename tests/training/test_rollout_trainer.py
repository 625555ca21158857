"""Roll-outs over the forest: exact against TRL's own trainers on the same roll-outs, and each image once."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.data_utils import prepare_multimodal_messages

from pivot_plugin.config import PivotGRPOConfig, PivotRLOOConfig
from pivot_plugin.errors import DataError, SettingsError, TrainingError
from pivot_plugin.generation.shared_prefill import Layout, SharedPrefill
from pivot_plugin.models.find import find_adapter
from pivot_plugin.preferences import load_questions
from pivot_plugin.training.plan import plan
from pivot_plugin.training.rollout_trainer import PivotGRPOTrainer, PivotRLOOTrainer
from tests.helpers import Tiny, picture

SHARED = picture(60, 60, 1)
QUESTIONS = [
    {"images": [SHARED], "question": "what is it?", "answer": "x"},
    {"images": [picture(120, 50, 2), picture(40, 80, 3)], "question": "<image> a <image> b?", "answer": "y"},
    {"images": [SHARED], "question": "where?", "answer": "y"},
    {"images": [picture(64, 64, 5)], "question": "shape?", "answer": "y"},
]
GENERATIONS = 4
TRAINERS: dict[str, Any] = {
    "grpo": (PivotGRPOTrainer, PivotGRPOConfig, GRPOTrainer, GRPOConfig),
    "rloo": (PivotRLOOTrainer, PivotRLOOConfig, RLOOTrainer, RLOOConfig),
}


def by_length(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": GENERATIONS,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "beta": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "temperature": 0.9,
        **more,
    }


def rollouts(processor: Any) -> list[list[int]]:
    """Completions of every length, some of which begin alike, one cut off."""
    tokenizer = processor.tokenizer
    texts = ["a red cat", "a red dog", "no", "a red cat"]
    made = []
    for number in range(len(QUESTIONS) * GENERATIONS):
        ids = tokenizer(texts[number % 4] + "!" * (number // 4), add_special_tokens=False)["input_ids"][:8]
        made.append(ids if number % 5 == 0 else [*ids[:7], tokenizer.eos_token_id])
    return made


def as_trl(questions: list[dict[str, Any]]) -> Any:
    """The questions as TRL's own trainers take them."""
    import datasets

    asked = load_questions(questions)
    rows = [asked[position] for position in range(len(asked))]
    return datasets.Dataset.from_list(
        [{"prompt": row["prompt"], "images": row["images"], "answer": row["answer"]} for row in rows]
    )


def without_image_counts(self: Any, *args: Any, batch_num_images: Any = None, **kwargs: Any) -> Any:
    parent = GRPOTrainer if isinstance(self, GRPOTrainer) else RLOOTrainer
    return parent._get_per_token_logps_and_entropies(self, *args, **kwargs)


def with_lora(trainer: Any) -> Any:
    """The same LoRA weights in every trainer, none of them zero, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return trainer


def one_step(trainer: Any, processor: Any) -> tuple[dict[str, torch.Tensor], list[float], dict[str, torch.Tensor]]:
    """What a generation batch of fixed roll-outs gives: log-probabilities, losses of both halves, gradients."""
    made = rollouts(processor)
    trainer._generate_single_turn = lambda *args, **kwargs: made if isinstance(trainer, RLOOTrainer) else (made, None)
    trainer.model.train()
    batch = [trainer.train_dataset[index // GENERATIONS] for index in range(len(made))]
    scored = []
    generate = type(trainer)._generate_and_score_completions

    def keep(inputs: Any) -> Any:
        scored.append(generate(trainer, inputs))
        return scored[-1]

    trainer._generate_and_score_completions = keep
    torch.manual_seed(3)
    trainer.current_gradient_accumulation_steps = 2
    losses = []
    for step in range(2):
        trainer._step = step
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        loss.backward()
        losses.append(loss.item())
    logps = {
        name: value * scored[0]["completion_mask"] if value.ndim == 2 else value
        for name, value in scored[0].items()
        if name in ("old_per_token_logps", "ref_per_token_logps", "old_logps", "advantages")
    }
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    return logps, losses, gradients


@pytest.mark.parametrize("objective", TRAINERS)
def test_log_probabilities_losses_and_gradients_are_trl_s(objective: str, tiny: Tiny, tmp_path: Path) -> None:
    ours, our_config, theirs, their_config = TRAINERS[objective]
    model, processor = tiny
    # which TRL takes for granted
    processor.tokenizer.padding_side = "left"
    questions = QUESTIONS
    if tiny[0].config.model_type == "llava_onevision":
        # TRL 1.16 does not know `batch_num_images`, without which this family cuts each of several images into tiles
        questions = [QUESTIONS[0], {**QUESTIONS[3], "question": "again?"}, *QUESTIONS[2:]]
        theirs = type("WithoutImageCounts", (theirs,), {"_get_per_token_logps_and_entropies": without_image_counts})
    lora = plan(find_adapter(model), "encoder", 4).lora
    iterations = {"num_iterations": 2}
    plain = theirs(
        copy.deepcopy(model),
        by_length,
        their_config(**settings(tmp_path / "trl", **iterations)),
        as_trl(questions),
        processing_class=copy.deepcopy(processor),
        peft_config=lora,
    )
    forest = ours(
        model,
        by_length,
        our_config(**settings(tmp_path / "ours", **iterations), group_rollouts=False),
        questions,
        processing_class=processor,
        lora=lora,
    )
    expected, found = (one_step(with_lora(trainer), processor) for trainer in (plain, forest))
    assert expected[0].keys() == found[0].keys()
    assert len(expected[0]) >= 2
    for name, values in expected[0].items():
        assert values.abs().max() > 0
        torch.testing.assert_close(found[0][name], values, rtol=1e-4, atol=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-6)
    assert len(expected[2]) == len(found[2]) > 0
    largest = max(gradient.abs().max() for gradient in expected[2].values())
    for name, gradient in expected[2].items():
        assert (found[2][name] - gradient).abs().max() <= 1e-4 * largest, name


@pytest.mark.training
@pytest.mark.parametrize("objective", TRAINERS)
def test_a_whole_run_is_trl_s(objective: str, make: Any, tmp_path: Path) -> None:
    """Sampling included: the same seeds draw the same roll-outs, and the logs agree to the last step."""
    ours, our_config, theirs, their_config = TRAINERS[objective]
    histories = []
    for name in ("trl", "ours"):
        model, processor = make("qwen2_5_vl")
        processor.tokenizer.padding_side = "left"
        questions = QUESTIONS
        lora = plan(find_adapter(model), "encoder", 4).lora
        common = settings(tmp_path / name, max_steps=4)
        if name == "trl":
            trainer = theirs(
                model,
                by_length,
                their_config(**common),
                as_trl(questions),
                processing_class=processor,
                peft_config=lora,
            )
        else:
            config = our_config(**common, group_rollouts=False)
            trainer = ours(model, by_length, config, QUESTIONS, processing_class=processor, lora=lora)
        trainer.train()
        histories.append([log for log in trainer.state.log_history if "loss" in log])
    assert len(histories[0]) == 4
    for expected, found in zip(*histories, strict=True):
        for name in ("reward", "reward_std", "kl", "entropy", "grad_norm", "completions/mean_length"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def trainer_of(tiny: Tiny, folder: Path, rewards: Any = by_length, questions: Any = QUESTIONS, **more: Any) -> Any:
    lora = more.pop("lora", 4)
    config = PivotGRPOConfig(**settings(folder, **more))
    return PivotGRPOTrainer(tiny[0], rewards, config, questions, processing_class=tiny[1], lora=lora)


@pytest.mark.training
def test_the_tower_sees_each_image_of_a_batch_once(tiny: Tiny, tmp_path: Path) -> None:
    """In generation, for old and reference log-probabilities, and in the loss: four images, whatever G is."""
    model, _ = tiny
    trainer = trainer_of(tiny, tmp_path, per_device_train_batch_size=16, gradient_accumulation_steps=1, max_steps=1)
    sizes: list[int] = []
    model.get_encoder(modality="image").register_forward_hook(
        lambda module, args, output: sizes.append(output.last_hidden_state.numel())
    )
    # the trial before the first answer has tests of its own
    trainer._prefill = SharedPrefill(model, Layout.TREE)
    asked = load_questions(QUESTIONS)
    images = trainer._forest_collator.image_tokens.process_images([asked[number]["images"] for number in (0, 1, 3)])
    sizes.clear()
    with torch.no_grad():
        model.base_model.get_image_features(**images.inputs)
    (once,) = sizes
    sizes.clear()
    trainer.train()
    assert len(sizes) >= 3
    assert set(sizes) == {once}


@pytest.mark.parametrize("layout", Layout)
def test_a_batch_draws_in_every_layout_what_plain_generation_draws(layout: Layout, tiny: Tiny, tmp_path: Path) -> None:
    """Questions with and without images, and a group of which a process has only a part."""
    questions = [QUESTIONS[0], {"question": "hello", "answer": "z"}, *QUESTIONS[2:]]
    trainer = trainer_of(tiny, tmp_path, questions=questions, temperature=1.0)
    model, processor = tiny
    counts = [4, 2, 4, 2]
    batch = [trainer.train_dataset[number] for number, count in enumerate(counts) for _ in range(count)]
    trainer.model.train()
    looked_up = trainer._looked_up(batch)
    assert trainer._repeats() == 2
    messages = [prepare_multimodal_messages(row["prompt"], images=list(row["images"])) for row in looked_up]
    inputs = processor(
        images=[row["images"] for row in looked_up],
        text=[processor.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    torch.manual_seed(1)
    expected = model.generate(**inputs, generation_config=trainer.generation_config)
    trainer._prefill = SharedPrefill(model, layout)
    torch.manual_seed(1)
    made = trainer._generate(messages)[1]
    ends = torch.tensor(trainer.eos_token_ids)
    for found, tokens in zip(made, expected[:, inputs["input_ids"].shape[1] :], strict=True):
        end = torch.isin(tokens, ends).nonzero()
        assert found == tokens[: int(end[0]) + 1 if len(end) else None].tolist()
    assert trainer.generation_config.num_return_sequences in (None, 1)


@pytest.mark.training
def test_rollouts_of_a_question_come_in_one_batch(make: Any, tmp_path: Path) -> None:
    for grouped in (True, False):
        llava = make("llava")
        trainer = trainer_of(
            llava,
            tmp_path / str(grouped),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            group_rollouts=grouped,
            max_steps=1,
        )
        seen = []
        compute_loss = trainer.compute_loss

        def spy(
            model: Any,
            inputs: Any,
            *args: Any,
            trainer: Any = trainer,
            compute_loss: Any = compute_loss,
            seen: Any = seen,
            **kwargs: Any,
        ) -> Any:
            seen.append({trainer._shown["train"].questions[row] for row in inputs["row"].tolist()})
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = spy
        trainer.train()
        assert all(len(questions) == 1 for questions in seen) is grouped
        assert len(seen) == 4


@pytest.mark.training
def test_text_only_questions_may_stand_between_others(tiny: Tiny, tmp_path: Path) -> None:
    questions = [QUESTIONS[0], {"question": "hello", "answer": "z"}, {"question": "bye", "answer": "z"}, QUESTIONS[1]]
    trainer = trainer_of(tiny, tmp_path, questions=questions, max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.training
@pytest.mark.parametrize("train", ["encoder", "encoder+projector", "language_model", "all"])
@pytest.mark.parametrize("lora", [4, None])
def test_the_reference_does_not_move(train: Any, lora: Any, llava: Tiny, tmp_path: Path) -> None:
    """Reference log-probabilities of fixed roll-outs before and after training, against those of an untouched copy."""
    trainer = trainer_of(llava, tmp_path, train=train, lora=lora, max_steps=3, learning_rate=0.05)
    made = rollouts(llava[1])

    def reference_of_fixed_rollouts() -> torch.Tensor:
        generate = trainer._generate_single_turn
        trainer._generate_single_turn = lambda *args, **kwargs: (made, None)
        trainer.model.train()
        batch = [trainer.train_dataset[index // GENERATIONS] for index in range(len(made))]
        scored = trainer._generate_and_score_completions(batch)
        trainer._generate_single_turn = generate
        return scored["ref_per_token_logps"] * scored["completion_mask"]

    before = reference_of_fixed_rollouts()
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad and not torch.equal(start[n], p)]
    assert moved
    assert torch.equal(reference_of_fixed_rollouts(), before)


def by_length_of_some(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
    """Tells the roll-outs of questions apart whose answer is "y", and no others."""
    lengths = by_length(prompts, completions)
    return [length if one == "y" else 1.0 for length, one in zip(lengths, answer, strict=True)]


MANY = [
    {
        "images": [picture(40 + 8 * (n % 3), 60, n)],
        "question": f"{'what ' * (n % 4)}is it {n}?",
        "answer": "y" * (n % 2),
    }
    for n in range(12)
]


@pytest.mark.parametrize("redraw", [0, 3])
@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_a_batch_is_filled_up_with_questions_whose_rollouts_differ(
    objective: str, redraw: int, llava: Tiny, tmp_path: Path
) -> None:
    trainer_class, config_class, _, _ = TRAINERS[objective]
    args = settings(tmp_path, per_device_train_batch_size=16, gradient_accumulation_steps=1, steps_per_generation=2)
    trainer = trainer_class(
        llava[0], by_length_of_some, config_class(**args, redraw=redraw), MANY, processing_class=llava[1], lora=4
    )
    with_lora(trainer)
    trainer.model.train()
    positions = [0, 1, 2, 3, 4, 6, 8, 10]
    batch = [trainer.train_dataset[position] for position in positions for _ in range(GENERATIONS)]
    output = trainer._generate_and_score_completions(batch)
    shown = trainer._shown["train"]
    asked = list(dict.fromkeys(shown.names))
    rewards_differ = output["advantages"].view(-1, GENERATIONS).abs().sum(dim=1) > 0
    if not redraw:
        assert asked == [f"question {trainer._sources[0][position]['id']}" for position in positions]
        assert "redrawn_questions" not in trainer._metrics["train"]
        # the advantages of RLOO hold the KL term too
        assert rewards_differ.sum() == (2 if objective == "grpo" else 8)
        return
    # six were silent, and four more can be told apart: 5, 7, 9 and 11
    assert trainer._metrics["train"]["redrawn_questions"] == [4.0]
    assert len(asked) == len(positions)
    spread = {f"question {trainer._sources[0][position]['id']}" for position in (1, 3, 5, 7, 9, 11)}
    assert spread < set(asked)
    if objective == "grpo":
        assert rewards_differ.sum() == 6
    # what is put together is what the model computes of these rows
    if objective == "grpo":
        kept = output["old_per_token_logps"] * output["completion_mask"]
        assert output["num_items_in_batch"] == output["completion_mask"].sum()
    else:
        kept = output["old_logps"]
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad(), trainer._computing(output["row"].tolist()):
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, output["completion_ids"].shape[1], batch_size=16
        )
    logps = logps * output["completion_mask"]
    again = logps if objective == "grpo" else logps.sum(dim=1)
    assert torch.allclose(again, kept, atol=1e-4)


def test_a_redraw_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for settings_, said in (({"redraw": -1}, "redraw is -1"), ({"redraw": 1, "scale_rewards": "batch"}, "whole batch")):
        with pytest.raises(SettingsError, match=said):
            PivotGRPOConfig(**settings(tmp_path), **settings_)
    with pytest.raises(SettingsError, match="whole batch"):
        PivotRLOOConfig(**settings(tmp_path), redraw=1, normalize_advantages=True)


def test_a_question_without_answer_is_named_before_anything_is_sampled(llava: Tiny, tmp_path: Path) -> None:
    questions = [QUESTIONS[0], {**QUESTIONS[1], "answer": None}]
    with pytest.raises(
        DataError, match="row 1 of questions has no 'answer' or 'solution', which the reward 'accuracy'"
    ):
        trainer_of(llava, tmp_path, ["format", "accuracy"], questions)
    trainer_of(llava, tmp_path, ["format"], questions)


@pytest.mark.training
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda count: None, "returned NoneType"),
        (lambda count: [float("nan")] * count, "returned nan for completion 0"),
        (lambda count: [1.0] * (count - 1), "scores for 16 completions"),
        (lambda count: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_reward_that_misbehaves_is_named(value: Any, said: str, llava: Tiny, tmp_path: Path) -> None:
    def mine(prompts: Any, completions: Any, **columns: Any) -> Any:
        return value(len(completions))

    with pytest.raises(TrainingError, match=f"The reward 'mine' .*{said}"):
        trainer_of(llava, tmp_path, mine).train()


@pytest.mark.training
def test_a_slow_reward_is_stopped(llava: Tiny, tmp_path: Path) -> None:
    import time

    def slow(prompts: Any, completions: Any, **columns: Any) -> Any:
        time.sleep(1.5)
        return [0.0] * len(completions)

    with pytest.raises(TrainingError, match=r"'slow' takes longer than 0.2 s on completion 0"):
        trainer_of(llava, tmp_path, slow, reward_time_limit=0.2).train()


@pytest.mark.training
def test_rewards_without_signal_are_said_once(llava: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(llava, tmp_path, "format", max_steps=8)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("all roll-outs of each question scored alike") == 1


@pytest.mark.training
def test_rewards_that_do_not_judge_a_row_are_left_out(llava: Tiny, tmp_path: Path) -> None:
    def some(prompts: Any, completions: Any, **columns: Any) -> Any:
        return [None if number % 2 else 1.0 for number in range(len(completions))]

    trainer = trainer_of(llava, tmp_path, [some, by_length], reward_weights=[0.5, 2.0])
    trainer.train()
    assert any("rewards/some/mean" in log for log in trainer.state.log_history)


@pytest.mark.training
def test_a_reward_model_is_taken_as_trl_takes_it(llava: Tiny, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = llava[1].tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.chat_template = llava[1].chat_template
    tokenizer.save_pretrained(tmp_path / "reward")
    questions = [{"question": text, "answer": "x"} for text in ("a?", "b?", "c?", "d?")]
    trainer = trainer_of(llava, tmp_path / "run", str(tmp_path / "reward"), questions, max_steps=1)
    trainer.train()
    assert any("rewards/reward/mean" in log for log in trainer.state.log_history)


def test_an_unknown_reward_is_said(llava: Tiny, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="Did you mean accuracy"):
        trainer_of(llava, tmp_path, "acuracy")


def test_a_batch_that_groups_do_not_fill_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)6.*divisible by.*4"):
        PivotGRPOConfig(**settings(tmp_path, per_device_train_batch_size=3))


@pytest.mark.training
def test_prompts_reach_rewards_as_messages(llava: Tiny, tmp_path: Path) -> None:
    seen: list[Any] = []

    def looks(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
        seen.append((prompts, answer, columns))
        return [float(number) for number in range(len(completions))]

    trainer_of(llava, tmp_path, looks, max_steps=1).train()
    prompts, answer, columns = seen[0]
    assert len(prompts) == len(answer) == 16
    assert prompts[0][0]["role"] == "user"
    assert "image_key" not in columns
