"""Accuracy on questions about images, by kind of question, with reward functions as judges, and without the images.

An answer may be right because of what the question says, or of what answers are like. So every question is asked three
times: with its picture, with another row's, and with the picture's mean colour. What needs the picture is what is
right with it and wrong without.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pivot_plugin.data.blind import Without, WithoutPicture
from pivot_plugin.data.judging import judge_of_questions
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.errors import DataError
from pivot_plugin.generation.engines import TransformersEngine
from pivot_plugin.generation.grading import Asked, graded
from pivot_plugin.rewards.guard import Scorer
from pivot_plugin.rewards.lookup import needs_answer

from . import subjects
from .scores import BLIND, SEEN, ProbeResult, is_right_or_wrong, mcnemar, score_of

logger = logging.getLogger(__name__)


def vqa(
    examined: object,
    questions: object,
    *,
    rewards: str | Sequence[Any] = "accuracy",
    by: str = "kind",
    batch_size: int = 32,
    max_new_tokens: int = 64,
    without: Sequence[Without] = ("other", "mean"),
    device: str | torch.device | None = None,
) -> ProbeResult:
    """Ask an MLLM questions, take its most probable answers, and judge them.

    Args:
        examined: an MLLM, as for `features`.
        questions: as for `preferences.load_questions`, with what the judge needs (`answer`).
        rewards: the judge: a reward by name, a function with TRL's signature, or several, averaged.
        by: column whose values are scored apart too, where there is one.
        batch_size: questions at once.
        max_new_tokens: longest answer.
        without: what pictures are replaced by to ask again; () asks with the picture alone.
        device: to run on; by default a GPU where there is one.

    Returns:
        "all" and one score per kind; and for each of them, behind its name, "/other-picture" and "/mean-colour", the
        score with the picture replaced, and "/needs-picture", by how much the score with the picture is above the
        better of the two (right with it and wrong without, where answers are right or wrong). The settings have
        McNemar's exact p of being right as often without, for each replacement.

    Raises:
        DataError: for questions that cannot be used.
        ModelError: for an encoder by itself.
    """
    subject = subjects.subject(examined)
    model, processor = subject.mllm("VQA")
    dataset = load_questions(questions).verify(judge=judge_of_questions(processor))
    if not len(dataset):
        raise DataError("There are no questions.", "Give at least one.")
    judges = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
    scorer = Scorer(judges, [1 / len(judges)] * len(judges))
    needs_answer([reward.function for reward in scorer.rewards], dataset)
    asked: dict[str, Asked] = {"": dataset, **_blinded(dataset, without)}
    was_on, run_on = model.device, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(run_on)
    try:
        engine = TransformersEngine(model, processor)
        answers = {how: list(graded(engine, scorer, rows, max_new_tokens, batch_size)) for how, rows in asked.items()}
    finally:
        model.to(was_on)
    samples = {how: np.array([score for _, _, score in of]) for how, of in answers.items()}
    settings = {"questions": len(dataset), "judge": [getattr(judge, "__name__", str(judge)) for judge in judges]}
    if len(samples) > 1:
        blind = np.max([values for how, values in samples.items() if how], axis=0)
        samples[SEEN] = np.maximum(samples[""] - blind, 0.0)
        settings["p of being right as often without the picture"] = {
            how: mcnemar(samples[""], samples[how])
            for how in asked
            if how and is_right_or_wrong(samples[""]) and is_right_or_wrong(samples[how])
        }
    kinds = np.array([str(dataset.plain(position).get(by)) for position in range(len(dataset))])
    rows_of = {"all": np.ones(len(dataset), dtype=bool)}
    if by in dataset.plain(0):
        rows_of |= {str(kind): kinds == kind for kind in dict.fromkeys(kinds)}
    results = {
        f"{kind}/{how}" if how else kind: score_of(values[rows])
        for how, values in samples.items()
        for kind, rows in rows_of.items()
    }
    return ProbeResult("vqa", results, settings, [text for _, text, _ in answers[""]])


def _blinded(dataset: QuestionDataset, without: Sequence[Without]) -> dict[str, Asked]:
    """The questions without their pictures, by how these are replaced, in the words of `BLIND`."""
    if not any(dataset.image_keys):
        return {}
    blinded: dict[str, Asked] = {}
    for how in without:
        try:
            blinded[BLIND.get(how, how)] = WithoutPicture(dataset, how)
        except DataError as error:
            logger.warning("%s That control is left out.", error.finding)
    return blinded
