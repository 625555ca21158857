"""SPECS: preference pairs that a model makes for itself, right answers in the asked format against broken formats.

Such pairs teach format, not seeing: both answers are right, so nothing in the picture tells them apart. They are made
for a cold start before RL with verifiable rewards. Pairs for a better encoder must differ in something visual: use
`sample` and `rank`.

Source: arXiv 2510.25801, stage 1 (self-distillation).
"""

import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.data.layout import text_of
from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.data.questions import load_questions
from pivot_plugin.data.sources import Source
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.rewards import Scorer, answer_of, reasoning_of
from pivot_plugin.rewards.answers import NUMBER, as_number, choice_of, normalised, same_number
from pivot_plugin.rewards.text import is_well_formed

from .engines import Engine, Sampling, TransformersEngine
from .sampling import instructed, sample

logger = logging.getLogger(__name__)

INSTRUCTION = (
    "First think about the question and the image between <think> and </think>, then give the final answer between "
    "<answer> and </answer>."
)
Kind = Literal["decoupled", "coupled"]
# a text and its score, None where no reward judged it
JudgedAnswer = tuple[str, float | None]
NOTHING_RIGHT, DISAGREEING = "a right answer in the format", "reasoning that agrees with it"
NOTHING_WRONG = "a wrong answer"
LACKING = (NOTHING_RIGHT, DISAGREEING, NOTHING_WRONG)
Judge = Callable[[str, str, str], bool]
Break = Callable[[str], str]


def _without(*tags: str) -> Break:
    pattern = re.compile("|".join(f"</?{tag}>" for tag in tags))
    return lambda text: pattern.sub("", text).strip()


def _think_to_the_end(text: str) -> str:
    return _without("answer")(text).replace("</think>", "").rstrip() + "</think>"


def _answer_in_words(text: str) -> str:
    return text.replace("<answer>", "Answer: ").replace("</answer>", "")


# the paper's five kinds of a broken format
CORRUPTIONS: Mapping[str, Break] = {
    "no tags": _without("think", "answer"),
    "no answer tags": _without("answer"),
    "no think tags": _without("think"),
    "think around all": _think_to_the_end,
    "answer in words": _answer_in_words,
}


def agrees(question: str, reasoning: str, answer: str) -> bool:
    """The judge by rule: whether a reasoning ends where the answer is.

    A choice must be the last letter that the reasoning names as a choice, if it names one; a number the last number in
    it; any other answer must occur in it.

    Args:
        question, reasoning, answer: texts.
    """
    if not reasoning.strip():
        return False
    if as_number(answer) is not None:
        numbers = [match[0] for match in NUMBER.finditer(reasoning) if re.search(r"\d", match[0])]
        return bool(numbers) and bool(same_number(numbers[-1], answer))
    if (letter := choice_of(answer)) is not None:
        named = re.findall(r"\(([A-H])\)|\b([B-H])\b|\b(?:option|choice|answer(?: is)?)\s+([A-H])\b", reasoning)
        return not named or "".join(named[-1]) == letter
    return f" {normalised(answer)} " in f" {normalised(reasoning)} "


def model_judge(model: PreTrainedModel, processor: ProcessorMixin) -> Judge:
    """A judge that asks a model whether reasoning and answer agree, and takes its answer if it begins with yes.

    Args:
        model: any MLLM with a chat template; it is shown no image.
        processor: its own.
    """
    engine = TransformersEngine(model, processor)

    def judge(question: str, reasoning: str, answer: str) -> bool:
        text = (
            f"Question: {question}\nReasoning: {reasoning}\nFinal answer: {answer}\n"
            "Does the reasoning lead to this final answer? Say yes or no."
        )
        row = {"prompt": [{"role": "user", "content": [{"type": "text", "text": text}]}], "images": []}
        verdict = engine([row], Sampling(n=1, temperature=0, max_new_tokens=8), seed=0)[0][0]
        return verdict.strip().casefold().startswith("yes")

    return judge


def self_distill(
    model: PreTrainedModel,
    questions: object,
    *,
    processor: ProcessorMixin,
    base: PreTrainedModel | None = None,
    kind: Kind = "decoupled",
    instruction: str = INSTRUCTION,
    reward: str | Callable[..., object] = "accuracy",
    judge: Judge = agrees,
    proportions: Mapping[str, float] | None = None,
    seed: int = 0,
    engine: Engine | str | None = None,
    output_dir: str | None = None,
    **sampling: Any,
) -> PairDataset:
    """Make pairs from a model's own answers.

    Chosen is the first of its roll-outs that is in the asked format, right, and whose reasoning agrees with its answer.
    Rejected is a right answer whose format is broken in one of five ways ("decoupled"), or a wrong answer whose format
    is broken ("coupled"); from the base model's own roll-outs where it has such, else (decoupled) from the chosen one.
    A roll-out that is out of format by itself stands in as it came where the base has none in the format.

    Args:
        model: after a short GRPO, which the paper finds to follow the format in 97 % of its answers.
        questions: with `answer`.
        processor: of both models.
        base: the model before that; its roll-outs are the rejected ones. None takes `model` for both.
        kind: "decoupled" (the paper's) or "coupled".
        instruction: asks for the format; put behind every question, and kept in the pairs' prompts.
        reward: 1 for a right answer; a name or a function with TRL's signature.
        judge: (question, reasoning, answer) -> whether they agree; `agrees` by default, see `model_judge`.
        proportions: weights of the five ways in `CORRUPTIONS`, equal by default.
        seed: of sampling and of the choice among the five.
        engine, output_dir: as for `sample`; the base's candidates go into a folder `base` below.
        **sampling: `n`, `temperature`, `top_p`, `max_new_tokens`, `batch_size` as for `sample`.

    Returns:
        pairs whose `source` says how each came about.

    Raises:
        DataError: if no question gives a pair, with the counts of what was missing.
        SettingsError: for unknown options or proportions.

    Source:
        arXiv 2510.25801, section on self-distilled preference data.
    """
    weights = _weights(proportions)
    if kind not in ("decoupled", "coupled"):
        raise SettingsError(f"kind is {kind!r}.", "Choose 'decoupled' or 'coupled'.")
    dataset = load_questions(questions)
    settings = {"processor": processor, "instruction": instruction, "engine": engine, **sampling}
    candidates = sample(model, dataset, seed=seed, output_dir=output_dir, **settings)
    of_base = candidates
    if base is not None:
        folder = None if output_dir is None else f"{output_dir}/base"
        of_base = sample(base, dataset, seed=seed + 1, output_dir=folder, **settings)
    maker = _PairMaker(kind, judge, weights, random.Random(seed), "the model" if base is None else "the base model")
    scorer = Scorer(reward)
    rows, lacking = [], dict.fromkeys(LACKING, 0)
    for position in range(len(dataset)):
        question = candidates.plain(position)
        answers = _judged(question, scorer)
        answers_of_base = answers if base is None else _judged(of_base.plain(position), scorer)
        pair = maker(question, answers, answers_of_base)
        if isinstance(pair, str):
            lacking[pair] += 1
            continue
        rows.append(
            {
                "id": question["id"],
                "images": question["images"],
                "prompt": instructed(question, instruction)["prompt"],
                **pair,
            }
        )
    summary = ", ".join(f"{what} {count}" for what, count in lacking.items())
    logger.info("%d questions gave %d %s pairs; lacking: %s.", len(dataset), len(rows), kind, summary)
    if not rows:
        raise DataError(
            f"None of {len(dataset)} questions gave a pair; lacking: "
            f"{', '.join(f'{what} in {count}' for what, count in lacking.items() if count)}.",
            "Train the model on the format first (a short GRPO with rewards=['format', 'accuracy']), or sample more.",
            "no signal",
        )
    return PairDataset(Source(rows, f"pairs of {dataset.name}", dataset.access))


@dataclass(frozen=True)
class _PairMaker:
    """Makes the pair of one question from judged answers.

    Attributes:
        kind, judge: as `self_distill` documents them.
        weights: of the ways in `CORRUPTIONS`.
        rng: draws the way.
        base_name: whose answers the rejected ones are, for `source`.
    """

    kind: Kind
    judge: Judge
    weights: list[float]
    rng: random.Random
    base_name: str

    def __call__(
        self, question: Mapping[str, Any], answers: Sequence[JudgedAnswer], answers_of_base: Sequence[JudgedAnswer]
    ) -> dict[str, str] | str:
        """`chosen`, `rejected` and `source`; or what is lacking, one of `LACKING`."""
        right = [text for text, score in answers if score and is_well_formed(text)]
        prompt = text_of(question["prompt"])
        agreed = [text for text in right if self.judge(prompt, reasoning_of(text), answer_of(text))]
        if not agreed:
            return DISAGREEING if right else NOTHING_RIGHT
        way = self.rng.choices(list(CORRUPTIONS), self.weights)[0]
        decoupled = self.kind == "decoupled"
        usable = [text for text, score in answers_of_base if bool(score) == decoupled and text != agreed[0]]
        if not usable and not decoupled:
            return NOTHING_WRONG
        rejected, how = _broken(usable, agreed[0], way)
        origin = self.base_name if usable else "the chosen answer"
        return {
            "chosen": agreed[0],
            "rejected": rejected,
            "source": f"self-distilled, {self.kind}: {how}, from {origin}",
        }


def _broken(usable: Sequence[str], chosen: str, way: str) -> tuple[str, str]:
    """A text out of format, and how it came to be so."""
    formed = [text for text in usable if is_well_formed(text)]
    unformed = [text for text in usable if text.strip() and not is_well_formed(text)]
    if not formed and unformed:
        return unformed[0], "out of format as sampled"
    return CORRUPTIONS[way](formed[0] if formed else chosen), way


def _weights(proportions: Mapping[str, float] | None) -> list[float]:
    if proportions is None:
        return [1.0] * len(CORRUPTIONS)
    if unknown := sorted(set(proportions) - set(CORRUPTIONS)):
        raise SettingsError(f"proportions names {unknown}.", f"Its keys are {', '.join(map(repr, CORRUPTIONS))}.")
    weights = [float(proportions.get(name, 0)) for name in CORRUPTIONS]
    if min(weights) < 0 or sum(weights) <= 0:
        raise SettingsError(f"proportions are {dict(proportions)}.", "Give weights of 0 or more, one of them above 0.")
    return weights


def _judged(question: Mapping[str, Any], scorer: Scorer) -> list[JudgedAnswer]:
    texts: Sequence[str] = question["completions"]
    beside = {name: [value] * len(texts) for name, value in question.items() if name not in ("completions", "prompt")}
    return list(zip(texts, scorer([question["prompt"]] * len(texts), texts, **beside), strict=True))
