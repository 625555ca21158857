"""Rewards by name: the built-in ones and those of plugins."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.hooks import hookimpl, named, offered
from pivot_plugin.hooks.types import RewardFunction

from . import answers, form, overlap

BUILT_IN: Mapping[str, RewardFunction] = {
    "accuracy": answers.accuracy,
    "exact_match": answers.exact_match,
    "normalised_match": answers.normalised_match,
    "multiple_choice": answers.multiple_choice,
    "numeric": answers.numeric,
    "bleu": overlap.bleu,
    "rouge_l": overlap.rouge_l,
    "box_iou": overlap.box_iou,
    "format": form.format,
    "length_penalty": form.length_penalty,
}
NEED_ANSWER = tuple(name for name in BUILT_IN if name not in ("format", "length_penalty"))
# arXiv 2510.25801, final GRPO: 0.5 for the structure, 1.0 for a right answer
SPECS_WEIGHTS = {"format": 0.5, "accuracy": 1.0}


@hookimpl
def pivot_rewards() -> Mapping[str, RewardFunction]:
    return BUILT_IN


def available() -> dict[str, RewardFunction]:
    """Every reward that can be named; a plugin's wins over a built-in one.

    Raises:
        PluginError: if a plugin offers no mapping.
    """
    return offered("pivot_rewards")


def resolve_rewards(rewards: str | Callable[..., object] | Sequence[object]) -> list[object]:
    """Reward functions for names; what is no name is passed on.

    Args:
        rewards: a name, a callable, or a list of these (for GRPO also of reward models).

    Raises:
        SettingsError: for a name nobody knows, with the nearest ones, or for none at all.
    """
    listed = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
    if not listed:
        raise SettingsError("No reward is given.", f"Give one or more of {', '.join(sorted(available()))}.")
    return [
        named("pivot_rewards", reward, "reward") if isinstance(reward, str) and not _is_model(reward) else reward
        for reward in listed
    ]


def _is_model(name: str) -> bool:
    return "/" in name or Path(name).is_dir()


class Questions(Protocol):
    """Rows that can be read one by one."""

    def __len__(self) -> int: ...

    def plain(self, position: int) -> dict[str, Any]: ...

    def where(self, position: int) -> str: ...


def needs_answer(rewards: Sequence[object], questions: Questions) -> None:
    """Make sure, before anything is sampled, that questions have the answers that built-in rewards compare with.

    Args:
        rewards: functions.
        questions: to be asked.

    Raises:
        DataError: naming the first question without one.
    """
    names = [name for name in NEED_ANSWER if any(reward is BUILT_IN[name] for reward in rewards)]
    if not names:
        return
    for position in range(len(questions)):
        row = questions.plain(position)
        if not any(row.get(column) not in (None, []) for column in answers.ANSWER_COLUMNS):
            raise DataError(
                f"{questions.where(position)} has no {' or '.join(map(repr, answers.ANSWER_COLUMNS))}, which the "
                f"reward {names[0]!r} compares with.",
                "Give every question an 'answer', or use rewards that need none, such as 'format'.",
                "no answer",
            )
