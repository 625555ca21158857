"""Verifiable rewards with TRL's signature, by name through the hook `pivot_rewards`: for ranking and for GRPO alike."""

from .guard import GuardedReward, Scorer, combine
from .lookup import available, needs_answer, resolve_rewards
from .text import answer_of, completion_text, reasoning_of

__all__ = [
    "GuardedReward",
    "Scorer",
    "answer_of",
    "available",
    "combine",
    "completion_text",
    "needs_answer",
    "reasoning_of",
    "resolve_rewards",
]
