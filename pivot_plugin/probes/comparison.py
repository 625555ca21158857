"""Encoders side by side: every probe on every one of them, and which differences are beyond noise."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from pivot_plugin.encoders.extraction import TowerChange
from pivot_plugin.errors import SettingsError
from pivot_plugin.files import write_whole

from . import subjects
from .extracted import Towers, said_of_change, tower_probes
from .lookup import needs_mllm, runners
from .scores import BLIND, Difference, ProbeResult, apart, difference, holm
from .subjects import Subject, name_of

logger = logging.getLogger(__name__)

COMPARISON_FILE = "comparison.json"
SIGNIFICANT = 0.05
# of an improvement, without the picture, from which on it is called one of words
SURVIVES = 0.5
WORDS_MARK = "\u2020"
WORDS_NOTE = "An improvement of words: at least half of it is there without the picture."


@dataclass(frozen=True)
class Contrast:
    """One score of one of the compared against the first's.

    Attributes:
        probe, score: label of the probe and name of the score.
        name: of the subject that is held against the first.
        difference: its score minus the first's.
        p: of the paired test, adjusted for all tests of the comparison (Holm 1979); None where samples are not paired.
        beyond_noise: p below 0.05; where samples are not paired, intervals that do not touch.
        of_words: of an improvement beyond noise, the share that is there without the picture too, beyond noise; 0 where
            nothing is. None where nothing improved, or nothing was asked without the picture.
    """

    probe: str
    score: str
    name: str
    difference: Difference
    p: float | None
    beyond_noise: bool
    of_words: float | None = None

    @property
    def survives_blind(self) -> bool:
        """Whether at least half of an improvement is one of words, there without the picture too."""
        return self.of_words is not None and self.of_words >= SURVIVES


@dataclass(repr=False)
class Comparison:
    """What probes found.

    Attributes:
        results: by name of the compared and label of the probe; the first is what the others are held against.
        tower_changes: by name of the compared how far its tower's weights are from the first one's, where towers were
            extracted and are of one kind.
    """

    results: dict[str, dict[str, ProbeResult]] = field(default_factory=dict)
    tower_changes: dict[str, TowerChange] = field(default_factory=dict)
    # a test draws thousands of times, and is asked for by every table
    _tested: dict[tuple[str, str, str], Difference] = field(default_factory=dict, repr=False, compare=False)

    @property
    def names(self) -> list[str]:
        """Of the compared, in order."""
        return list(self.results)

    def contrasts(self) -> list[Contrast]:
        """Every main and named score of all but the first, held against the first's; spreads are left out."""
        if not self.results:
            return []
        base, *others = self.results
        gaps: list[tuple[str, str, str, Difference]] = []
        for name in others:
            for label, result in self.results[name].items():
                first = self.results[base].get(label)
                shared = [s for s in result.scores if first and s in first.scores and not s.endswith("/spread")]
                gaps += [(label, s, name, self._difference(label, s, name)) for s in shared]
        tested = [index for index, (*_, gap) in enumerate(gaps) if gap.p is not None]
        adjusted = dict(zip(tested, holm([gaps[i][3].p or 0.0 for i in tested]), strict=True))
        found = [
            Contrast(label, score, name, gap, adjusted.get(i), self._beyond(label, score, name, gap, adjusted.get(i)))
            for i, (label, score, name, gap) in enumerate(gaps)
        ]
        by_key = {(contrast.probe, contrast.score, contrast.name): contrast for contrast in found}
        return [replace(contrast, of_words=_of_words(contrast, by_key)) for contrast in found]

    def _difference(self, label: str, score: str, name: str) -> Difference:
        """Tested once: a result does not change."""
        key = (label, score, name)
        if key not in self._tested:
            first, second = (self.results[n][label].scores[score] for n in (self.names[0], name))
            self._tested[key] = difference(first, second)
        return self._tested[key]

    def _beyond(self, label: str, score: str, name: str, gap: Difference, p: float | None) -> bool:
        if p is not None:
            return p < SIGNIFICANT
        first, second = (self.results[n][label].scores[score] for n in (self.names[0], name))
        return apart(first, second)

    def table(self) -> str:
        """Scores by row, the compared by column, as markdown.

        A star marks a difference beyond noise, a dagger an improvement that is there without the picture too.
        """
        head, *rows = self.cells()
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, "", self.note()])

    def cells(self) -> list[list[str]]:
        """The table as text, the head first: the score, then a cell per compared."""
        contrasts = {(c.probe, c.score, c.name): c for c in self.contrasts()}
        table = [["score", *self.names]]
        for label, score in self.rows():
            cells = []
            for name, results in self.results.items():
                measured = results[label].scores.get(score) if label in results else None
                cells.append("" if measured is None else f"{measured}{mark_of(contrasts.get((label, score, name)))}")
            table.append([f"{label} {score}", *cells])
        return table

    def note(self) -> str:
        """What the marks of the table mean."""
        contrasts = {(c.probe, c.score, c.name): c for c in self.contrasts()}
        note = "95 % intervals in brackets."
        if len(self.names) > 1:
            note += (
                f" * differs from {self.names[0]} beyond noise (paired test: McNemar's of right and wrong, else by "
                "permutation; Holm-adjusted p < 0.05)."
            )
            if any(contrast.survives_blind for contrast in contrasts.values()):
                note += f" {WORDS_MARK} {WORDS_NOTE}"
        changes = [said_of_change(name, self.names[0], change) for name, change in self.tower_changes.items()]
        return " ".join([note, *changes])

    def _repr_html_(self) -> str:
        head, *rows = self.cells()
        top = "".join(f"<th>{escape(name)}</th>" for name in head)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table><p>{escape(self.note())}</p>"

    def __repr__(self) -> str:
        return self.table()

    def rows(self) -> list[tuple[str, str]]:
        """Every (label, score) there is, in order."""
        return list(
            dict.fromkeys(
                (label, score)
                for results in self.results.values()
                for label, result in results.items()
                for score in result.scores
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "compared": {
                name: {label: result.as_dict() for label, result in results.items()}
                for name, results in self.results.items()
            },
            "against": self.names[0] if self.names else None,
            "tower_changes": {name: dict(change.parts) for name, change in self.tower_changes.items()},
            "contrasts": [
                asdict(contrast) | {"survives_blind": contrast.survives_blind} for contrast in self.contrasts()
            ],
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, as a whole or not at all.

        Args:
            path: of the file, or a folder, which gets `comparison.json`.
        """
        path = Path(path) / COMPARISON_FILE if Path(path).is_dir() else Path(path)
        write_whole(path, json.dumps(self.as_dict(), indent=1, default=str))
        return path

    def __str__(self) -> str:
        return self.table()


def mark_of(contrast: Contrast | None) -> str:
    """What stands behind a score in a table."""
    if contrast is None or not contrast.beyond_noise:
        return ""
    return f" *{WORDS_MARK}" if contrast.survives_blind else " *"


def _of_words(contrast: Contrast, by_key: Mapping[tuple[str, str, str], Contrast]) -> float | None:
    """As `Contrast` documents it."""
    keys = [(contrast.probe, f"{contrast.score}/{suffix}", contrast.name) for suffix in BLIND.values()]
    blind = [by_key[key] for key in keys if key in by_key]
    if not blind or not contrast.beyond_noise or contrast.difference.value <= 0:
        return None
    gains = [one.difference.value for one in blind if one.beyond_noise and one.difference.value > 0]
    return max(gains, default=0.0) / contrast.difference.value


def compare(
    examined: Mapping[str, object] | Sequence[object],
    probes: Mapping[str, object],
    *,
    processor: ProcessorMixin | None = None,
    mllm: object | None = None,
    output: str | Path | None = None,
    extract: bool | str | Path = False,
) -> Comparison:
    """Run probes on several models or encoders, and tell which differences are beyond noise.

    All get the same data in the same order, so that differences are tested sample by sample.

    Args:
        examined: what to compare, the one the others are held against first: models, encoders, folders or Hub ids of
            either, folders of runs, results; or a mapping that names them.
        probes: by label a `probes.ProbeTask`; or data, the label naming the probe ("linear", "knn", "prototype",
            "segmentation", "saliency", "pointing", "alignment", "ravel", "vqa", or a plugin's); or a function of a
            `probes.Subject`.
        processor: of loaded models that have no name.
        mllm: an MLLM into a copy of which encoders are grafted, for probes that need one.
        output: JSON file, or folder, that gets the results, also those of a comparison that fails halfway.
        extract: take the towers of MLLMs out first and examine them as encoders by themselves, so that the question is
            whether a checkpoint's *tower* got better; probes that need an MLLM ask the whole one, "vqa" with its
            control without the picture. The data of "linear" serve "knn" too, and rows with captions (as for
            `load_conversations`) serve "ravel", with the first one's language model. A folder keeps the encoders.

    Raises:
        SettingsError: if there is nothing to compare, two have one name, or a probe is unknown.
        DataError, ModelError, EncoderError: for data or models that cannot be used.
    """
    examined_by_name = _named(examined)
    if not examined_by_name:
        raise SettingsError("There is nothing to compare.", "Give at least one model, encoder or folder.")
    run = runners(probes)
    of_whole_mllm = [label for label, probe in probes.items() if needs_mllm(label, probe)]
    around = subjects.subject(mllm, processor) if mllm is not None else None
    comparison = Comparison()
    with _folder(extract) as folder:
        towers = None if folder is None else Towers(folder)
        for name, one in examined_by_name.items():
            subject = subjects.subject(one, processor, name, around)
            if of_whole_mllm:
                subject.mllm(f"Probe {of_whole_mllm[0]!r}")
            if towers is not None and not comparison.results:
                run = runners(tower_probes(probes, subject))
            alone = subject if towers is None else towers.of(subject)
            comparison.results[name] = {}
            comparison.tower_changes = {} if towers is None else towers.changes
            for label, probe in run.items():
                logger.info("%s: %s", name, label)
                comparison.results[name][label] = probe(subject if label in of_whole_mllm else alone)
                if output is not None:
                    comparison.save(output)
    return comparison


@contextmanager
def _folder(extract: bool | str | Path) -> Iterator[Path | None]:
    """Where extracted encoders go: nowhere, for a while, or into a folder that is kept."""
    if extract is False:
        yield None
    elif extract is True:
        with tempfile.TemporaryDirectory(prefix="pivot-towers-") as folder:
            yield Path(folder)
    else:
        yield Path(extract)


def _named(examined: Mapping[str, object] | Sequence[object]) -> dict[str, object]:
    if isinstance(examined, Mapping):
        return dict(examined)
    if isinstance(examined, str | Path):
        raise SettingsError(f"{str(examined)!r} stands alone.", "Give a list of what to compare.")
    names = [one.name if isinstance(one, Subject) else name_of(one) for one in examined]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"Two are called {twice[0]!r}.", "Name them: compare({'before': ..., 'after': ...}, ...).")
    return dict(zip(names, examined, strict=True))
