"""Layouts of published preference sets, offered through the same hook as anyone's.

RLAIF-V (openbmb/RLAIF-V-Dataset) and MMPR (OpenGVLab/MMPR) name the prompt `question`; some sets say `reject`. The rest
of a row is as TRL has it.
"""

from collections.abc import Mapping

from pivot_plugin.hooks import hookimpl
from pivot_plugin.types import Layout

ALIASES = {"prompt": "question", "rejected": "reject"}


@hookimpl
def pivot_preference_layout(columns: list[str]) -> Layout | None:
    renamed = {
        alias: name
        for name, alias in ALIASES.items()
        if alias in columns and name not in columns and "chosen" in columns
    }
    if not renamed:
        return None

    def layout(row: Mapping[str, object]) -> Mapping[str, object]:
        return {renamed.get(name, name): value for name, value in row.items()}

    return layout
