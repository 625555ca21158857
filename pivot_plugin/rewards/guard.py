"""Foreign reward functions, called so that what goes wrong is named: the function, the row, and what it returned."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pivot_plugin.config import TIME_LIMIT_S
from pivot_plugin.deadline import Overdue, within
from pivot_plugin.errors import PivotError, SettingsError, TrainingError

from .lookup import resolve_rewards
from .text import completion_text


def _shown(index: int, completions: Sequence[object]) -> str:
    return f"completion {index} ({completion_text(completions[index])[:80]!r})"


@dataclass
class GuardedReward:
    """A reward function whose mistakes become errors that name it and the row. Called as the function itself.

    Args:
        function: with TRL's signature.
        time_limit_s: for one call; afterwards the row that takes so long is looked for and named.

    Raises:
        TrainingError: if the function raises, takes too long, or does not return one number (or None) per completion.
    """

    function: Callable[..., Any]
    time_limit_s: float = TIME_LIMIT_S

    @property
    def __name__(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def __call__(
        self, prompts: Sequence[object], completions: Sequence[object], **columns: object
    ) -> list[float | None]:
        try:
            value = self._called(prompts, completions, columns)
        except Overdue as error:
            raise self._slow_row(prompts, completions, columns) from error
        if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
            raise self._error(f"returned {type(value).__name__} {str(value)[:60]!r}", completions)
        if len(value) != len(completions):
            raise self._error(f"returned {len(value)} scores for {len(completions)} completions", completions)
        return [self._number(index, score, completions) for index, score in enumerate(value)]

    def _number(self, index: int, score: object, completions: Sequence[object]) -> float | None:
        if score is None:
            return None
        try:
            number = float(score)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self._error(f"returned {score!r} for {_shown(index, completions)}", completions)
        return number

    def _called(self, prompts: Sequence[object], completions: Sequence[object], columns: dict[str, Any]) -> Any:
        """What the function returns.

        Raises:
            Overdue: if it takes too long; it is left behind in its thread.
            TrainingError: if it raises.
        """

        def call() -> Any:
            value = self.function(prompts=prompts, completions=completions, **columns)
            if inspect.iscoroutine(value):
                import asyncio

                value = asyncio.run(value)
            return value

        try:
            return within(self.time_limit_s, call, f"reward {self.__name__}")
        except (Overdue, PivotError):
            raise
        except Exception as error:
            raise self._error(f"raised {type(error).__name__}: {error}", completions) from error

    def _slow_row(
        self, prompts: Sequence[object], completions: Sequence[object], columns: dict[str, Any]
    ) -> TrainingError:
        """The error for the row that alone takes longer than the limit; if none does, they do together."""
        for index in range(len(completions)):
            only = slice(index, index + 1)
            columns_of_row = {
                name: value[only] if isinstance(value, list) and len(value) == len(completions) else value
                for name, value in columns.items()
            }
            try:
                self._called(prompts[only], completions[only], columns_of_row)
            except Overdue:
                what = f"takes longer than {self.time_limit_s:g} s on {_shown(index, completions)}"
                return self._error(what, completions)
        return self._error(f"takes longer than {self.time_limit_s:g} s on {len(completions)} completions", completions)

    def _error(self, what: str, completions: Sequence[object]) -> TrainingError:
        return TrainingError(
            f"The reward {self.__name__!r} {what}.",
            "A reward returns a list with one number per completion, None where it does not judge; mend it, or give "
            "it more time with reward_time_limit= (seconds).",
        )


class Scorer:
    """Several rewards with weights, as one score per completion.

    Args:
        rewards: names or functions.
        weights: one per reward; 1 each where not given.
        time_limit_s: for one call of one reward.

    Raises:
        SettingsError: for an unknown name, a reward that cannot be called, or weights that do not match.
    """

    def __init__(
        self,
        rewards: str | Callable[..., object] | Sequence[object],
        weights: Sequence[float] | None = None,
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        functions = resolve_rewards(rewards)
        for function in functions:
            if not callable(function):
                raise SettingsError(
                    f"The reward {function!r} cannot be called.", "Give a name, or a function with TRL's signature."
                )
        self.rewards = [GuardedReward(function, time_limit_s) for function in functions if callable(function)]
        self.weights = check_weights(weights, len(self.rewards))

    def __call__(
        self, prompts: Sequence[object], completions: Sequence[object], **columns: object
    ) -> list[float | None]:
        """The weighted sum per completion; None where no reward judges it."""
        scores = [reward(prompts, completions, **columns) for reward in self.rewards]
        return [combine(own, self.weights) for own in zip(*scores, strict=True)]


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights of some rewards, 1 each where none are given.

    Raises:
        SettingsError: if there are not as many as rewards.
    """
    if weights is not None and len(weights) != count:
        raise SettingsError(f"There are {count} rewards and {len(weights)} weights.", "Give one weight per reward.")
    return [1.0] * count if weights is None else [float(weight) for weight in weights]


def combine(scores: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """The weighted sum of the scores there are; None where there are none."""
    judged = [(score, weight) for score, weight in zip(scores, weights, strict=True) if score is not None]
    return sum(score * weight for score, weight in judged) if judged else None
