"""The reward that a row itself names, as questions of several makers do."""

from collections.abc import Sequence
from typing import Any, TypeGuard

from pivot_plugin.hooks import named


def by_rule(
    prompts: Sequence[object], completions: Sequence[object], rule: Any, **columns: object
) -> list[float | None]:
    """The reward that each row's column `rule` names, as for questions of several makers."""
    scores: list[float | None] = [None] * len(completions)
    for name in dict.fromkeys(rule):
        of_rule = [position for position, own in enumerate(rule) if own == name]
        function = named("pivot_rewards", name, "reward")
        theirs = {
            column: [values[position] for position in of_rule] if _per_row(values, len(completions)) else values
            for column, values in columns.items()
        }
        judged = function([prompts[i] for i in of_rule], [completions[i] for i in of_rule], **theirs)
        for position, score in zip(of_rule, judged, strict=True):
            scores[position] = score
    return scores


def _per_row(values: object, count: int) -> TypeGuard[Sequence[object]]:
    return isinstance(values, list | tuple) and len(values) == count
