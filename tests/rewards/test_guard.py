"""What foreign reward functions do wrong is named: the function, the row, and what it returned."""

import time
from typing import Any

import pytest

from pivot_plugin import hooks
from pivot_plugin.errors import PluginError, SettingsError, TrainingError
from pivot_plugin.rewards import GuardedReward, Scorer, combine, resolve_rewards

TEXTS = ["first", "second", "third"]


def returning(value: Any) -> Any:
    def mine(prompts: Any, completions: Any, **columns: Any) -> Any:
        return value

    return mine


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "returned NoneType 'None'"),
        (0.5, "returned float '0.5'"),
        ("abc", "returned str 'abc'"),
        ([1.0, 2.0], "returned 2 scores for 3 completions"),
        ([1.0, float("nan"), 0.0], r"returned nan for completion 1 \('second'\)"),
        ([1.0, 0.0, float("inf")], r"returned inf for completion 2 \('third'\)"),
        ([1.0, "x", 0.0], r"returned 'x' for completion 1"),
        ([1.0, [2], 0.0], r"returned \[2\] for completion 1"),
    ],
)
def test_what_a_reward_returns_is_checked(value: Any, said: str) -> None:
    with pytest.raises(TrainingError, match=f"The reward 'mine' {said}") as caught:
        GuardedReward(returning(value))(["?"] * 3, TEXTS)
    assert "one number per completion" in caught.value.remedy


def test_numbers_of_any_kind_and_none_are_taken() -> None:
    import numpy as np
    import torch

    assert GuardedReward(returning([1, None, np.float32(0.5)]))(["?"] * 3, TEXTS) == [1.0, None, 0.5]
    assert GuardedReward(returning(torch.tensor([1.0, 2.0, 3.0])))(["?"] * 3, TEXTS) == [1.0, 2.0, 3.0]


def test_what_a_reward_raises_is_named() -> None:
    def broken(prompts: Any, completions: Any, **columns: Any) -> Any:
        raise KeyError("colour")

    with pytest.raises(TrainingError, match=r"The reward 'broken' raised KeyError: 'colour'"):
        GuardedReward(broken)(["?"], ["a"])


def test_a_reward_that_hangs_on_one_row_is_named_with_it() -> None:
    def slow(prompts: Any, completions: Any, **columns: Any) -> Any:
        assert len(columns["answer"]) == len(completions)
        if "second" in completions:
            time.sleep(3)
        return [1.0] * len(completions)

    started = time.monotonic()
    with pytest.raises(TrainingError, match=r"'slow' takes longer than 0.2 s on completion 0 \('second'\)"):
        GuardedReward(slow, 0.2)(["?"] * 3, ["second", "first", "third"], answer=["x", "y", "z"])
    assert time.monotonic() - started < 2.5


def test_coroutines_are_awaited() -> None:
    async def later(prompts: Any, completions: Any, **columns: Any) -> Any:
        return [1.0] * len(completions)

    assert GuardedReward(later)(["?"], ["a"]) == [1.0]


def test_an_interrupt_inside_a_reward_is_an_interrupt() -> None:
    def stopped(prompts: Any, completions: Any, **columns: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GuardedReward(stopped)(["?"], ["a"])


def test_weights_add_up_and_none_is_left_out() -> None:
    scorer = Scorer([returning([1.0, None, 0.0]), returning([1.0, 2.0, None])], [0.5, 2.0])
    assert scorer(["?"] * 3, TEXTS) == [2.5, 4.0, 0.0]
    assert combine([None, None], [1, 1]) is None
    with pytest.raises(SettingsError, match="2 rewards and 1 weights"):
        Scorer(["format", "accuracy"], [1.0])
    with pytest.raises(SettingsError, match="cannot be called"):
        Scorer([3])


def test_a_plugin_reward_is_found_by_name_and_wins() -> None:
    class Mine:
        @hooks.hookimpl
        def pivot_rewards(self) -> Any:
            return {"accuracy": returning([7.0]), "sharp": returning([1.0])}

    plugin = hooks.manager().register(Mine(), name="mine")
    try:
        assert Scorer(["accuracy", "sharp"])(["?"], ["a"]) == [8.0]
    finally:
        hooks.manager().unregister(name=plugin)
    assert resolve_rewards("accuracy") != [None]


def test_a_plugin_that_offers_no_mapping_is_named() -> None:
    class Mine:
        @hooks.hookimpl
        def pivot_rewards(self) -> Any:
            return ["accuracy"]

    plugin = hooks.manager().register(Mine(), name="odd")
    try:
        with pytest.raises(PluginError, match=r"'odd'.*pivot_rewards.*list"):
            resolve_rewards("accuracy")
    finally:
        hooks.manager().unregister(name=plugin)
