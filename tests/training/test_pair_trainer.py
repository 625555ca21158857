"""What the trainers measure, and that measuring leaves a model as it was."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import pivot_plugin as pivot
from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import InstructConfig, PivotGRPOConfig
from pivot_plugin.errors import ModelError
from pivot_plugin.generation.engines import Sampling, TransformersEngine
from pivot_plugin.models.find import find_adapter
from pivot_plugin.preferences import PairStream, load, load_conversations, load_questions
from pivot_plugin.training.instruct_trainer import InstructTrainer
from pivot_plugin.training.pair_trainer import PivotTrainer
from pivot_plugin.training.plan import plan
from pivot_plugin.training.rollout_trainer import PivotGRPOTrainer
from tests.helpers import Tiny, picture
from tests.helpers.training import settings

QUESTIONS = [{"images": [picture(60, 60, 1)], "question": "what is it?", "answer": "x"}] * 2


class PlugPulledError(Exception):
    """What a forward pass raises in these tests."""


def half_in_training(model: torch.nn.Module) -> dict[str, bool]:
    """Put every other module into training mode; the mode of each."""
    for number, module in enumerate(model.modules()):
        module.training = bool(number % 2)
    return modes(model)


def modes(model: torch.nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def pull_the_plug(model: torch.nn.Module) -> None:
    def refuse(*_: object) -> None:
        raise PlugPulledError

    model.get_input_embeddings().register_forward_hook(refuse)


def trainer_of(tiny: Tiny, rows: Any, folder: Path, **more: Any) -> PivotTrainer:
    adapter: VisionAdapter | None = more.pop("adapter", None)
    plan, lora = more.pop("plan", None), more.pop("lora", 4)
    return PivotTrainer(
        model=tiny[0],
        args=pivot.PivotConfig(**settings(folder, **more)),
        train_dataset=rows[:4],
        eval_dataset=rows[4:],
        processing_class=tiny[1],
        lora=lora,
        adapter=adapter,
        plan=plan,
    )


def test_scoring_leaves_every_module_in_its_mode(llava: Tiny, rows: Any, tmp_path: Path) -> None:
    trainer = trainer_of(llava, rows, tmp_path)
    before = half_in_training(trainer.model)
    assert len(trainer.score(load(rows[:2])).chosen) == 2
    assert modes(trainer.model) == before
    pull_the_plug(trainer.model)
    with pytest.raises(PlugPulledError):
        trainer.score(load(rows[:2]))
    assert modes(trainer.model) == before


def test_the_reference_pass_leaves_every_module_in_its_mode(llava: Tiny, rows: Any, tmp_path: Path) -> None:
    model = llava[0].train()
    before = modes(model)
    trainer_of(llava, rows, tmp_path)
    after = modes(model)
    # what LoRA wraps has other names now
    assert {name: after[name] for name in before.keys() & after.keys()} == {
        name: before[name] for name in before.keys() & after.keys()
    }


@pytest.mark.parametrize("cause", ["the forest differs", "the forward pass raises"])
def test_the_check_of_the_forest_leaves_every_module_in_its_mode(
    cause: str, make: Any, rows: Any, tmp_path: Path
) -> None:
    model, processor = make("qwen2_5_vl")
    before = half_in_training(model)
    adapter = find_adapter(model)
    if cause == "the forest differs":
        # plain depths instead of M-RoPE
        adapter.positions = lambda tokens, images: None  # type: ignore[method-assign]
    else:
        pull_the_plug(model)
    with pytest.raises(ModelError) as refusal:
        trainer_of((model, processor), rows, tmp_path, adapter=adapter, lora=None)
    assert isinstance(refusal.value.__cause__, PlugPulledError) == (cause == "the forward pass raises")
    assert modes(model) == before


@pytest.mark.parametrize("plug", [False, True], ids=["as it should", "raising"])
def test_generation_leaves_every_module_in_its_mode(plug: bool, llava: Tiny) -> None:
    model, processor = llava
    before = half_in_training(model)
    asked = load_questions(QUESTIONS)
    engine = TransformersEngine(model, processor)
    if plug:
        pull_the_plug(model)
        with pytest.raises(PlugPulledError):
            engine([asked[0]], Sampling(n=2, max_new_tokens=2), 0)
    else:
        assert len(engine([asked[0]], Sampling(n=2, max_new_tokens=2), 0)[0]) == 2
    assert modes(model) == before


@pytest.mark.training
def test_before_training_the_policy_is_the_reference_and_afterwards_it_is_not(
    llava: Tiny, rows: Any, tmp_path: Path
) -> None:
    trainer = trainer_of(llava, rows, tmp_path, max_steps=3, learning_rate=0.05)
    before = trainer.reference_metrics()
    assert before.keys() == {"preference_accuracy", "margin", "logps_chosen", "logps_rejected"}
    assert trainer.held_out_metrics() == pytest.approx(before, abs=1e-4)
    trainer.train()
    assert trainer.reference_metrics() == before
    assert abs(trainer.held_out_metrics()["margin"] - before["margin"]) > 1e-3
    pairs = load(rows[4:])
    assert trainer.mean_score(pairs) == trainer.held_out_metrics()["preference_accuracy"]


def test_pairs_given_to_evaluate_are_those_that_are_evaluated(llava: Tiny, rows: Any, tmp_path: Path) -> None:
    trainer = trainer_of(llava, rows, tmp_path)
    expected = trainer.score(load(rows[:2])).metrics()
    measured = trainer.evaluate(rows[:2])
    assert measured["eval_logps/chosen"] == pytest.approx(expected["logps_chosen"], rel=1e-4)
    assert measured["eval_logps/chosen"] != pytest.approx(trainer.held_out_metrics()["logps_chosen"], rel=1e-3)


@pytest.mark.parametrize(("average", "hooks"), [("token", 0), ("sequence", 1)])
def test_the_policy_s_answers_are_listened_to_only_where_a_loss_needs_them(
    average: str, hooks: int, llava: Tiny, rows: Any, tmp_path: Path
) -> None:
    trainer = trainer_of(llava, rows, tmp_path, loss_type=["sft"], sft_average=average)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    seen: list[int] = []
    policy.register_forward_pre_hook(lambda module, args: seen.append(len(module._forward_hooks)))
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    trainer.compute_loss(trainer.model, batch)
    assert seen == [hooks]
    assert not policy._forward_hooks


def test_the_sft_loss_of_a_stream_is_that_of_a_data_set(make: Any, rows: Any, tmp_path: Path) -> None:
    """A stream's reference answers in the same step, after the policy, and is not what the loss averages."""
    losses = []
    for name in ("set", "stream"):
        model, processor = make("llava")
        more = {"loss_type": ["sigmoid", "sft"], "sft_average": "sequence"}
        trainer = PivotTrainer(
            model,
            pivot.PivotConfig(**settings(tmp_path / name, max_steps=1, **more)),
            rows if name == "set" else PairStream(rows),
            processing_class=processor,
            lora=4,
        )
        torch.manual_seed(0)
        for parameter_name, parameter in trainer.model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        items = list(itertools.islice(iter(trainer.train_dataset), len(rows)))
        batch = trainer._prepare_inputs(trainer.data_collator(items))
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_plan_that_is_given_is_the_one_that_trains(make: Any, rows: Any, tmp_path: Path) -> None:
    """It is made once per run; what else the trainers are told of parts and ranks makes no second one."""
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]
    conversations = load_conversations([{"images": [picture(40, 40, 1)], "conversations": turns}])
    for kind in ("pairs", "rollouts", "conversations"):
        model, processor = make("llava")
        given = plan(find_adapter(model), "language_model", 3)
        folder, more = tmp_path / kind, {"plan": given, "lora": 16, "processing_class": processor}
        trainer: Any
        if kind == "pairs":
            trainer = PivotTrainer(model, pivot.PivotConfig(**settings(folder)), rows[:2], **more)
        elif kind == "rollouts":
            options = {name: value for name, value in settings(folder).items() if name != "max_length"}
            config = PivotGRPOConfig(**options, num_generations=2, max_completion_length=4)
            trainer = PivotGRPOTrainer(model, "format", config, QUESTIONS, **more)
        else:
            trainer = InstructTrainer(model, InstructConfig(**settings(folder)), conversations, **more)
        assert trainer.plan is given
        assert isinstance(trainer.model, PeftModel)
        assert trainer.model.peft_config["default"].r == 3
        trained = {part for part, (count, _) in trainer.trained_parameters().items() if count}
        assert trained == {"language_model"}
