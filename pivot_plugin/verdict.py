"""What a run came to, in one place: card, terminal, report and notebook say what stands here, and nothing else.

Nothing is computed here but words: what was measured, on the same held-out rows before and after, is handed in.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["better", "worse", "no change", "not measured"]
SIGNIFICANT = 0.05
# what is measured on held-out rows, in the words of card, terminal and report
READABLE = {
    "preference_accuracy": "preference accuracy (chance 0.5)",
    "margin": "margin (nats)",
    "logps_chosen": "log p of chosen answers (nats)",
    "logps_rejected": "log p of rejected answers (nats)",
    "image_accuracy": "chosen answers more probable with their own pictures (chance 0.5)",
    "image_margin": "margin of pictures, own minus rejected (nats)",
    "reward": "mean reward of answers",
}
# of the scores of probes: parts of their names, in words
WORDS_OF_SCORES = {
    "sft": "SFT loss",
    "dpo": "DPO loss",
    "concentration": "gradient gathered in few patches",
    "energy": "gradient on the object, share",
    "area": "share of the picture that the object covers",
    "pointing": "largest gradient on the object",
    "recall": "patches, recall averaged over classes",
    "miou": "patches, intersection over union averaged over classes",
    "spread": "standard deviation over seeds",
    "top1": "right with the first guess",
    "top5": "right among five guesses",
    "overlap": "shared neighbours",
    "all": "all questions, right",
    "other-picture": "shown another row's picture",
    "mean-colour": "shown the picture's mean colour",
    "needs-picture": "right by the picture alone",
}


def words_of(score: str) -> str:
    """The name of a probe's score in words; a part that is not known stays as it is.

    Args:
        score: parts with slashes between them: "dpo/concentration".
    """
    return ": ".join(WORDS_OF_SCORES.get(part, part) for part in score.split("/"))


def is_constant(score: str) -> bool:
    """Whether a score says something of the data or the seeds, and nothing of the encoder."""
    return score.rpartition("/")[2] in ("area", "spread")


# below so many held-out rows it is said how little they can show
FEW_ROWS = 200
# of a gain, without the picture, from which on it is called one of words
OF_WORDS = 0.5


@dataclass(frozen=True)
class Change:
    """A score before and after, on the same rows.

    Attributes:
        before, after: the score.
        low, high: 95 % interval of after minus before, paired by row.
        p: two-sided, of the paired test.
        rows: how many.
    """

    before: float
    after: float
    low: float
    high: float
    p: float
    rows: int

    @property
    def value(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def beyond_noise(self) -> bool:
        """Whether the rows can tell it from none."""
        return self.p < SIGNIFICANT and self.value != 0

    def __str__(self) -> str:
        return f"{self.value:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f}"


@dataclass(frozen=True)
class Verdict:
    """What a run came to.

    Attributes:
        measure: name of the score that decides, empty where nothing was held out.
        rows_are: what the held-out rows are: "pairs", "questions" or "conversations".
        subject: what was to become better: "encoder" or "model".
        lower_is_better: whether the score is a loss.
        chance: the score of guessing, None where it is not known.
        change: of that score, None where nothing was measured.
        blind: the same with every picture one colour, None where that was not measured.
        moved: whether any weight that may change has changed.
        taken, planned: optimiser steps.
        kept: the step whose weights were kept, 0 the start, None where the last were, unlooked at.
        stopped_early: whether the watch stopped the run.
        without_image: rows trained on that show no picture, and all of them.
    """

    measure: str = ""
    rows_are: str = "pairs"
    chance: float | None = None
    change: Change | None = None
    blind: Change | None = None
    moved: bool = True
    taken: int = 0
    planned: int = 0
    kept: int | None = None
    stopped_early: bool = False
    without_image: tuple[int, int] = (0, 0)
    subject: str = "encoder"
    lower_is_better: bool = False

    @property
    def outcome(self) -> Outcome:
        """In a word."""
        if not self.moved:
            return "no change"
        if self.change is None:
            return "not measured"
        if not self.change.beyond_noise:
            return "no change"
        return "better" if (self.change.value > 0) is not self.lower_is_better else "worse"

    @property
    def of_words(self) -> bool:
        """Whether at least half of a gain is there without the picture too, beyond noise."""
        if self.outcome != "better" or self.blind is None or self.change is None or not self.blind.beyond_noise:
            return False
        return self.blind.value >= OF_WORDS * self.change.value

    @property
    def title(self) -> str:
        """The outcome in a few words, as a headline has it."""
        if not self.moved:
            return "Nothing was learnt"
        if self.outcome == "no change":
            few = self.change is not None and self.change.rows < FEW_ROWS
            return "Not decidable with so few rows" if few else "No change beyond noise"
        if self.outcome == "better" and self.of_words:
            return "Better, with and without the picture"
        return {"better": "Better", "worse": "Worse", "not measured": "Not measured"}[self.outcome]

    def sentences(self) -> list[str]:
        """The verdict in whole sentences, the most important one first."""
        told = []
        if not self.moved:
            why = (
                "no look at the held-out rows was better than the start, so that the start is kept"
                if self.kept == 0
                else "no step moved them (rows without pictures, a rate of 0, or margins that do not move)"
            )
            told.append(f"The {self.subject} is bit-equal to the one before: {why}.")
        if self.change is not None:
            told.append(self._measured(self.change))
        elif self.moved:
            told.append(f"No rows were held out, so nothing here says whether the {self.subject} is better.")
        if self.moved and self.blind is not None:
            told.append(self._without_picture(self.blind))
        if self.kept is not None and self.moved and self.taken:
            told.append(f"Kept are the weights of step {self.kept}, the best look; {self.taken} steps were taken.")
        if self.stopped_early:
            told.append(
                f"The watch stopped the run at step {self.taken} of {self.planned}: held-out rows grew worse, look "
                "after look, by more than their noise (patience=None, on the command line --set patience=none, "
                "runs to the end)."
            )
        bare, every = self.without_image
        if bare:
            told.append(f"{bare:,} of the {every:,} rows trained on show no picture, and teach an encoder nothing.")
        return told

    def __str__(self) -> str:
        return f"{self.title}. {' '.join(self.sentences())}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"outcome": self.outcome, "title": self.title, **asdict(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any] | None) -> "Verdict | None":
        """What `as_dict` gave; None where there is none, or something else: records are written by strangers too.

        Args:
            record: as JSON gave it back.
        """
        if not isinstance(record, Mapping) or not record:
            return None
        values = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        try:
            for name in ("change", "blind"):
                if values.get(name) is not None:
                    values[name] = Change(**values[name])
            values["without_image"] = tuple(values.get("without_image", (0, 0)))
            verdict = cls(**values)
            # what can be said is what it is for
            str(verdict)
        except (TypeError, ValueError, AttributeError):
            return None
        return verdict

    def _measured(self, change: Change) -> str:
        chance = "" if self.chance is None else f"; chance {self.chance:.3g}"
        told = (
            f"{self.measure.capitalize()} on {change.rows:,} held-out {self.rows_are}: "
            f"{change.before:.3f} before, {change.after:.3f} after ({change}{chance})."
        )
        if self.chance is not None and change.before < self.chance:
            told += " It began below chance, so that part of a gain may be the form of the answers."
        if self.moved and not change.beyond_noise:
            # where no row has changed sides the interval has no width: the rule of three
            least = max((change.high - change.low) / 2, 0.0 if self.chance is None else 3 / change.rows)
            told += f" A change of less than about {least:.2g} cannot be told from noise here."
        return told

    def _without_picture(self, blind: Change) -> str:
        told = f"With the picture's mean colour in its place ({blind.rows:,} rows) it changed by {blind}"
        if self.outcome != "better":
            return f"{told}."
        if self.of_words:
            return f"{told}: at least half of the gain is there without the picture."
        return f"{told}: the gain needs the picture."
