"""Is the answer right: rules that compare a completion's final answer with the expected one, in column `answer`.

`answer` (or `solution`, TRL's name) holds one text, or a list of texts any of which is right.
"""

import logging
import re
import string
from collections.abc import Callable, Sequence
from math import isclose

from pivot_plugin.errors import DataError

from .text import answer_of, completion_text

Compare = Callable[[str, str], float]
ANSWER_COLUMNS = ("answer", "solution")
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?%?")
FRACTION = re.compile(r"\s*([-+]?\d+)\s*/\s*(\d+)\s*")
CHOICE = re.compile(r"\(?([A-Za-z])\)?\s*(?:[.:)\]].*)?", re.DOTALL)
TOLERANCE = 1e-3
ORDER_NUMBER = re.compile(r"\d{1,9}")
# of an order with some numbers in place; arXiv 2509.25190, so that nobody is content with half of it
PARTIAL_CREDIT = 0.2
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def expected(columns: dict[str, object], count: int, reward: str) -> Sequence[object]:
    """The expected answers, one per completion.

    Raises:
        DataError: if there are none, naming the reward that needs them and the first row without one.
    """
    answers = columns.get("answer", columns.get("solution"))
    if not isinstance(answers, Sequence) or isinstance(answers, str) or len(answers) != count:
        raise DataError(
            f"The reward {reward!r} needs an expected answer per question; there is no column 'answer' or 'solution'.",
            "Add a column 'answer', or use a reward that needs none, such as 'format'.",
            "no answer",
        )
    for index, answer in enumerate(answers):
        if answer is None or answer == []:
            raise DataError(
                f"The reward {reward!r} needs an expected answer, and row {index} of its batch has none.",
                "Give every question an 'answer', or leave the question out.",
                "no answer",
            )
    return answers


def _judge(name: str, compare: Compare, completions: Sequence[object], columns: dict[str, object]) -> list[float]:
    scores = []
    for completion, answer in zip(completions, expected(columns, len(completions), name), strict=True):
        given_answer = answer_of(completion_text(completion))
        right = answer if isinstance(answer, list | tuple) else [answer]
        scores.append(max(compare(given_answer, str(one)) for one in right))
    return scores


def normalised(text: str) -> str:
    """A text in lower case, without punctuation, articles and superfluous spaces; as VQA's evaluation does."""
    plain = _ARTICLES.sub(" ", text.casefold().translate(_PUNCTUATION))
    # where nothing but punctuation is said, the punctuation is the answer
    return " ".join(plain.split()) or text.strip()


def as_number(text: str) -> float | None:
    """The number a text is, a fraction and a percentage included; None if it is none or several."""
    if fraction := FRACTION.fullmatch(text):
        return int(fraction[1]) / int(fraction[2]) if int(fraction[2]) else None
    numbers = [match[0] for match in NUMBER.finditer(text.strip().strip("$")) if re.match(r"[-+]?[\d.]", match[0])]
    if len(numbers) != 1:
        return None
    number = float(numbers[0].replace(",", "").rstrip("%"))
    return number / 100 if numbers[0].endswith("%") else number


def choice_of(text: str) -> str | None:
    """The letter of a choice such as "B", "(b)" or "B. a red cat"; None for anything else."""
    match = CHOICE.fullmatch(text.strip())
    return match[1].upper() if match else None


def same_text(answer: str, expected_answer: str) -> float:
    return float(answer.strip() == expected_answer.strip())


def same_normalised(answer: str, expected_answer: str) -> float:
    return float(normalised(answer) == normalised(expected_answer))


def same_choice(answer: str, expected_answer: str) -> float:
    wanted = choice_of(expected_answer)
    return float(wanted is not None and choice_of(answer) == wanted)


def same_number(answer: str, expected_answer: str) -> float:
    """Equal within a relative tolerance of 0.1 %; where one is no plain number, equal to math-verify if installed."""
    first, second = as_number(answer), as_number(expected_answer)
    if first is not None and second is not None:
        return float(isclose(first, second, rel_tol=TOLERANCE, abs_tol=1e-9))
    return _same_formula(answer, expected_answer)


def _same_formula(answer: str, expected_answer: str) -> float:
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError:
        return 0.0
    for name in ("math_verify.parser", "math_verify.grader"):
        # which warn at every call that their time limit is off
        logging.getLogger(name).setLevel(logging.ERROR)
    # its own time limit works with signals, in the main thread alone; `GuardedReward` has one that works everywhere
    parsed = [parse(f"${text}$", parsing_timeout=None) for text in (expected_answer, answer)]
    return float(verify(*parsed, timeout_seconds=None))


def same_answer(answer: str, expected_answer: str) -> float:
    """The rule that the expected answer asks for: of a choice, of a number, else of normalised text."""
    if len(expected_answer.strip(" ().")) == 1 and expected_answer.strip(" ().").isalpha():
        return same_choice(answer, expected_answer)
    if as_number(expected_answer) is not None:
        return max(same_number(answer, expected_answer), same_normalised(answer, expected_answer))
    return same_normalised(answer, expected_answer)


def accuracy(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """1 where the final answer is right, by the rule its kind asks for: choice, number or normalised text."""
    return _judge("accuracy", same_answer, completions, columns)


def exact_match(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """1 where the final answer is the expected text, letter for letter."""
    return _judge("exact_match", same_text, completions, columns)


def normalised_match(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """1 where the final answer is the expected text but for case, punctuation, articles and spaces."""
    return _judge("normalised_match", same_normalised, completions, columns)


def multiple_choice(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """1 where the final answer names the expected letter."""
    return _judge("multiple_choice", same_choice, completions, columns)


def numeric(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """1 where the final answer is the expected number within 0.1 %, or an equal formula."""
    return _judge("numeric", same_number, completions, columns)


def same_order(answer: str, expected_answer: str) -> float:
    """1 for the right order of numbers; for another order of the same numbers a part, by the share of right places."""
    said, right = ([int(number) for number in ORDER_NUMBER.findall(text)] for text in (answer, expected_answer))
    if said == right:
        return 1.0
    if sorted(said) != sorted(right):
        return 0.0
    return PARTIAL_CREDIT * sum(one == other for one, other in zip(said, right, strict=True)) / len(right)


def permutation(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """1 for the expected order of numbers, up to 0.2 for one with some in place. Source: arXiv 2509.25190."""
    return _judge("permutation", same_order, completions, columns)
