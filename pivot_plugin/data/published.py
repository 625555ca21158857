"""Layouts of published preference sets, offered through the same hook as anyone's.

aliases      RLAIF-V (openbmb/RLAIF-V-Dataset) and MMPR (OpenGVLab/MMPR) say `question`, some sets say `reject`
in a string  RLHF-V keeps question, chosen and rejected as JSON in its column `text`
scored       n completions with a score each; the best and the worst become the pair. VLFeedback
             (MMInstruction/VLFeedback) rates each by several aspects, whose mean is its score
ranked       candidates in a list, best first; the first and the last become the pair
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pivot_plugin.errors import DataError, foreign_code
from pivot_plugin.hooks import hookimpl
from pivot_plugin.hooks.types import Layout

from .jsonlines import parsed
from .layout import shortened

ALIASES = {"prompt": "question", "rejected": "reject"}
COMPLETIONS = ("completions", "responses", "candidates")
SCORES = ("scores", "ratings")
TEXT_NAMES = ("response", "text", "completion", "content")
SCORE_NAMES = ("score", "rating", "overall_score")


@hookimpl
def pivot_preference_layout(columns: list[str], example: Mapping[str, object]) -> Layout | None:
    if "chosen" in columns:
        return _aliases(columns)
    if "ranked" in columns:
        return _ranked
    if any(name in columns for name in COMPLETIONS):
        return _scored
    if isinstance(text := example.get("text"), str) and text.lstrip().startswith("{") and '"chosen"' in text:
        return _in_a_string
    return None


def _aliases(columns: list[str]) -> Layout | None:
    renamed = {alias: name for name, alias in ALIASES.items() if alias in columns}
    if not renamed or not ("rejected" in columns or "rejected" in renamed.values()):
        return None

    def layout(row: Mapping[str, object]) -> Mapping[str, object]:
        read = dict(row)
        for alias, name in renamed.items():
            value = read.pop(alias, None)
            # where both are there, whichever comes first in the row, its own name wins
            if read.get(name) is None:
                read[name] = value
        return read

    return layout


def _in_a_string(row: Mapping[str, object]) -> Mapping[str, object]:
    with foreign_code("The column text is not JSON", "Give question, chosen and rejected in it."):
        text = parsed(str(row.get("text")))
    if not isinstance(text, Mapping):
        raise DataError(f"The column text holds a {type(text).__name__}.", "Give question, chosen, rejected in it.")
    return {**row, "prompt": text.get("question"), "chosen": text.get("chosen"), "rejected": text.get("rejected")}


def _ranked(row: Mapping[str, object]) -> Mapping[str, object]:
    ranked = row.get("ranked")
    if not isinstance(ranked, Sequence) or isinstance(ranked, str) or len(ranked) < 2:
        raise DataError(
            f"ranked is {type(ranked).__name__} {str(ranked)[:60]!r}.",
            "Give a list of two or more answers, best first.",
        )
    return _prompted(row) | {"chosen": ranked[0], "rejected": ranked[-1]}


def _scored(row: Mapping[str, object]) -> Mapping[str, object]:
    texts, scores = scored_completions(row)
    best = max(range(len(texts)), key=lambda index: scores[index])
    worst = min(range(len(texts)), key=lambda index: scores[index])
    if scores[best] == scores[worst]:
        raise DataError(f"All {len(texts)} completions have the score {scores[best]}.", "Drop the row.", "no signal")
    return _prompted(row) | {
        "chosen": texts[best],
        "rejected": texts[worst],
        "score_chosen": scores[best],
        "score_rejected": scores[worst],
    }


def _prompted(row: Mapping[str, object]) -> dict[str, object]:
    return dict(row) | {"prompt": row["prompt"] if row.get("prompt") is not None else row.get("question")}


def scored_completions(row: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    """The completions of a row and their scores, in whichever of the known forms they stand.

    Raises:
        DataError: if there are none, or not one score for each.
    """
    completions = next((row[name] for name in COMPLETIONS if row.get(name) is not None), None)
    if isinstance(completions, Mapping):
        # datasets keeps a list of records as a record of lists
        lists = {name: values for name, values in completions.items() if isinstance(values, list)}
        length = max((len(values) for values in lists.values()), default=0)
        completions = [
            {name: values[index] for name, values in lists.items() if index < len(values)} for index in range(length)
        ]
    if not isinstance(completions, list) or len(completions) < 2:
        raise DataError("A row has fewer than two completions.", "Give a list of completions with a score each.")
    scores = next((row[name] for name in SCORES if row.get(name) is not None), None)
    if scores is None:
        scores = [_score_of(completion) for completion in completions]
    texts = [_text_of(completion) for completion in completions]
    if not isinstance(scores, list) or len(scores) != len(texts):
        count = len(scores) if isinstance(scores, list) else type(scores).__name__
        raise DataError(f"A row has {len(texts)} completions and {count} scores.", "Give one score per completion.")
    return texts, [_as_score(score) for score in scores]


def _text_of(completion: object) -> str:
    if isinstance(completion, Mapping):
        completion = next((completion[name] for name in TEXT_NAMES if isinstance(completion.get(name), str)), None)
    if not isinstance(completion, str):
        raise DataError(
            f"A completion is a {type(completion).__name__}.", f"Give text, or a record with {' or '.join(TEXT_NAMES)}."
        )
    return completion


def _score_of(completion: object) -> object:
    if not isinstance(completion, Mapping):
        return None
    for name in SCORE_NAMES:
        if completion.get(name) is not None:
            return completion[name]
    aspects = completion.get("annotations")
    ratings = (
        [aspect.get("Rating") for aspect in (aspects or {}).values() if isinstance(aspect, Mapping)]
        if (isinstance(aspects, Mapping))
        else []
    )
    rated = [_as_score(rating) for rating in ratings if rating not in (None, "N/A")]
    return sum(rated) / len(rated) if rated else None


def _as_score(score: object) -> float:
    try:
        number = float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"A score is {type(score).__name__} {shortened(score)}.", "Give a number per completion.")
    return number
