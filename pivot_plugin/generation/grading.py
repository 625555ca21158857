"""Questions asked once, greedily, and their answers judged by rewards."""

from collections.abc import Iterator
from typing import Any, Protocol

from pivot_plugin.rewards.guard import Scorer

from .engines import Engine, Sampling


class Asked(Protocol):
    """Questions with random access, with `prompt`, `images` and the columns that rewards need."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> dict[str, Any]: ...


def graded(
    engine: Engine, scorer: Scorer, questions: Asked, max_new_tokens: int, batch_size: int, seed: int = 0
) -> Iterator[tuple[int, str, float]]:
    """Ask every question and judge the most probable answer.

    Args:
        engine: answers.
        scorer: judges; an answer that no reward judges scores 0.
        questions: with the columns that the rewards need.
        max_new_tokens: longest answer.
        batch_size: questions at once.
        seed: of an engine that draws all the same.

    Returns:
        position, answer and score of each question in turn.
    """
    sampling = Sampling(n=1, temperature=0.0, max_new_tokens=max_new_tokens)
    for start in range(0, len(questions), batch_size):
        rows = [questions[position] for position in range(start, min(start + batch_size, len(questions)))]
        texts = [completions[0] for completions in engine(rows, sampling, seed)]
        messages = [[{"role": "assistant", "content": text}] for text in texts]
        beside = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
        scores = scorer([row["prompt"] for row in rows], messages, **beside)
        for offset, (text, score) in enumerate(zip(texts, scores, strict=True)):
            yield start + offset, text, float(score or 0.0)
