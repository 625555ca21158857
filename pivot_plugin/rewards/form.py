"""How a completion is written, whatever it says: its format and its length."""

from collections.abc import Sequence

from .text import completion_text, is_well_formed

# Characters below which a completion is not penalised, and the length at which it is fully. Characters, since a reward
# by name sees texts and no tokenizer; TRL's `get_soft_overlong_punishment` counts tokens, is made for a length, and can
# be given as a function.
FREE_LENGTH, FULL_LENGTH = 2000, 8000


def format(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """1 for <think>...</think><answer>...</answer>, each tag once, and nothing else. Source: arXiv 2510.25801."""
    return [float(is_well_formed(completion_text(completion))) for completion in completions]


def length_penalty(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """0 up to 2000 characters, falling in a straight line to -1 at 8000."""
    lengths = [len(completion_text(completion)) for completion in completions]
    return [-min(max((length - FREE_LENGTH) / (FULL_LENGTH - FREE_LENGTH), 0.0), 1.0) for length in lengths]
