"""A model's own answers as pairs: asked, scored, the better against the worse, and counted. Every part is resumable.

In the folder, where there is one:

    draw-0/candidates.jsonl, scores.jsonl    the answers to every question and their scores, a line a question
    draw-1/ ...                              those of questions whose answers had all scored alike, asked again
    pairs/                                   what `preferences.load` reads
    answers.json                             what the pairs were made with, and what was counted
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.choices import PairUp, Reference
from pivot_plugin.config import TIME_LIMIT_S
from pivot_plugin.data.edited_rows import write_rows
from pivot_plugin.data.edits import is_edited
from pivot_plugin.data.layout import text_of
from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.data.questions import QuestionDataset
from pivot_plugin.data.sources import Source, open_source
from pivot_plugin.data.storage import save
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.files import same_settings, whole_folder, write_whole
from pivot_plugin.rewards import Scorer, completion_text

from .engines import Engine, Sampling
from .kept_lines import KeptLines
from .ranking import pairs_of
from .sampling import instructed, sample

logger = logging.getLogger(__name__)

ANSWERS_FILE = "answers.json"
PAIRS_FOLDER = "pairs"
PAIRS_FILE = "pairs.jsonl"
EXAMPLES = 3
QUESTIONS_AT_ONCE = 64
# of an answer or a question in a printed example
SHOWN = 160


@dataclass(frozen=True)
class OwnAnswers:
    """How a model's own answers become pairs.

    Attributes:
        samples: answers a question.
        temperature, top_p, max_new_tokens: of the sampling, as for `sample`.
        instruction: put behind the last user turn of every question.
        sampling_batch_size: questions asked at once.
        engine: draws the answers, as for `sample`.
        pair_up, margin: as for `rank`.
        reward_weights: one per reward, 1 each where None.
        reward_time_limit: seconds for one call of one reward.
        redraw: how many times questions whose answers all score alike are asked again.
        rounds: how often the model answers and is then trained on its answers.
        reference: what a round's policy is held against: "previous", the model as the round begins; or "first", the
            model before the first round.

    Raises:
        SettingsError: for a value that cannot be.
    """

    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    instruction: str | None = None
    sampling_batch_size: int = 8
    engine: Engine | str | None = None
    pair_up: PairUp = "best-worst"
    margin: float = 0.0
    reward_weights: Sequence[float] | None = None
    reward_time_limit: float = TIME_LIMIT_S
    redraw: int = 0
    rounds: int = 1
    reference: Reference = "previous"

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("redraw", 0), ("rounds", 1), ("sampling_batch_size", 1), ("margin", 0)):
            value = getattr(self, name)
            kinds = (int, float) if name == "margin" else (int,)
            # not a number is not less than anything
            if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
                whole = "" if name == "margin" else ", a whole number"
                raise SettingsError(f"{name} is {value!r}.", f"Give {least} or more{whole}.")
        for name, choices in (("pair_up", get_args(PairUp)), ("reference", get_args(Reference))):
            if getattr(self, name) not in choices:
                raise SettingsError(f"{name} is {getattr(self, name)!r}.", f"Choose {' or '.join(map(repr, choices))}.")
        Sampling(self.samples, self.temperature, self.top_p, self.max_new_tokens)

    def as_dict(self) -> dict[str, Any]:
        """The settings in words that JSON has."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        engine = self.engine
        values["engine"] = (
            engine if isinstance(engine, str | None) else getattr(engine, "__name__", type(engine).__name__)
        )
        return values


# what `optimize` takes by name where a model learns from its own answers
OPTION_NAMES = tuple(field.name for field in fields(OwnAnswers))


@dataclass(frozen=True)
class Example:
    """One pair, to be read.

    Attributes:
        question, chosen, rejected: texts.
        score_chosen, score_rejected: of the answers.
    """

    question: str
    chosen: str
    rejected: str
    score_chosen: float
    score_rejected: float


@dataclass(frozen=True)
class AnswerSummary:
    """What came of asking.

    Attributes:
        questions: asked.
        paired: of them gave a pair.
        alike: gave answers that differ, all of one score (or closer than the margin).
        same: gave one and the same answer every time, or nothing but one that can be judged.
        empty: gave nothing but empty answers.
        redrawn: were asked again at least once, and `won` of them gave a pair then.
        pairs: made.
        score_chosen, score_rejected: means over the pairs.
        examples: a few pairs.
    """

    questions: int
    paired: int
    alike: int
    same: int
    empty: int
    redrawn: int
    won: int
    pairs: int
    score_chosen: float
    score_rejected: float
    examples: tuple[Example, ...] = ()

    @property
    def share(self) -> float:
        """Of the questions, those that gave a pair."""
        return self.paired / self.questions

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "AnswerSummary":
        """What `as_dict` gave."""
        examples = tuple(Example(**example) for example in record["examples"])
        return cls(**{**record, "examples": examples})

    def __str__(self) -> str:
        none = {"score alike": self.alike, "are all the same": self.same, "are empty": self.empty}
        without = ", ".join(f"{count} whose answers {what}" for what, count in none.items() if count)
        lines = [
            f"{self.paired} of {self.questions} questions gave a pair ({100 * self.share:.0f} %)"
            + (f"; none: {without}" if without else "")
            + (f"; asked again {self.redrawn}, of which {self.won} gave one then" if self.redrawn else "")
            + ".",
            f"Mean score of the chosen answers {self.score_chosen:.3f}, of the rejected {self.score_rejected:.3f}.",
        ]
        for number, example in enumerate(self.examples, 1):
            lines += [
                f"Example {number}: {_shown(example.question)}",
                f"  chosen   ({example.score_chosen:.3f}): {_shown(example.chosen)}",
                f"  rejected ({example.score_rejected:.3f}): {_shown(example.rejected)}",
            ]
        return "\n".join(lines)


def pairs_of_own_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: QuestionDataset,
    rewards: Sequence[Callable[..., Any]],
    settings: OwnAnswers,
    folder: Path | None = None,
    seed: int = 0,
) -> tuple[PairDataset, AnswerSummary]:
    """Let a model answer questions, score the answers, and pair the better with the worse.

    Args:
        model: that answers, on the device to use.
        processor: its own.
        questions: with the columns that the rewards need.
        rewards: functions with TRL's signature; they are given completions as messages, as TRL's trainers do.
        settings: how.
        folder: keeps answers, scores and pairs; a second call with the same arguments goes on from there.
        seed: of the sampling.

    Returns:
        the pairs, and what was counted.

    Raises:
        DataError: if no question gives a pair, or the model answers nothing.
        TrainingError: if the engine or a reward fails; what was finished is kept in `folder`.
        SettingsError: if `folder` holds answers of other settings.
    """
    scorer = Scorer(
        [_given_messages(reward) for reward in rewards], settings.reward_weights, settings.reward_time_limit
    )
    maker = _Maker(model, processor, scorer, settings, folder, seed)
    if (finished := maker.finished(questions)) is not None:
        return finished
    judged: dict[int, dict[str, float | None]] = {position: {} for position in range(len(questions))}
    first_lacking: list[int] = []
    for draw in range(1 + settings.redraw):
        lacking = [
            position for position, answers in judged.items() if not maker.pairs(questions.plain(position), answers)
        ]
        if draw == 1:
            first_lacking = lacking
        if not lacking:
            break
        for position, answers in zip(lacking, maker.answers(questions.select(lacking), draw), strict=True):
            judged[position] |= answers
    return maker.keep(questions, judged, first_lacking)


@dataclass(frozen=True)
class _Maker:
    """Makes the pairs of some questions; the fields as `pairs_of_own_answers` documents them."""

    model: PreTrainedModel
    processor: ProcessorMixin
    scorer: Scorer
    settings: OwnAnswers
    folder: Path | None
    seed: int

    @property
    def judges(self) -> str:
        """The rewards in words."""
        return "+".join(reward.__name__ for reward in self.scorer.rewards)

    def recorded(self, questions: QuestionDataset) -> dict[str, Any]:
        """What the pairs depend on beside the model, whose fingerprint the answers keep."""
        # how the rounds are counted changes no answer
        of_run = ("rounds", "reference", "reward_time_limit")
        settings = {name: value for name, value in self.settings.as_dict().items() if name not in of_run}
        return {
            **settings,
            "rewards": self.judges,
            "reward_weights": self.scorer.weights,
            "seed": self.seed,
            "questions": questions.fingerprint(),
        }

    def finished(self, questions: QuestionDataset) -> tuple[PairDataset, AnswerSummary] | None:
        """What an earlier call has made in the folder."""
        if self.folder is None or not (self.folder / ANSWERS_FILE).is_file():
            return None
        record = json.loads((self.folder / ANSWERS_FILE).read_text(encoding="utf-8"))
        same_settings(
            record["settings"],
            self.recorded(questions),
            f"The pairs in {str(self.folder)!r}",
            "Choose another output_dir, delete this one, or use the same settings.",
        )
        summary = AnswerSummary.from_dict(record["summary"])
        logger.info("%d pairs of own answers are made already in %s.", summary.pairs, self.folder)
        return self._kept_pairs(questions), summary

    def _kept_pairs(self, questions: QuestionDataset) -> PairDataset:
        assert self.folder is not None
        source = open_source(str(self.folder / PAIRS_FOLDER))
        return PairDataset(replace(source, name=f"own answers to {questions.name}")).verify()

    def answers(self, questions: QuestionDataset, draw: int) -> list[dict[str, float | None]]:
        """For each question its distinct answers with their scores, None for those that no reward judges."""
        folder = None if self.folder is None else self.folder / f"draw-{draw}"
        settings = self.settings
        candidates = sample(
            self.model,
            questions,
            processor=self.processor,
            n=settings.samples,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            instruction=settings.instruction,
            batch_size=settings.sampling_batch_size,
            seed=self.seed if draw == 0 else self.seed + 7919 * draw,
            engine=settings.engine,
            output_dir=folder,
        )
        depends_on = {name: self.recorded(questions)[name] for name in ("rewards", "reward_weights")}
        path = None if folder is None else folder / "scores.jsonl"
        with KeptLines(path, depends_on, "scores") as kept:
            for start in range(0, len(candidates), QUESTIONS_AT_ONCE):
                positions = range(start, min(start + QUESTIONS_AT_ONCE, len(candidates)))
                self._score([p for p in positions if p not in kept.values], candidates, kept)
            return [
                dict(zip(_distinct(candidates.plain(p)["completions"]), kept.values[p], strict=True))
                for p in range(len(candidates))
            ]

    def _score(self, positions: Sequence[int], candidates: QuestionDataset, kept: KeptLines) -> None:
        rows = [candidates.plain(position) for position in positions]
        texts = [_distinct(row["completions"]) for row in rows]
        # an empty answer cannot stand in a pair, and rewards need not expect one
        owners = [number for number, answers in enumerate(texts) for answer in answers if answer.strip()]
        said = [answer for answers in texts for answer in answers if answer.strip()]
        beside = {name for row in rows for name in row} - {"completions", "prompt", "images"}
        columns = {name: [rows[owner].get(name) for owner in owners] for name in sorted(beside)}
        scores = iter(self.scorer([rows[owner]["prompt"] for owner in owners], said, **columns) if said else [])
        for position, answers in zip(positions, texts, strict=True):
            kept.add(position, [next(scores) if answer.strip() else None for answer in answers])

    def pairs(self, question: Mapping[str, Any], answers: Mapping[str, float | None]) -> list[dict[str, Any]]:
        """The pairs that a question's judged answers give."""
        judged = [(text, score) for text, score in answers.items() if score is not None]
        asked = {**question, "prompt": instructed(dict(question), self.settings.instruction)["prompt"]}
        source = f"own answers ranked by {self.judges}, {self.settings.pair_up}"
        return pairs_of(asked, judged, self.settings.pair_up, self.settings.margin, source)

    def keep(
        self, questions: QuestionDataset, judged: Mapping[int, Mapping[str, float | None]], redrawn: Sequence[int]
    ) -> tuple[PairDataset, AnswerSummary]:
        """Count, and write the pairs."""
        rows: list[dict[str, Any]] = []
        counts = dict.fromkeys(("paired", "alike", "same", "empty", "won"), 0)
        again = set(redrawn)
        for position, answers in judged.items():
            made = self.pairs(questions.plain(position), answers)
            rows += made
            counts[_outcome(made, answers)] += 1
            counts["won"] += bool(made) and position in again
        if not rows:
            raise self._nothing(len(questions), counts)
        summary = AnswerSummary(
            questions=len(questions),
            redrawn=len(redrawn),
            pairs=len(rows),
            score_chosen=sum(row["score_chosen"] for row in rows) / len(rows),
            score_rejected=sum(row["score_rejected"] for row in rows) / len(rows),
            examples=tuple(_example(row) for row in rows[:: max(1, len(rows) // EXAMPLES)][:EXAMPLES]),
            **counts,
        )
        pairs = PairDataset(Source(rows, f"own answers to {questions.name}", questions.access)).verify()
        if self.folder is None:
            return pairs, summary
        built = (
            f"{self.settings.samples} answers a question of the model itself at temperature "
            f"{self.settings.temperature:g}, scored by {self.judges} and paired {self.settings.pair_up}. "
            f"{summary.paired:,} of {summary.questions:,} questions gave {summary.pairs:,} pairs."
        )
        self._write(pairs, self.folder / PAIRS_FOLDER, built)
        record = {"settings": self.recorded(questions), "summary": summary.as_dict()}
        write_whole(self.folder / ANSWERS_FILE, json.dumps(record, indent=1, default=str))
        # as a second run reads them, so that both train on the same rows
        return self._kept_pairs(questions), summary

    def _write(self, pairs: PairDataset, folder: Path, built: str) -> None:
        rows = [pairs.plain(position) for position in range(len(pairs))]
        if not any(is_edited(source) for row in rows for source in row["images"]):
            save(pairs, folder, built)
            return
        # pictures that were made for the questions are made again, and not stored
        with whole_folder(folder) as aside:
            write_rows(rows, aside / PAIRS_FILE, folder, pairs.access, len(rows))

    def _nothing(self, count: int, counts: Mapping[str, int]) -> DataError:
        asked = f"{count} questions, {self.settings.samples} answers each"
        if counts["empty"] == count:
            return DataError(
                f"The model answers nothing: of {asked}, every one is empty.",
                "Look at what it says to one of them (preferences.sample), at its chat template and its end-of-text "
                "token, or give it an instruction=.",
                "no answer",
            )
        found = {"score alike": counts["alike"], "are all the same": counts["same"], "are empty": counts["empty"]}
        listed = ", ".join(f"{number} whose answers {what}" for what, number in found.items() if number)
        return DataError(
            f"No question gave a pair by {self.judges} (margin {self.settings.margin:g}): {asked}; {listed}.",
            "Ask again (redraw=), sample more answers (samples=) or at a higher temperature, or use a finer reward.",
            "no signal",
        )


def _outcome(made: Sequence[object], answers: Mapping[str, float | None]) -> str:
    if made:
        return "paired"
    if not any(answer.strip() for answer in answers):
        return "empty"
    return "alike" if sum(score is not None for score in answers.values()) > 1 else "same"


def _distinct(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _example(row: Mapping[str, Any]) -> Example:
    return Example(
        text_of(row["prompt"]), row["chosen"], row["rejected"], float(row["score_chosen"]), float(row["score_rejected"])
    )


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."


def _given_messages(reward: Callable[..., Any]) -> Callable[..., Any]:
    """A reward that gets completions as messages: what works with objective="grpo" works here."""

    def judged(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        messages = [[{"role": "assistant", "content": completion_text(text)}] for text in completions]
        return reward(prompts=prompts, completions=messages, **columns)

    judged.__name__ = str(getattr(reward, "__name__", type(reward).__name__))
    return judged
