"""How much a model explores: does it find an answer in k tries, and how many ways does it see at each token."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.data.judging import judge_of_questions
from pivot_plugin.data.questions import load_questions
from pivot_plugin.errors import SettingsError
from pivot_plugin.generation.engines import Sampling, TransformersEngine


def pass_at_k(correct: Sequence[int], samples: int | Sequence[int], k: int) -> float:
    """Share of problems that one of k samples solves, without bias: the mean of 1 - C(n - c, k) / C(n, k).

    Args:
        correct: c of each problem, how many of its samples are right.
        samples: n of each problem, or of all.
        k: samples that count; at most n.

    Raises:
        SettingsError: if k, c and n do not go together, or there are no problems.

    Source:
        Chen et al. 2021 (HumanEval), equation 1.
    """
    counts = [samples] * len(correct) if isinstance(samples, int) else list(samples)
    if (
        not correct
        or len(counts) != len(correct)
        or any(not (0 <= c <= n and 1 <= k <= n) for c, n in zip(correct, counts, strict=True))
    ):
        raise SettingsError(
            f"pass@{k} of {len(correct)} problems with {samples} samples cannot be computed.",
            "Give 0 <= correct <= samples for each problem, and 1 <= k <= samples.",
        )
    failures = [math.comb(n - c, k) / math.comb(n, k) for c, n in zip(correct, counts, strict=True)]
    return 1 - math.fsum(failures) / len(failures)


def candidate_set_sizes(logits: torch.Tensor, top_p: float = 0.95) -> torch.Tensor:
    """How many of the most probable tokens it takes to hold a share of the probability mass.

    Args:
        logits: (..., V) unnormalised log-probabilities.
        top_p: the share.

    Returns:
        (...) integers, at least 1.
    """
    ordered = logits.float().softmax(dim=-1).sort(dim=-1, descending=True).values
    # a token belongs to the set if those before it do not hold the share yet
    before = ordered.cumsum(dim=-1) - ordered
    return (before < top_p).sum(dim=-1).clamp(min=1)


def rollout_branching_factor(
    model: PreTrainedModel,
    questions: object,
    *,
    processor: ProcessorMixin,
    n: int = 8,
    temperature: float = 1.0,
    max_new_tokens: int = 512,
    top_p: float = 0.95,
    batch_size: int = 8,
    seed: int = 0,
) -> float:
    """Mean size of the top-p candidate set over the tokens of a model's own roll-outs.

    Args:
        model, questions, processor, n, temperature, max_new_tokens, batch_size, seed: as for `preferences.sample`.
        top_p: share of probability mass that the candidates hold, at temperature 1.

    Raises:
        DataError: for questions that cannot be used.

    Source:
        arXiv 2508.07534.
    """
    dataset = load_questions(questions).verify(judge=judge_of_questions(processor))
    engine = TransformersEngine(model, processor)
    sampling = Sampling(n, temperature, 1.0, max_new_tokens)
    total = tokens = 0
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[position] for position in range(start, min(start + batch_size, len(dataset)))]
        for logits, generated in engine.steps(rows, sampling, seed + start):
            sizes = candidate_set_sizes(logits, top_p)
            total += int(sizes[generated].sum())
            tokens += int(generated.sum())
    return total / tokens
