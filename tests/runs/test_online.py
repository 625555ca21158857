"""`pivot.optimize` on a model's own roll-outs."""

import json
from typing import Any

import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin.errors import DataError, SettingsError, TrainingError
from pivot_plugin.testing import FAMILIES
from tests.helpers import Tiny, picture


def questions(count: int = 8) -> list[dict[str, Any]]:
    return [
        {"images": [picture(40, 40, number)], "question": f"how many {number}?", "answer": str(number)}
        for number in range(count)
    ]


def by_length(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


@pytest.fixture
def online(fast: dict[str, Any]) -> dict[str, Any]:
    return fast | {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 1e-2,
    }


@pytest.mark.parametrize(("family", "objective"), [*((family, "grpo") for family in FAMILIES), ("llava", "rloo")])
def test_only_the_tower_changes_and_the_encoder_is_saved(objective: str, tiny: Tiny, online: dict[str, Any]) -> None:
    model, processor = tiny
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = pivot.optimize(
        model, questions(), processor=processor, objective=objective, rewards=by_length, eval_fraction=0.25, **online
    )
    tower = result.adapter.tower_path
    changed = {name for name, tensor in result.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith(f"{tower}.") for name in changed)
    assert "forward" not in vars(result.model)
    assert result.metrics.keys() == {"before", "after"}
    assert result.metrics["before"].keys() == {"reward", "rewards/by_length"}
    pivot.load_encoder(result.output_dir / "encoder")
    record = json.loads((result.output_dir / "run.json").read_text())
    assert record["settings"]["rewards"] == ["by_length"]


def test_default_rewards_are_those_of_specs(llava: Tiny, online: dict[str, Any]) -> None:
    result = pivot.optimize(
        llava[0], questions(), processor=llava[1], objective="grpo", eval_fraction=0, **online | {"max_steps": 1}
    )
    assert result.settings["rewards"] == ["format", "accuracy"]
    assert result.settings["reward_weights"] == [0.5, 1.0]


def test_a_run_with_weights_themselves_and_a_kl_term(llava: Tiny, online: dict[str, Any]) -> None:
    result = pivot.optimize(
        *(llava[0], questions()),
        **{"processor": llava[1], "objective": "grpo", "rewards": by_length, "lora": None, "beta": 0.2},
        **{"eval_fraction": 0, **online, "max_steps": 6},
    )
    divergences = [entry["kl"] for entry in result.history if "kl" in entry]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[-1] > 0


def test_a_killed_run_goes_on(llava: Tiny, make: Any, online: dict[str, Any]) -> None:
    calls = []

    def sometimes(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return by_length(prompts, completions)

    settings = online | {"save_strategy": "steps", "save_steps": 1, "eval_fraction": 0, "objective": "grpo"}
    with pytest.raises(KeyboardInterrupt):
        pivot.optimize(llava[0], questions(), processor=llava[1], rewards=sometimes, **settings)
    model, processor = make("llava")
    result = pivot.optimize(model, questions(), processor=processor, rewards=sometimes, resume=True, **settings)
    assert [entry["step"] for entry in result.history if "loss" in entry] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"rewards": "acuracy"}, SettingsError, "Did you mean accuracy"),
        ({"num_generation": 4}, SettingsError, "no option 'num_generation'.*Did you mean num_generations"),
        ({"per_device_train_batch_size": 3}, SettingsError, "cannot be used: .*divisible"),
        ({"reward_weights": [1.0]}, SettingsError, "got no rewards"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    options: dict[str, Any], error: type[Exception], said: str, online: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"(?s){said}"):
        pivot.optimize("no-such-model", questions(), **{"objective": "grpo", **online, **options})


def test_rewards_and_pairs_exclude_each_other(fast: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    with pytest.raises(SettingsError, match=r"rows of prefs are preference pairs .* and rewards are given"):
        pivot.optimize("no-such-model", rows, rewards="accuracy", **fast)


def test_questions_without_answers_are_named(llava: Tiny, online: dict[str, Any]) -> None:
    rows = questions()
    del rows[5]["answer"]
    with pytest.raises(DataError, match="row 5 of questions has no 'answer'"):
        pivot.optimize(llava[0], rows, processor=llava[1], objective="grpo", **online)
    with pytest.raises(DataError, match="is a stream"):
        pivot.optimize(llava[0], iter(rows), processor=llava[1], objective="grpo", **online)


def test_a_reward_that_fails_leaves_the_model_as_it_was(llava: Tiny, online: dict[str, Any]) -> None:
    model, processor = llava
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def later(prompts: Any, completions: Any, **columns: Any) -> Any:
        calls.append(1)
        return by_length(prompts, completions) if len(calls) < 3 else None

    with pytest.raises(TrainingError, match="The reward 'later' returned NoneType"):
        pivot.optimize(
            model, questions(), processor=processor, objective="grpo", rewards=later, eval_fraction=0, **online
        )
    assert len(calls) == 3
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
