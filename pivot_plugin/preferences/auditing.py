"""An audit of pairs before anybody pays for them: what a model makes of each, with its picture and without.

A few forest passes tell of every pair

    margin                 log p(chosen) - log p(rejected), with the picture
    blind margins          the same with another row's picture, and with the picture's mean colour
    picture's share        how far the picture moves the margin: the margin less the mean of the blind ones
    gap to own answers     how much less probable, per token, an answer is than what the model says itself
    margin of pictures     how much less probable the chosen answer is about the pair's rejected pictures
    word margin            what the words of the other pairs' answers say: log-odds of being chosen, by counting alone

The last asks no model. What it tells apart can be learnt without looking, though the model does not guess it yet. Where
chosen and rejected answer are one, the margin is that of the pictures.

All in nats (natural logarithm). A pair with a high margin is told apart already; one that both blind margins tell apart
can be guessed; answers far from the model's own are another model's words.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.data.blind import Without, WithoutPicture, without_rejected
from pivot_plugin.data.layout import text_of
from pivot_plugin.data.pairs import PairDataset, load_pairs
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.files import write_whole
from pivot_plugin.generation.engines import Sampling, TransformersEngine
from pivot_plugin.models.find import check_processor, find_adapter
from pivot_plugin.models.loading import load_model
from pivot_plugin.training.batch import ForestBatch, ForestCollator
from pivot_plugin.training.forest_check import read_rows, varied_rows
from pivot_plugin.training.forward import ForestReading, answering
from pivot_plugin.training.image_terms import about_rejected

AUDIT_FILE = "audit.json"
BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
BINS = 24
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class PairAudit:
    """What a model makes of one pair; log-probabilities are natural logarithms.

    Attributes:
        id: of the pair.
        pictures: whether it shows any.
        margin: log p(chosen) - log p(rejected), summed over tokens.
        margin_other, margin_mean: the same with another row's picture and with the picture's mean colour; None for a
            pair without pictures, and `margin_other` where all pairs show one picture.
        chosen, rejected, own: log-probability per token of both answers and of the model's own, most probable one.
        own_answer: that one.
        word_margin: log-odds of the chosen answer's words less those of the rejected one's, by how often each stands in
            chosen and in rejected answers of all other pairs.
        image_margin: log p(chosen) with the picture less log p(chosen) with the rejected one; None without such.
    """

    id: str
    pictures: bool
    margin: float
    margin_other: float | None
    margin_mean: float | None
    chosen: float
    rejected: float
    own: float
    own_answer: str
    word_margin: float
    image_margin: float | None = None

    @property
    def _blind(self) -> list[float]:
        return [margin for margin in (self.margin_other, self.margin_mean) if margin is not None]

    @property
    def blind_margin(self) -> float | None:
        """The mean of the margins without the picture, None for a pair without pictures."""
        return float(np.mean(self._blind)) if self._blind else None

    @property
    def guessable(self) -> bool | None:
        """Whether the pair is told apart without its picture, whatever replaces it; None for one without pictures."""
        return min(self._blind) > 0 if self._blind else None

    @property
    def picture_share(self) -> float | None:
        """How far the picture moves the margin, None for a pair without pictures."""
        return None if self.blind_margin is None else self.margin - self.blind_margin

    @property
    def chosen_gap(self) -> float:
        """How much less probable the chosen answer is than the model's own, per token."""
        return self.own - self.chosen

    @property
    def rejected_gap(self) -> float:
        """How much less probable the rejected answer is than the model's own, per token."""
        return self.own - self.rejected


@dataclass(frozen=True)
class AuditReport:
    """What a model makes of some pairs.

    Attributes:
        pairs: an audit each, in the order of the data.
        data: fingerprint of the pairs.
        name: of the data.
    """

    pairs: Sequence[PairAudit]
    data: str
    name: str

    def column(self, name: str) -> np.ndarray:
        """(n,) one number of every pair that has it; see `PairAudit`."""
        values = [getattr(pair, name) for pair in self.pairs]
        return np.array([value for value in values if value is not None], dtype=np.float64)

    def summary(self) -> dict[str, float]:
        """Shares of the pairs and medians; of pictures where there are any."""
        margin, guessable, share = (self.column(name) for name in ("margin", "guessable", "picture_share"))
        numbers = {
            "pairs": float(len(self.pairs)),
            "with pictures": float(self.column("pictures").sum()),
            "told apart": float((margin > 0).mean()),
            "median margin": float(np.median(margin)),
            "told apart by words": float((self.column("word_margin") > 0).mean()),
        }
        if len(guessable):
            numbers |= {
                "guessed without the picture": float(guessable.mean()),
                "moved up by the picture": float((share > 0).mean()),
                "median share of the picture": float(np.median(share)),
            }
        if len(of_images := self.column("image_margin")):
            numbers |= {
                "with rejected pictures": float(len(of_images)),
                "pictures told apart": float((of_images > 0).mean()),
                "median margin of pictures": float(np.median(of_images)),
            }
        return numbers | {
            "median gap of the chosen answer": float(np.median(self.column("chosen_gap"))),
            "median gap of the rejected answer": float(np.median(self.column("rejected_gap"))),
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "data": self.data,
            "summary": self.summary(),
            "pairs": [asdict(pair) for pair in self.pairs],
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, as a whole or not at all.

        Args:
            path: of the file, or a folder, which gets `audit.json`.
        """
        path = Path(path) / AUDIT_FILE if Path(path).is_dir() else Path(path)
        write_whole(path, json.dumps(self.as_dict(), indent=1))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "AuditReport":
        """What `save` wrote.

        Raises:
            DataError: if it is no audit.
        """
        path = Path(path) / AUDIT_FILE if Path(path).is_dir() else Path(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls([PairAudit(**pair) for pair in record["pairs"]], record["data"], record["name"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{str(path)!r} is no audit: {error}", "Write one by pivot prefs audit -o.") from error

    def words(self) -> list[str]:
        """The summary in sentences."""
        told = self.summary()
        count = len(self.pairs)
        lines = [
            f"{count} pairs ({self.name}), {int(told['with pictures'])} with pictures.",
            f"{100 * told['told apart']:.0f} % are told apart already (margin above 0; median "
            f"{told['median margin']:+.2f} nats).",
        ]
        if "median share of the picture" in told:
            lines += [
                f"{100 * told['guessed without the picture']:.0f} % of those with pictures are told apart without "
                "theirs, both by another row's and by the mean colour: these can be guessed.",
                f"The picture moves the margin up in {100 * told['moved up by the picture']:.0f} % (median "
                f"{told['median share of the picture']:+.2f} nats).",
            ]
        else:
            lines.append("Without pictures nothing here can teach a vision tower.")
        if "pictures told apart" in told:
            lines.append(
                f"Of {int(told['with rejected pictures'])} with rejected pictures, "
                f"{100 * told['pictures told apart']:.0f} % have a chosen answer that is more probable with the true "
                f"one already (median {told['median margin of pictures']:+.2f} nats)."
            )
        return [
            *lines,
            f"{100 * told['told apart by words']:.0f} % are told apart by the words of the other pairs' answers alone "
            "(half of them would be by chance): that much can be learnt without looking.",
            f"Per token, chosen answers are {told['median gap of the chosen answer']:.2f} nats less probable than the "
            f"model's own, rejected ones {told['median gap of the rejected answer']:.2f} (medians).",
        ]

    def __str__(self) -> str:
        margins = self.column("margin")
        rows = {"with the picture": margins}
        rows |= {
            title: values
            for title, name in (("another picture", "margin_other"), ("mean colour", "margin_mean"))
            if len(values := self.column(name))
        }
        together = np.concatenate(list(rows.values()))
        # the outermost hundredth would stretch the axis
        low, high = np.quantile(together, [0.01, 0.99]) if len(together) > 1 else (together[0], together[0])
        edges = np.linspace(min(low, 0.0) - 1e-6, max(high, 0.0) + 1e-6, BINS + 1)
        drawn = [
            f"  {title:<17} {_bars(np.histogram(values.clip(edges[0], edges[-1]), edges)[0])}"
            for title, values in rows.items()
        ]
        axis = f"  {'margin (nats)':<17} {edges[0]:<+8.1f}{edges[-1]:>+{BINS - 8}.1f}"
        return "\n".join([*self.words(), *drawn, axis])


def _bars(counts: np.ndarray) -> str:
    highest = max(int(counts.max()), 1)
    # what is there at all is seen
    return "".join(BARS[0] if not count else BARS[max(1, round(8 * count / highest))] for count in counts.tolist())


class _Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> dict[str, Any]: ...


def audit(
    model: PreTrainedModel | str | Path,
    pairs: object,
    *,
    processor: ProcessorMixin | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    limit: int | None = None,
    device: str | torch.device | None = None,
) -> AuditReport:
    """Look at what a model makes of pairs, before it is trained on them.

    Args:
        model: the MLLM that would be trained, or its folder or Hub id.
        pairs: as for `load`, with random access.
        processor: the model's; found by its name where None.
        batch_size: pairs at once.
        max_new_tokens: of the model's own answer.
        limit: look at the first so many alone.
        device: to run on; by default a GPU where there is one. The model is put back.

    Raises:
        DataError: for pairs that cannot be used.
        ModelError: for a model that cannot be.
        SettingsError: for a batch or limit below 1.
    """
    if batch_size < 1 or max_new_tokens < 1 or (limit is not None and limit < 1):
        raise SettingsError(
            f"batch_size is {batch_size}, max_new_tokens {max_new_tokens}, limit {limit}.", "Give 1 or more of each."
        )
    rows = load_pairs(pairs).verify()
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    model, processor = load_model(model, processor)
    adapter = find_adapter(model)
    check_processor(model, processor, adapter)
    was_on = model.device
    model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    try:
        own_answers = _own_answers(TransformersEngine(model, processor), rows, batch_size, max_new_tokens)
        reading = read_rows(model, adapter, processor, varied_rows(rows))
        scorer = _PairScorer(model, adapter, processor, reading, batch_size)
        seen = scorer(_Asked(rows), "with their pictures")
        elsewhere = _Elsewhere(rows)
        of_others = dict(zip(elsewhere.positions, scorer(elsewhere, "rejected pictures").summed[0], strict=True))
        own = scorer(_Answered(rows, own_answers), "own answers")
        blind = {how: scorer(without, f"without ({how})") for how, without in _without(rows).items()}
    finally:
        model.to(was_on)
    shows = [bool(key) for key in rows.image_keys]
    words = word_margins(
        [(text_of(row["chosen"]), text_of(row["rejected"])) for row in map(rows.plain, range(len(rows)))]
    )
    margins = {how: scores.margins for how, scores in blind.items()}
    audits = [
        PairAudit(
            id=str(rows.plain(position).get("id")),
            pictures=shows[position],
            margin=float(seen.margins[position]),
            margin_other=float(margins["other"][position]) if shows[position] and "other" in margins else None,
            margin_mean=float(margins["mean"][position]) if shows[position] and "mean" in margins else None,
            chosen=float(seen.per_token[0, position]),
            rejected=float(seen.per_token[1, position]),
            own=float(own.per_token[0, position]),
            own_answer=own_answers[position],
            word_margin=float(words[position]),
            image_margin=float(seen.summed[0, position] - of_others[position]) if position in of_others else None,
        )
        for position in range(len(rows))
    ]
    return AuditReport(audits, rows.fingerprint(), rows.name)


def word_margins(answers: Sequence[tuple[str, str]]) -> np.ndarray:
    """(n,) log-odds of being chosen, chosen less rejected, by the words of all other pairs.

    Naive Bayes over counts of words, each plus one.

    Args:
        answers: chosen and rejected of every pair.
    """
    words = [tuple(Counter(WORD.findall(text.casefold())) for text in pair) for pair in answers]
    totals: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for pair in words:
        for total, counted in zip(totals, pair, strict=True):
            total.update(counted)
    margins = []
    for chosen, rejected in words:
        odds = {
            word: np.log((totals[0][word] - chosen[word] + 1) / (totals[1][word] - rejected[word] + 1))
            for word in chosen | rejected
        }
        margins.append(sum(odds[word] * (chosen[word] - rejected[word]) for word in odds))
    return np.array(margins, dtype=np.float64)


def keep(
    pairs: object,
    audited: AuditReport,
    *,
    margin_below: float | None = None,
    margin_above: float | None = None,
    blind_margin_below: float | None = None,
    picture_share_above: float | None = None,
    chosen_gap_below: float | None = None,
    word_margin_below: float | None = None,
) -> PairDataset:
    """The pairs that an audit finds fit.

    Args:
        pairs: those that were audited, in the same order.
        audited: by `audit`.
        margin_below: leave out those that are told apart by as much already.
        margin_above: leave out those that are told apart the wrong way by more.
        blind_margin_below: leave out those that are told apart by as much without the picture.
        picture_share_above: leave out those whose picture moves the margin by no more.
        chosen_gap_below: leave out those whose chosen answer is, per token, by as much less probable than the model's
            own answer.
        word_margin_below: leave out those that words alone tell apart by as much.

    Raises:
        DataError: if the audit is of other pairs, or nothing is left, with what each bound leaves.
        SettingsError: without any bound.
    """
    rows = load_pairs(pairs).verify()
    if len(rows) != len(audited.pairs) or rows.fingerprint() != audited.data:
        raise DataError(
            f"The audit is of {len(audited.pairs)} other pairs ({audited.name}) than these {len(rows)} ({rows.name}).",
            "Audit these pairs, whole, and give both together.",
        )
    bounds = {
        "margin_below": (margin_below, "margin", -1),
        "margin_above": (margin_above, "margin", 1),
        "blind_margin_below": (blind_margin_below, "blind_margin", -1),
        "picture_share_above": (picture_share_above, "picture_share", 1),
        "chosen_gap_below": (chosen_gap_below, "chosen_gap", -1),
        "word_margin_below": (word_margin_below, "word_margin", -1),
    }
    given = {name: bound for name, bound in bounds.items() if bound[0] is not None}
    if not given:
        raise SettingsError("No bound is given.", f"Give one or more of {', '.join(bounds)}.")
    passes = {
        name: np.array([_passes(getattr(pair, column), limit, sign) for pair in audited.pairs])
        for name, (limit, column, sign) in given.items()
    }
    fit = np.logical_and.reduce(list(passes.values()))
    if not fit.any():
        left = ", ".join(f"{name}={given[name][0]:g} leaves {int(of.sum())}" for name, of in passes.items())
        raise DataError(f"None of {len(rows)} pairs is left: {left}.", "Loosen a bound.", "nothing left")
    return rows.select(np.flatnonzero(fit).tolist())


def _passes(value: float | None, limit: float | None, sign: int) -> bool:
    # what a pair without pictures does not have cannot be shown to be within a bound
    return value is not None and limit is not None and sign * value > sign * limit


@dataclass(frozen=True)
class _Scores:
    """(2, n) of chosen and rejected: log-probabilities summed over tokens, and per token."""

    summed: np.ndarray
    per_token: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        """(n,) log p(chosen) - log p(rejected)."""
        return np.asarray(self.summed[0] - self.summed[1])


@dataclass(frozen=True)
class _PairScorer:
    """Scores pairs by forest passes; the fields as `audit` has them."""

    model: PreTrainedModel
    adapter: VisionAdapter
    processor: ProcessorMixin
    reading: ForestReading
    batch_size: int

    @torch.no_grad()
    def __call__(self, rows: _Rows, what: str) -> _Scores:
        collator = ForestCollator(
            self.processor,
            self.adapter.image_token_id,
            self.reading.shared,
            whole_prompts=self.reading.whole_prompts,
        )
        summed, lengths = [], []
        with answering(self.model, self.adapter, self.reading):
            for positions in _batches(len(rows), self.batch_size, f"auditing {what}"):
                batch: ForestBatch = collator([rows[position] for position in positions])["forest"]
                logps = self.model(forest=batch.to(self.model.device)).log_probs.float().sum(dim=1)
                summed.append(logps.cpu().reshape(2, -1).numpy())
                lengths.append((batch.forest.edge_of >= 0).sum(dim=1).reshape(2, -1).cpu().numpy())
        if not summed:
            return _Scores(np.zeros((2, 0)), np.zeros((2, 0)))
        total, tokens = np.concatenate(summed, axis=1), np.concatenate(lengths, axis=1)
        return _Scores(total, total / np.maximum(tokens, 1))


class _Asked:
    """Pairs whose two answers are about their pictures; where they are one, the second is about the rejected ones."""

    def __init__(self, rows: PairDataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self._rows[position]
        return row if text_of(row["chosen"]) == text_of(row["rejected"]) else without_rejected(row)


class _Elsewhere:
    """Pairs with rejected pictures, asked about these."""

    def __init__(self, rows: PairDataset) -> None:
        self._rows = rows
        self.positions: list[int] = np.flatnonzero(rows.rejected_image_keys != b"").tolist()

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return about_rejected(self._rows[self.positions[position]])


class _Answered:
    """Pairs whose chosen answer is the model's own."""

    def __init__(self, rows: PairDataset, answers: Sequence[str]) -> None:
        self._rows = rows
        self._answers = answers

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        content = [{"type": "text", "text": self._answers[position]}]
        return without_rejected(self._rows[position]) | {"chosen": [{"role": "assistant", "content": content}]}


def _own_answers(engine: TransformersEngine, rows: PairDataset, size: int, max_new_tokens: int) -> list[str]:
    greedy = Sampling(n=1, temperature=0.0, max_new_tokens=max_new_tokens)
    answers: list[str] = []
    for positions in _batches(len(rows), size, "asking for own answers"):
        asked: list[Mapping[str, Any]] = [rows[position] for position in positions]
        answers += [texts[0] for texts in engine([dict(row) for row in asked], greedy, 0)]
    return answers


def _without(rows: PairDataset) -> dict[Without, _Rows]:
    if not any(rows.image_keys):
        return {}
    blind: dict[Without, _Rows] = {"mean": WithoutPicture(rows, "mean")}
    if len(set(rows.image_keys) - {b""}) > 1:
        blind["other"] = WithoutPicture(rows, "other")
    return blind


def _batches(count: int, size: int, what: str) -> Iterator[range]:
    starts = range(0, count, size)
    for start in tqdm(starts, desc=what, disable=len(starts) < 8, leave=False):
        yield range(start, min(start + size, count))
