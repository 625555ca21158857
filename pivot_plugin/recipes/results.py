"""What the paper's recipe came to: every score of every encoder, and tables over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .sections import CONTROLS, ORIGINAL, STAGE_1
from .stages import Stage
from .tables import cell, markdown

TITLES = {
    "encoder": "Encoders",
    "optimized": "The MLLMs they were trained in",
    "transplant": "Transplanted: encoder frozen, new language model and projector",
}


@dataclass(frozen=True)
class EncoderScore:
    """One score of one encoder with one seed.

    Attributes:
        seed: of the run.
        encoder: "original", "stage-1" or an arm.
        of: what was examined: "encoder", "optimized" or "transplant".
        projector: variant of the transplant, "" for the others.
        score: label of the probe and name of the score.
        value: the score.
    """

    seed: int
    encoder: str
    of: str
    projector: str
    score: str
    value: float


@dataclass
class RecipeResult:
    """What the recipe came to.

    Attributes:
        output_dir: folder of all stages.
        encoders: by seed and name, folders of the encoders.
        rates: per arm, the learning rate chosen.
        scores: every score of every encoder with every seed.
        stages: in the order in which they ended.
    """

    output_dir: Path
    encoders: dict[int, dict[str, Path]] = field(default_factory=dict)
    rates: dict[str, float | None] = field(default_factory=dict)
    scores: list[EncoderScore] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    def note(self, done: Stage) -> None:
        """Keep a stage that ended; one that several seeds share is kept once."""
        if done.folder not in [earlier.folder for earlier in self.stages]:
            self.stages.append(done)

    def table(self, of: str) -> str:
        """Encoders by row, scores by column, mean and standard deviation over seeds, as markdown.

        Args:
            of: "encoder", "optimized" or "transplant".
        """
        scores = [score for score in self.scores if score.of == of]
        names = list(dict.fromkeys(score.score for score in scores))
        rows = []
        for encoder, projector in dict.fromkeys((score.encoder, score.projector) for score in scores):
            own = [score for score in scores if (score.encoder, score.projector) == (encoder, projector)]
            cells = [cell([score.value for score in own if score.score == name]) for name in names]
            rows.append([f"{encoder}, projector {projector}" if projector else encoder, *cells])
        return markdown(["encoder", *names], rows)

    def differences(self, of: str) -> str:
        """Each encoder against the one before it, within a seed: mean difference, spread, and how often above zero.

        Args:
            of: "encoder", "optimized" or "transplant".
        """
        scores = [score for score in self.scores if score.of == of]
        names = list(dict.fromkeys(score.score for score in scores))
        order = list(dict.fromkeys(score.encoder for score in scores))
        rows = []
        for projector in dict.fromkeys(score.projector for score in scores):
            # the original, for which no projector was tuned, stands beside every variant
            own = [score for score in scores if score.projector == projector or score.encoder == ORIGINAL]
            for first, second in _contrasts(order):
                cells = [_gap([score for score in own if score.score == name], first, second) for name in names]
                if any(cells):
                    rows.append([f"{second} - {first}" + (f", projector {projector}" if projector else ""), *cells])
        return markdown(["difference", *names], rows)

    def __str__(self) -> str:
        parts = []
        for of in dict.fromkeys(score.of for score in self.scores):
            parts += [f"## {TITLES[of]}", "", self.table(of), "", self.differences(of), ""]
        seeds = len({score.seed for score in self.scores})
        rates = ", ".join(f"{arm} {rate:g}" for arm, rate in self.rates.items() if rate is not None)
        note = f"Mean ± standard deviation over {seeds} seed(s); differences within a seed, and how many are above 0."
        return "\n".join([*parts, note + (f" Learning rates: {rates}." if rates else "")])


def _contrasts(order: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of encoders whose difference is asked for: what each step added, and arms against each other."""
    arms = [name for name in order if name not in CONTROLS]
    steps = [(ORIGINAL, STAGE_1)] if ORIGINAL in order and STAGE_1 in order else []
    steps += [(STAGE_1 if STAGE_1 in order else ORIGINAL, arm) for arm in arms]
    return steps + [(first, second) for i, first in enumerate(arms) for second in arms[i + 1 :]]


def _gap(scores: Sequence[EncoderScore], first: str, second: str) -> str:
    """The cell of one score: the second encoder's less the first's, seed by seed."""
    values = {(score.seed, score.encoder): score.value for score in scores}
    seeds = [seed for seed, encoder in values if encoder == first and (seed, second) in values]
    gaps = [values[seed, second] - values[seed, first] for seed in seeds]
    above = sum(gap > 0 for gap in gaps)
    return f"{cell(gaps, '+.3f')} ({above}/{len(gaps)})" if gaps else ""
