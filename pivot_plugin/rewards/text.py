"""What a completion says: its text, its reasoning, and its final answer."""

import re
from collections.abc import Mapping, Sequence

THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
BOXED = re.compile(r"\\boxed\s*{")
WELL_FORMED = re.compile(
    r"\s*<think>(?:(?!</?(?:think|answer)>).)*</think>\s*<answer>(?:(?!</?(?:think|answer)>).)*</answer>\s*", re.DOTALL
)
SAID = re.compile(r"(?:final answer|answer)\s*(?:is|:)\s*(.+)", re.IGNORECASE)


def completion_text(completion: object) -> str:
    """The text of a completion: text, or messages with text or structured content."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        return completion_text(completion.get("content", completion.get("text", "")))
    if isinstance(completion, Sequence):
        return "".join(completion_text(part) for part in completion)
    return "" if completion is None else str(completion)


def answer_of(text: str) -> str:
    """The final answer of a completion.

    In <answer> tags, in \\boxed{}, behind "the answer is" or "Answer:", or the whole text, whichever comes first in
    this list; of several, the last.
    """
    if tagged := ANSWER.findall(text):
        return str(tagged[-1]).strip()
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    after = re.split(r"</think>", text)[-1] if "</think>" in text else text
    if announced := SAID.findall(after):
        return str(announced[-1]).strip().rstrip(".").strip()
    return re.sub(r"</?(?:think|answer)>", "", after).strip()


def _last_boxed(text: str) -> str | None:
    starts = list(BOXED.finditer(text))
    if not starts:
        return None
    begin = starts[-1].end()
    depth = 1
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index].strip()
    return None


def reasoning_of(text: str) -> str:
    """What stands in <think> tags, or "" where nothing does."""
    return " ".join(part.strip() for part in THINK.findall(text))


def is_well_formed(text: str) -> bool:
    """Whether a completion is <think>...</think><answer>...</answer>, each tag once, and nothing else."""
    return WELL_FORMED.fullmatch(text) is not None
