"""Rewards by name: the built-in ones and those of plugins."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from pivot_plugin.errors import DataError, SettingsError, said
from pivot_plugin.hooks import hookimpl, named, offered
from pivot_plugin.hooks.types import RewardFunction

from . import answers, form, overlap, rules

BUILT_IN: Mapping[str, RewardFunction] = {
    "accuracy": answers.accuracy,
    "exact_match": answers.exact_match,
    "normalised_match": answers.normalised_match,
    "multiple_choice": answers.multiple_choice,
    "numeric": answers.numeric,
    "permutation": answers.permutation,
    "bleu": overlap.bleu,
    "rouge_l": overlap.rouge_l,
    "box_iou": overlap.box_iou,
    "format": form.format,
    "length_penalty": form.length_penalty,
    "by_rule": cast(RewardFunction, rules.by_rule),
}
NEED_ANSWER = tuple(name for name in BUILT_IN if name not in ("format", "length_penalty"))
# what TRL's trainers pass to a reward beside the columns of the data
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
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
    return [_resolved(reward) for reward in listed]


def _resolved(reward: object) -> object:
    if not isinstance(reward, str):
        return reward
    if reward not in available() and (found := written_at(reward)) is not None:
        return found
    return reward if _is_model(reward) else named("pivot_rewards", reward, "reward")


def written_at(text: str) -> Callable[..., object] | None:
    """A reward function by where it is written: `file.py:function`, or `package.module.function` as TRL takes it.

    Args:
        text: as given.

    Returns:
        None for a text that is neither.

    Raises:
        SettingsError: if the file or the module cannot be imported, or has no such function.
    """
    file, colon, name = text.rpartition(":")
    if colon and file.endswith(".py"):
        where = file
        if not Path(file).is_file():
            raise SettingsError(f"The reward {text!r} is written in {file!r}, which is no file.", "Mend the path.")
    elif text.replace(".", "").isidentifier() and "." in text.strip("."):
        where, _, name = text.rpartition(".")
    else:
        return None
    try:
        module = _module_of_file(Path(where)) if where.endswith(".py") else import_module(where)
    # code of the user's
    except Exception as error:
        raise SettingsError(f"The reward {text!r} cannot be imported: {said(error)}.", "Mend it.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise SettingsError(f"{where!r} has no function {name!r}, which is to be a reward.", "Mend the name.")
    return function  # type: ignore[no-any-return]


def _module_of_file(file: Path) -> ModuleType:
    spec = spec_from_file_location(f"pivot_reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _columns_of(reward: object) -> list[str]:
    """Columns that a reward cannot do without: what its signature names beside what trainers pass by themselves."""
    if not callable(reward) or hasattr(reward, "state_dict"):
        # of a reward model nothing is asked by name
        return []
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [one.name for one in parameters if one.kind in named and one.default is inspect.Parameter.empty]
    return [name for name in required if name not in PASSED]


def _is_model(name: str) -> bool:
    return "/" in name or Path(name).is_dir()


class Questions(Protocol):
    """Rows that can be read one by one."""

    def __len__(self) -> int: ...

    def plain(self, position: int) -> dict[str, Any]: ...

    def where(self, position: int) -> str: ...


def needs_answer(rewards: Sequence[object], questions: Questions) -> None:
    """Make sure, before anything is sampled, that questions have what rewards compare with.

    Args:
        rewards: functions.
        questions: to be asked.

    Raises:
        DataError: naming the first question without the answer that a built-in reward needs, or the column that another
            reward asks for by name.
    """
    present = set(questions.plain(0))
    for reward in rewards:
        if absent := [name for name in _columns_of(reward) if name not in present]:
            raise DataError(
                f"The reward {getattr(reward, '__name__', type(reward).__name__)!r} needs a column {absent[0]!r}, and "
                f"{questions.where(0)} has {', '.join(sorted(present))}.",
                f"Give every question a column {absent[0]!r}, or use another reward.",
                "no answer",
            )
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
