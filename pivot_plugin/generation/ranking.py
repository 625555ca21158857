"""Candidates into pairs: scored by rewards, the better against the worse."""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, get_args

from pivot_plugin.choices import PairUp
from pivot_plugin.config import TIME_LIMIT_S
from pivot_plugin.data.layout import IMAGE_MARKER
from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.data.published import scored_completions
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.data.sources import Source
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.rewards import Scorer

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 256


def rank(
    candidates: object,
    rewards: str | Callable[..., object] | Sequence[object] | None = None,
    weights: Sequence[float] | None = None,
    *,
    pair_up: PairUp = "best-worst",
    margin: float = 0.0,
    reward_time_limit: float = TIME_LIMIT_S,
) -> PairDataset:
    """Score candidates and pair the better with the worse.

    Args:
        candidates: questions with a column `completions`, such as `sample` returns, and what the rewards need.
        rewards: names or functions with TRL's signature; None takes the scores that stand in the rows.
        weights: one per reward, 1 each where not given.
        pair_up: "best-worst" makes one pair a question, "best-each" the best against every other, "all" every two.
        margin: pairs whose scores are not further apart than this are left out.
        reward_time_limit: seconds for one call of one reward.

    Returns:
        pairs with `source`, `score_chosen` and `score_rejected`; equal completions are taken once.

    Raises:
        DataError: if no question gives a pair, or a reward needs an answer that is not there.
        TrainingError: if a reward fails, naming it and the row.
        SettingsError: for an unknown reward or option.
    """
    if pair_up not in get_args(PairUp) or margin < 0:
        raise SettingsError(
            f"pair_up is {pair_up!r}, margin {margin}.",
            "Choose best-worst, best-each or all, and a margin of 0 or more.",
        )
    dataset = load_questions(candidates, "candidates")
    score = None if rewards is None else Scorer(rewards, weights, reward_time_limit)
    judges = "scores" if score is None else "+".join(reward.__name__ for reward in score.rewards)
    rows: list[dict[str, Any]] = []
    silent = 0
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        questions = [dataset.plain(position) for position in range(start, min(start + ROWS_AT_ONCE, len(dataset)))]
        for offset, scored in enumerate(_scored_completions(questions, dataset, start, score)):
            made = pairs_of(questions[offset], scored, pair_up, margin, f"rank by {judges}, {pair_up}")
            silent += not made
            rows += made
    logger.info(
        "%d questions gave %d pairs; %d gave none, their candidates scoring alike.", len(dataset), len(rows), silent
    )
    if not rows:
        raise DataError(
            f"None of {len(dataset)} questions has two candidates that score differently by {judges} "
            f"(margin {margin}).",
            "Sample more completions or at a higher temperature, use a finer reward, or lower the margin.",
            "no signal",
        )
    return PairDataset(Source(rows, f"pairs of {dataset.name}", dataset.access))


def _scored_completions(
    questions: Sequence[dict[str, Any]], dataset: QuestionDataset, start: int, score: Scorer | None
) -> list[list[tuple[str, float]]]:
    """For each question its distinct completions with their scores; those that no reward judged are left out."""
    if score is None:
        scored = []
        for offset, question in enumerate(questions):
            try:
                scored.append(list(zip(*scored_completions(question), strict=True)))
            except DataError as error:
                raise DataError(
                    f"{dataset.where(start + offset)}: {error.finding}", error.remedy, error.kind
                ) from error
        return [list(dict(candidates).items()) for candidates in scored]
    texts = [_completions(question, dataset.where(start + offset)) for offset, question in enumerate(questions)]
    owners = [offset for offset, completions in enumerate(texts) for _ in completions]
    flat = [text for completions in texts for text in completions]
    not_for_rewards = {"completions", "prompt", "images"}
    columns = {name: [questions[owner].get(name) for owner in owners] for name in _columns(questions) - not_for_rewards}
    scores = score([questions[owner]["prompt"] for owner in owners], flat, **columns)
    result: list[list[tuple[str, float]]] = [[] for _ in questions]
    for owner, text, value in zip(owners, flat, scores, strict=True):
        if value is not None:
            result[owner].append((text, value))
    return result


def _columns(questions: Sequence[Mapping[str, Any]]) -> set[str]:
    return {name for question in questions for name in question}


def _completions(question: Mapping[str, Any], where: str) -> list[str]:
    texts = question.get("completions")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where} has no list of texts in its column 'completions'.", "Make candidates with preferences.sample."
        )
    # an empty answer cannot stand in a pair
    return [text for text in dict.fromkeys(texts) if text.strip()]


def pairs_of(
    question: Mapping[str, Any], scored: Sequence[tuple[str, float]], pair_up: PairUp, margin: float, source: str
) -> list[dict[str, Any]]:
    """The pairs of one question, in a layout that `load` takes.

    Args:
        question: with `id`, `images`, `prompt`.
        scored: distinct completions with their scores.
        pair_up, margin: as for `rank`.
        source: what the pairs say they come from.
    """
    # an answer that says where an image stands would become one, and no pair holds such an answer
    usable = [candidate for candidate in scored if IMAGE_MARKER not in candidate[0]]
    # a stable order: of equal scores the earlier candidate counts as the better
    order = sorted(usable, key=lambda candidate: -candidate[1])
    if len(order) < 2:
        return []
    if pair_up == "best-worst":
        matched = [(order[0], order[-1])]
    elif pair_up == "best-each":
        matched = [(order[0], other) for other in order[1:]]
    else:
        matched = list(combinations(order, 2))
    far_apart = [(better, worse) for better, worse in matched if better[1] - worse[1] > margin]
    return [
        {
            "id": question["id"] if len(far_apart) == 1 else f"{question['id']}-{number}",
            "images": question["images"],
            "prompt": question["prompt"],
            "chosen": better[0],
            "rejected": worse[0],
            "source": source,
            "score_chosen": better[1],
            "score_rejected": worse[1],
        }
        for number, (better, worse) in enumerate(far_apart)
    ]
