"""Rewards by name: the built-in ones and those of plugins."""

import difflib
from collections.abc import Callable, Mapping, Sequence

from pivot_plugin.errors import PluginError, SettingsError
from pivot_plugin.hooks import collect, hookimpl
from pivot_plugin.types import RewardFunction

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
    found: dict[str, RewardFunction] = {}
    for name, offered in collect("pivot_rewards"):
        if not isinstance(offered, Mapping):
            raise PluginError(
                f"Plugin {name!r} answered pivot_rewards with a {type(offered).__name__}.",
                "It must return a mapping of names to functions; mend or disable it (PIVOT_DISABLE_PLUGINS).",
            )
        found.update(offered)
    return found


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
    known = available()
    return [_found(reward, known) if isinstance(reward, str) and "/" not in reward else reward for reward in listed]


def _found(name: str, known: Mapping[str, RewardFunction]) -> RewardFunction:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    raise SettingsError(
        f"There is no reward {name!r}.",
        f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(sorted(known))}.",
    )
