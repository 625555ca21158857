"""Runs that begin with pictures alone: what is made of them, and how its answers are judged."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pivot_plugin.data.questions import QuestionDataset
from pivot_plugin.errors import SettingsError
from pivot_plugin.generation.makers import Making, make

# judges an answer by the rule that its maker gave the question
REWARDS = ["by_rule"]
OPTIONS = ("difficulty", "count")
# of held-out pictures, as many questions as of a held-out share
FEWEST, MOST, SHARE = 32, 1000, 4

Make = str | Sequence[str] | Mapping[str, float] | Making


def making_of(wanted: Make | None, settings: Mapping[str, Any]) -> tuple[Making | None, dict[str, Any]]:
    """What a run makes of pictures, None where it is given rows, and the settings that are left.

    Args:
        wanted: as given to `optimize`.
        settings: the user's, by name; `difficulty` and `count` are of the making, and `seed` is its seed too.

    Raises:
        SettingsError: for an unknown maker, values that cannot be, or options of making where nothing is made.
    """
    given = {name: settings[name] for name in OPTIONS if name in settings}
    left = {name: value for name, value in settings.items() if name not in OPTIONS}
    if wanted is None:
        if given:
            raise SettingsError(
                f"{next(iter(given))} is given, and nothing is made.", 'Give make=, such as make="jigsaw", or leave it.'
            )
        return None, left
    if isinstance(wanted, Making):
        if given:
            raise SettingsError(
                f"{next(iter(given))} is given beside a Making, which has its own.", "Give it in one of the two."
            )
        return wanted, left
    seed = settings.get("seed", 0)
    return Making(wanted, seed=seed if isinstance(seed, int) else 0, **given), left


def made_questions(pictures: object, making: Making) -> QuestionDataset:
    """The questions to train on.

    Args:
        pictures: as for `preferences.make`.
        making: what to make of them.

    Raises:
        DataError: as `preferences.make`.
    """
    made = make(pictures, making)
    assert isinstance(made, QuestionDataset)
    return made


def held_out_questions(pictures: object, making: Making, trained_on: int) -> QuestionDataset:
    """Questions of held-out pictures: a quarter of those trained on, 32 to 1000.

    Args:
        pictures: as for `preferences.make`.
        making: what is made of those trained on.
        trained_on: how many questions.

    Raises:
        DataError: as `preferences.make`.
    """
    count = min(max(trained_on // SHARE, FEWEST), MOST)
    return made_questions(pictures, replace(making, count=count, seed=making.seed + 1))
