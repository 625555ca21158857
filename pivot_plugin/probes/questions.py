"""Accuracy on questions about images, by kind of question, with reward functions as judges."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pivot_plugin.data.judging import judge_of_questions
from pivot_plugin.data.questions import load_questions
from pivot_plugin.errors import DataError
from pivot_plugin.generation.engines import TransformersEngine
from pivot_plugin.generation.grading import graded
from pivot_plugin.rewards.guard import Scorer
from pivot_plugin.rewards.lookup import needs_answer

from . import subjects
from .scores import ProbeResult, score_of


def vqa(
    examined: object,
    questions: object,
    *,
    rewards: str | Sequence[Any] = "accuracy",
    by: str = "kind",
    batch_size: int = 32,
    max_new_tokens: int = 64,
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
        device: to run on; by default a GPU where there is one.

    Returns:
        "all" and one score per kind.

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
    was_on, run_on = model.device, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(run_on)
    try:
        answers = list(graded(TransformersEngine(model, processor), scorer, dataset, max_new_tokens, batch_size))
    finally:
        model.to(was_on)
    scores = np.array([score for _, _, score in answers])
    kinds = np.array([str(dataset.plain(position).get(by)) for position in range(len(dataset))])
    results = {"all": score_of(scores)}
    if by in dataset.plain(0):
        results |= {str(kind): score_of(scores[kinds == kind]) for kind in dict.fromkeys(kinds)}
    names = [getattr(judge, "__name__", str(judge)) for judge in judges]
    return ProbeResult("vqa", results, {"questions": len(dataset), "judge": names}, [text for _, text, _ in answers])
