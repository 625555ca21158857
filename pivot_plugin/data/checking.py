"""One pass over all rows of a preference set, and a report of every defect with its rows.

Errors are rows that teach nothing or the wrong thing; warnings are what is worth knowing before training.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from pivot_plugin.errors import ModelError
from pivot_plugin.models.image_tokens import ImageTokens

from .images import MAX_PIXELS
from .pairs import load_pairs
from .pixels import PixelStatistics, told_apart
from .records import RowRecord, inspect_rows

Severity = Literal["error", "warning"]
ROWS_SHOWN = 8
EXAMPLES_KEPT = 3
# a sign test this unlikely by chance, and a share of at least this, is a bias worth naming
BIAS_P, BIAS_SHARE = 1e-3, 0.6
MOST_SPECIAL = 20
# pairs of pictures, from the first on
MEASURED = 5000


@dataclass
class Defect:
    """One kind of defect.

    Attributes:
        kind: what is wrong, a few words.
        severity: "error" where the rows should not be trained on.
        rows: numbers of the rows that have it.
        examples: the first few findings, as sentences.
        remedy: what to do.
    """

    kind: str
    severity: Severity
    rows: Sequence[int]
    examples: list[str]
    remedy: str


@dataclass
class CheckReport:
    """What one pass over a preference set found.

    Attributes:
        name: of the data.
        rows: how many there are.
        defects: by kind, errors first.
        statistics: counts, lengths and biases by name.
    """

    name: str
    rows: int
    defects: list[Defect] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """Rows with at least one error."""
        return len({row for defect in self.defects if defect.severity == "error" for row in defect.rows})

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, every row number included."""
        defects = [asdict(defect) | {"rows": list(defect.rows)} for defect in self.defects]
        return {
            "name": self.name,
            "rows": self.rows,
            "rows_with_errors": self.errors,
            "defects": defects,
            "statistics": self.statistics,
        }

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.rows:,} pairs, {self.errors:,} with errors"]
        for defect in self.defects:
            shown = ", ".join(map(str, defect.rows[:ROWS_SHOWN])) + (", ..." if len(defect.rows) > ROWS_SHOWN else "")
            # of the pairs as a whole no row is to blame
            rows = f"{len(defect.rows):,} (rows {shown})" if defect.rows else "all pairs together"
            lines.append(f"  {defect.severity}: {defect.kind}: {rows}")
            lines += [f"      {example}" for example in defect.examples]
            lines.append(f"      {defect.remedy}")
        lines += [f"  {name.replace('_', ' ')}: {_shown(value)}" for name, value in self.statistics.items()]
        return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items()) or "none"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def check(source: object, processor: Any = None, max_pixels: int = MAX_PIXELS, **options: Any) -> CheckReport:
    """Look at every pair of a source and report every defect.

    Args:
        source: as for `load`, with random access.
        processor: of a model; tokens per pair and per image are counted for it.
        max_pixels: larger images are reported.
        **options: as for `load`: `split`, `columns`, `image_folder`, `allow_urls`, `name`.

    Returns:
        the report; its `errors` is 0 where every row can be trained on.

    Raises:
        DataError: if the source cannot be read at all, or is a stream.
        ModelError: if the processor is none.
    """
    pairs = load_pairs(source, max_pixels=max_pixels, **options)
    totals = _Found()
    for row, record in enumerate(
        inspect_rows(pairs, pairs.name, None if processor is None else _TokenCounter(processor), pixels=True)
    ):
        totals.add(row, record)
    return CheckReport(pairs.name, len(pairs), totals.defects(), totals.statistics())


@dataclass
class _TokenCounter:
    """Counts the tokens of a pair as a model's processor makes them; goes to worker processes."""

    processor: Any

    def __post_init__(self) -> None:
        if not hasattr(self.processor, "image_token") or not hasattr(self.processor, "tokenizer"):
            raise ModelError(
                f"The processor is a {type(self.processor).__name__}, without image token or tokenizer.",
                "Pass AutoProcessor.from_pretrained(<an MLLM>).",
            )

        self._image_tokens = ImageTokens(self.processor)

    def __call__(self, pair: dict[str, Any]) -> tuple[int, int, int]:
        """Tokens of prompt with chosen answer, of prompt with rejected answer, and those of them that are images."""
        texts = self._image_tokens.texts(pair)
        images = self._image_tokens.process_images([pair["images"]] if pair["images"] else [], [texts["prompt"]])
        expansions = images.expansions_of(0 if pair["images"] else -1)
        prompt = len(self._image_tokens.prompt(pair, texts["prompt"], expansions))
        chosen, rejected = (len(self._image_tokens.tokens(texts[side])) for side in ("chosen", "rejected"))
        return prompt + chosen, prompt + rejected, sum(sum(counts) for counts in images.counts)


class _Found:
    """What records add up to: a few numbers per row, in flat arrays."""

    def __init__(self) -> None:
        self._bad: dict[str, tuple[array[int], list[str], str]] = {}
        self._near: array[int] = array("q")
        self._reversed: array[int] = array("q")
        self._keys: array[int] = array("Q")
        self._rows: array[int] = array("q")
        self._pairs: array[int] = array("q")
        self._turned: array[int] = array("b")
        self._lengths: tuple[array[int], array[int]] = (array("q"), array("q"))
        self._images: Counter[int] = Counter()
        self._special: dict[str, array[int]] = defaultdict(lambda: array("q"))
        self._tokens: tuple[array[int], array[int], array[int]] = (array("q"), array("q"), array("q"))
        self._rejected_images = 0
        self._same_images: array[int] = array("q")
        self._pixels: list[tuple[PixelStatistics, PixelStatistics]] = []

    def add(self, row: int, record: RowRecord) -> None:
        if record.error is not None:
            finding, remedy, kind = record.error
            rows, examples, _ = self._bad.setdefault(kind, (array("q"), [], remedy))
            rows.append(row)
            if len(examples) < EXAMPLES_KEPT:
                examples.append(finding)
            return
        self._rows.append(row)
        self._pairs.append(record.pair)
        self._turned.append(record.turned)
        self._images[record.images] += 1
        if record.key:
            self._keys.append(int(record.key[:16], 16))
        for lengths, length in zip(self._lengths, (record.chosen, record.rejected), strict=True):
            lengths.append(length)
        # answers may be equal where the pictures are not
        if record.near and record.rejected_key in ("", record.key):
            self._near.append(row)
        if record.rejected_key:
            self._rejected_images += 1
            if record.rejected_key == record.key:
                self._same_images.append(row)
        if record.pixels is not None and len(self._pixels) < MEASURED:
            self._pixels.append(record.pixels)
        if record.reversed:
            self._reversed.append(row)
        for token in record.special:
            if token in self._special or len(self._special) < MOST_SPECIAL:
                self._special[token].append(row)
        for counts, count in zip(self._tokens, record.tokens or (), strict=False):
            counts.append(count)

    def defects(self) -> list[Defect]:
        defects = [
            Defect(kind, "error", rows, examples, remedy)
            for kind, (rows, examples, remedy) in sorted(self._bad.items())
        ]
        duplicated, contradictory = self._repeated()
        if contradictory:
            remedy = "One of the two is wrong: drop one, or both."
            example = "The same two answers to the same question stand both ways round."
            defects.append(Defect("contradictory pairs", "error", contradictory, [example], remedy))
        if len(self._reversed):
            remedy = "Swap chosen and rejected, or leave the scores out where lower ones are better."
            example = "score_rejected is higher than score_chosen."
            defects.append(Defect("scores the wrong way round", "error", self._reversed, [example], remedy))
        if duplicated:
            remedy = "Each counts again: drop the repeats unless that is meant."
            example = "The same images, prompt, chosen and rejected stood in an earlier row."
            defects.append(Defect("duplicated pairs", "warning", duplicated, [example], remedy))
        if len(self._near):
            remedy = "Such pairs teach spelling; drop them unless that is meant."
            example = "Chosen and rejected differ only in case, spaces or punctuation."
            defects.append(Defect("near-equal answers", "warning", self._near, [example], remedy))
        longer, probability = self._length_bias()
        if probability < BIAS_P and max(longer, 1 - longer) >= BIAS_SHARE:
            side, share = ("chosen", longer) if longer > 0.5 else ("rejected", 1 - longer)
            example = f"The {side} answer is the longer one in {share:.0%} of the pairs with unequal lengths."
            remedy = "A model can learn length instead of content: balance the pairs, or use a length-averaged loss."
            defects.append(Defect("length bias", "warning", [], [example], remedy))
        if len(self._same_images):
            remedy = "Nothing is learnt of such pictures, and mdpo and svco refuse them: drop the rows, or the column."
            example = "The rejected images are the images themselves."
            defects.append(Defect("rejected images equal images", "warning", self._same_images, [example], remedy))
        told = told_apart(self._pixels)
        if told is not None and told.beyond_chance:
            remedy = (
                "A model can learn to know unnatural pictures instead of reading them: take natural ones (the maker "
                "other_picture), or edits that leave no trace."
            )
            example = (
                f"A linear classifier of single pictures' pixel statistics calls {told.share:.0%} of {told.pairs:,} "
                f"pairs' pictures what they are, true or rejected ({told.low:.0%} to {told.high:.0%}; 50% by chance)."
            )
            defects.append(Defect("rejected images are told by their pixels", "warning", [], [example], remedy))
        for token, rows in self._special.items():
            remedy = "Fine where the chat template means it; otherwise it is text of another model's format."
            defects.append(Defect(f"special token {token}", "warning", rows, [], remedy))
        return defects

    def _repeated(self) -> tuple[list[int], list[int]]:
        """Rows that repeat an earlier pair, and rows whose pair stands both ways round."""
        pairs, turned, rows = (np.asarray(values) for values in (self._pairs, self._turned, self._rows))
        order = np.argsort(pairs, kind="stable")
        starts = np.flatnonzero(np.diff(pairs[order])) + 1
        duplicated: list[int] = []
        contradictory: list[int] = []
        for group in np.split(order, starts):
            if len(group) < 2:
                continue
            if turned[group].min() != turned[group].max():
                contradictory += rows[group].tolist()
            for way in (0, 1):
                duplicated += rows[group[turned[group] == way]][1:].tolist()
        return sorted(duplicated), sorted(contradictory)

    def _length_bias(self) -> tuple[float, float]:
        """Share of unequal pairs whose chosen answer is longer, and how probable so uneven a share is by chance."""
        chosen, rejected = (np.asarray(lengths) for lengths in self._lengths)
        longer, unequal = int((chosen > rejected).sum()), int((chosen != rejected).sum())
        if not unequal:
            return 0.5, 1.0
        deviation = abs(longer - unequal / 2) / (unequal / 4) ** 0.5
        return longer / unequal, 2 * (1 - NormalDist().cdf(deviation))

    def statistics(self) -> dict[str, Any]:
        longer, _ = self._length_bias()
        _, sharing = np.unique(np.asarray(self._keys), return_counts=True)
        numbers: dict[str, Any] = {
            "usable_pairs": len(self._rows),
            "images_per_pair": {str(count): pairs for count, pairs in sorted(self._images.items())},
            "distinct_image_sets": len(sharing),
            "pairs_that_share_an_image": int(sharing[sharing > 1].sum()),
            "most_pairs_on_one_image": int(sharing.max(initial=0)),
            "characters_chosen": _spread(self._lengths[0]),
            "characters_rejected": _spread(self._lengths[1]),
            "chosen_is_longer": round(longer, 4),
        }
        if self._rejected_images:
            numbers["pairs_with_rejected_images"] = self._rejected_images
            if (told := told_apart(self._pixels)) is not None:
                numbers["rejected_images_told_by_pixels"] = round(told.share, 4)
        if len(self._tokens[0]):
            names = ("tokens_prompt_and_chosen", "tokens_prompt_and_rejected", "image_tokens_per_pair")
            numbers |= {name: _spread(counts) for name, counts in zip(names, self._tokens, strict=True)}
            images = sum(count * pairs for count, pairs in self._images.items())
            numbers["image_tokens_per_image"] = round(sum(self._tokens[2]) / images, 2) if images else 0
        return numbers


def _spread(values: "array[int]") -> dict[str, float]:
    if not len(values):
        return {}
    numbers = np.asarray(values)
    low, middle, high = np.percentile(numbers, (5, 50, 95))
    return {
        "mean": round(float(numbers.mean()), 2),
        "median": float(middle),
        "5%": float(low),
        "95%": float(high),
        "most": float(numbers.max()),
    }
