"""How much a completion overlaps with the expected one: BLEU and ROUGE-L of texts, IoU of boxes."""

import re
from collections.abc import Sequence

from pivot_plugin.extras import require

from .answers import expected
from .text import answer_of, completion_text

NUMBERS = re.compile(r"[-+]?\d+(?:\.\d+)?")


def bleu(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """Sentence BLEU of the final answer against the expected one(s), 0 to 1, by sacrebleu with effective order."""
    metric = require("sacrebleu", "rewards", "The reward 'bleu'").BLEU(effective_order=True)
    scores = []
    for completion, answer in zip(completions, expected(columns, len(completions), "bleu"), strict=True):
        references = [str(one) for one in answer] if isinstance(answer, list | tuple) else [str(answer)]
        score = metric.sentence_score(answer_of(completion_text(completion)), references).score
        # a geometric mean of ones may round above one
        scores.append(min(float(score) / 100, 1.0))
    return scores


def rouge_l(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """F-measure of ROUGE-L of the final answer against the best expected one, 0 to 1, by rouge-score."""
    module = require("rouge_score.rouge_scorer", "rewards", "The reward 'rouge_l'")
    scorer = module.RougeScorer(["rougeL"], use_stemmer=False)
    scores = []
    for completion, answer in zip(completions, expected(columns, len(completions), "rouge_l"), strict=True):
        references = [str(one) for one in answer] if isinstance(answer, list | tuple) else [str(answer)]
        found = scorer.score_multi(references, answer_of(completion_text(completion)))
        scores.append(float(found["rougeL"].fmeasure))
    return scores


def box_iou(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """Intersection over union of the last four numbers of the final answer and the expected box (x1, y1, x2, y2)."""
    scores = []
    for completion, answer in zip(completions, expected(columns, len(completions), "box_iou"), strict=True):
        said = _box(answer_of(completion_text(completion)))
        right = _box(" ".join(map(str, answer)) if isinstance(answer, list | tuple) else str(answer))
        scores.append(iou(said, right) if said and right else 0.0)
    return scores


def _box(text: str) -> tuple[float, float, float, float] | None:
    numbers = [float(number) for number in NUMBERS.findall(text)][-4:]
    if len(numbers) < 4:
        return None
    return numbers[0], numbers[1], numbers[2], numbers[3]


def iou(first: tuple[float, float, float, float], second: tuple[float, float, float, float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); a box without area overlaps with nothing."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    if width <= 0 or height <= 0 or min(areas) <= 0 or first[2] < first[0] or second[2] < second[0]:
        return 0.0
    return width * height / (sum(areas) - width * height)
