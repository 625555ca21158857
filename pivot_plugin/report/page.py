"""The page: what is put where. The words and the looks are in template.html."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from pivot_plugin import __version__
from pivot_plugin.errors import SettingsError
from pivot_plugin.files import write_whole
from pivot_plugin.preferences.auditing import AUDIT_FILE, AuditReport
from pivot_plugin.probes.comparison import COMPARISON_FILE, WORDS_MARK, WORDS_NOTE, Comparison
from pivot_plugin.probes.gradients import PairSaliency
from pivot_plugin.probes.scores import SEEN, apart
from pivot_plugin.verdict import READABLE, is_constant, words_of

from .pictures import as_address, fitted, overlay
from .plots import Series, curve, histogram
from .runs import RunFacts, read_run

# title, names in the log (training, held out), whether zero means something
CURVES = (
    ("loss", "loss", "eval_loss", False),
    ("reward accuracy, against the reference", "rewards/accuracies", "eval_rewards/accuracies", False),
    ("reward margin (beta x nats)", "rewards/margins", "eval_rewards/margins", True),
    ("margin of images (beta x nats)", "rewards/image_margins", "eval_rewards/image_margins", True),
    ("log-probability of chosen answers (nats)", "logps/chosen", "eval_logps/chosen", False),
    ("reward of roll-outs", "reward", "eval_reward", False),
    ("watch: chosen log-probability, change (nats)", "watch/chosen_logps_change", "watch/chosen_logps_change", True),
    ("Generalisation Factor", "generalization/factor", None, True),
)
PAIRS_SHOWN = 12


def write_report(
    path: str | Path,
    runs: Sequence[str | Path],
    comparison: Comparison | Mapping[str, Any] | None = None,
    audit: AuditReport | None = None,
) -> Path:
    """Write the page about one run or several.

    Args:
        path: of the HTML file.
        runs: folders of runs; several are drawn into the same plots.
        comparison: of encoders; where None, what `comparison.json` in the first run's folder holds, if it is there.
        audit: of pairs; where None, what `audit.json` in the first run's folder holds, if it is there.

    Raises:
        SettingsError: if a folder holds no run, or the file cannot be written; before anything is drawn.
    """
    path = Path(path)
    _check(path)
    if not runs:
        raise SettingsError("There is no run to report on.", "Give the folder of at least one.")
    facts = [read_run(folder) for folder in runs]
    if audit is None and (Path(runs[0]) / AUDIT_FILE).is_file():
        audit = AuditReport.load(runs[0])
    page = render(facts, _compared(comparison, Path(runs[0])), audit)
    try:
        write_whole(path, page)
    except OSError as error:
        raise SettingsError(f"{str(path)!r} cannot be written: {error.strerror}.", "Choose another file.") from error
    return path


def render(
    runs: Sequence[RunFacts], compared: Mapping[str, Any] | None = None, audit: AuditReport | None = None
) -> str:
    """The page as text.

    Args:
        runs: at least one.
        compared: a comparison, as `Comparison.as_dict` gives it.
        audit: of pairs.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = number
    template = environment.from_string((files(__package__) / "template.html").read_text(encoding="utf-8"))
    curves = _curves(runs)
    return template.render(
        title=" and ".join(run.name for run in runs),
        runs=runs,
        curves=curves,
        audited=None if audit is None else _audited(audit, len(curves)),
        tables={run.name: _before_after(run) for run in runs},
        readable=READABLE,
        words_of=words_of,
        summary=_summary(runs) if len(runs) > 1 else [],
        made=[(run.name, _made(run)) for run in runs if run.made],
        maps=[(run.name, _maps(run)) for run in runs if _saliency(run)],
        compared=_rows(compared) if compared else None,
        costs=[(run.name, _cost(run)) for run in runs],
        version=__version__,
    )


def number(value: object) -> str:
    """A number as people read it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def _check(path: Path) -> None:
    if path.is_dir():
        raise SettingsError(f"{str(path)!r} is a folder.", f"Give a file, such as {str(path / 'report.html')!r}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"{str(path.parent)!r} cannot be made: {error.strerror}.", "Choose another file."
        ) from error


def _compared(comparison: Comparison | Mapping[str, Any] | None, folder: Path) -> Mapping[str, Any] | None:
    if isinstance(comparison, Comparison):
        return comparison.as_dict()
    if comparison is not None:
        return comparison
    try:
        saved: Mapping[str, Any] = json.loads((folder / COMPARISON_FILE).read_text())
    except (OSError, ValueError):
        return None
    return saved


def _curves(runs: Sequence[RunFacts]) -> list[str]:
    """Plots of everything the logs hold: of one run training beside held out, of several run beside run."""
    curves: list[str] = []
    # of several runs each has its own
    kept = runs[0].kept if len(runs) == 1 else None

    def add(title: str, lines: Mapping[str, Series], zero: bool = False) -> None:
        with_points = {name: points for name, points in lines.items() if points}
        if with_points:
            curves.append(curve(title, with_points, len(curves), zero, kept))

    for title, training, held_out, zero in CURVES:
        if len(runs) == 1:
            lines = {"training": runs[0].series(training, held_out=False)}
            if held_out:
                lines["held out"] = runs[0].series(held_out, held_out=True)
            add(title, lines, zero)
        else:
            add(title, {run.name: _one_series(run, training, held_out) for run in runs}, zero)
    labels = dict.fromkeys(label for run in runs for label in run.probes)
    for label in labels:
        looked: dict[str, Series] = {}
        for run in runs:
            steps = run.probes.get(label, {})
            points = [(float(step), result.main.value) for step, result in steps.items()]
            name = next(iter(next(iter(steps.values())).scores)) if steps else ""
            looked[run.name if len(runs) > 1 else words_of(name)] = points if len(points) > 1 else []
        add(f"probe: {label}", looked)
    return curves


def _one_series(run: RunFacts, training: str, held_out: str | None) -> Series:
    """What stands for a run among others: held-out rows where it has them."""
    looked = run.series(held_out, held_out=True) if held_out else []
    return looked or run.series(training, held_out=False)


def _before_after(run: RunFacts) -> list[dict[str, Any]]:
    """Probe scores before and after, with intervals, and whether these are apart."""
    rows = []
    for label, steps in run.probes.items():
        first, last = steps.get(0), steps[max(steps)]
        for name, score in last.scores.items():
            if is_constant(name):
                continue
            before = first.scores.get(name) if first else None
            # of a run that goes on there is no after yet
            after = None if first is last else score
            change = after.value - before.value if before and after else None
            beyond = before is not None and after is not None and apart(before, after)
            row = {"probe": label, "score": name, "before": before, "after": after, "change": change, "apart": beyond}
            rows.append(row)
    return rows


def _summary(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """A row a run: what it was and what it came to."""
    rows = []
    for run in runs:
        change = run.verdict.change if run.verdict else None
        rows.append(
            {
                "name": run.name,
                "objective": run.settings.get("objective", ""),
                "steps": run.steps,
                "title": run.verdict.title if run.verdict else "Not finished" if not run.finished else "Not judged",
                "before": f"{change.before:.3f}" if change else "",
                "after": f"{change.after:.3f}" if change else "",
                "change": f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})" if change else "",
            }
        )
    return rows


def _saliency(run: RunFacts) -> dict[int, list[PairSaliency]]:
    return {
        step: result.artefacts
        for steps in run.probes.values()
        for step, result in steps.items()
        if isinstance(result.artefacts, list)
    }


def _maps(run: RunFacts) -> list[dict[str, Any]]:
    """Per pair its image, texts and maps before and after."""
    by_step = _saliency(run)
    first, last = by_step[min(by_step)], by_step[max(by_step)]
    when = [("before", first)] + ([("after", last)] if last is not first else [])
    shown = []
    for index, pair in enumerate(first[:PAIRS_SHOWN]):
        pictures = [("image", f"The image of pair {pair.pair}", as_address(fitted(pair.image)))]
        for loss in pair.maps:
            for name, pairs in when:
                item = pairs[index]
                row, column = divmod(int(item.maps[loss].argmax()), item.maps[loss].shape[1])
                alt = (
                    f"Where the {loss.upper()} loss of pair {pair.pair} looks {name} training: most at row {row + 1}, "
                    f"column {column + 1} of {item.maps[loss].shape[0]} by {item.maps[loss].shape[1]} patches"
                )
                picture = as_address(overlay(item.image, item.maps[loss], item.box))
                pictures.append((f"{loss.upper()} {name}", alt, picture))
        shown.append({"pair": pair, "pictures": pictures})
    return shown


def _made(run: RunFacts) -> list[dict[str, Any]]:
    """Made questions with their pictures and what was answered."""
    return [
        {
            "question": question,
            "pictures": [
                (f"Picture {number} of a question by {question.maker}", as_address(fitted(image)))
                for number, image in enumerate(question.images, 1)
            ],
        }
        for question in run.made
    ]


def _audited(audit: AuditReport, number: int) -> dict[str, Any]:
    """What an audit says, in sentences and in two histograms."""
    margins = {
        title: values
        for title, name in (
            ("with the picture", "margin"),
            ("another picture", "margin_other"),
            ("mean colour", "margin_mean"),
        )
        if len(values := audit.column(name))
    }
    gaps = {"chosen": audit.column("chosen_gap"), "rejected": audit.column("rejected_gap")}
    return {
        "words": audit.words(),
        "plots": [
            histogram("margin, chosen minus rejected (nats)", margins, number),
            histogram("gap to the model's own answer (nats per token)", gaps, number + 1),
        ],
    }


def _rows(compared: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison as a table: rows of (label, score), a cell per compared."""
    every = compared["compared"]
    # comparisons that were saved before questions were asked blind do not say it
    contrasts = [{"survives_blind": False, **contrast} for contrast in compared["contrasts"]]
    beyond = {(c["probe"], c["score"], c["name"]): c for c in contrasts}
    rows = dict.fromkeys(
        (label, score)
        for results in every.values()
        for label, result in results.items()
        for score in result["scores"]
        if not is_constant(score)
    )
    return {
        "names": list(every),
        "against": compared["against"],
        "asked_blind": any(score.endswith(f"/{SEEN}") for _, score in rows),
        "words_mark": WORDS_MARK,
        "words_note": WORDS_NOTE,
        "rows": [
            {
                "probe": label,
                "score": score,
                "cells": [
                    (results.get(label, {}).get("scores", {}).get(score), beyond.get((label, score, name)))
                    for name, results in every.items()
                ],
            }
            for label, score in rows
        ],
    }


def _cost(run: RunFacts) -> list[tuple[str, str]]:
    cost, rows = run.cost, []
    if cost:
        rows.append(("time, all included", f"{cost['seconds']:,.0f} s"))
    if run.rows_per_second:
        what = "roll-outs" if run.settings.get("objective") in ("grpo", "rloo") else "pairs"
        rows.append((f"{what} per second of training", f"{run.rows_per_second:,.1f}"))
    if cost:
        where = "GPU" if cost["device"] == "cuda" else "process"
        rows.append((f"peak memory of the {where}", f"{cost['peak_memory'] / 2**30:,.2f} GiB"))
        rows.append(("floating-point operations, estimated", f"{cost['flops']:.2e}"))
    share = run.pretraining_share()
    if share is not None:
        rows.append(
            (
                "share of the tower's pre-training",
                f"{100 * share[0]:.2g} % of 6 operations per parameter, patch and image for {share[1]:.3g} images, "
                f"what published towers of this type ({run.origin['tower']['model_type']}) saw",
            )
        )
    elif cost:
        rows.append(("share of the tower's pre-training", "not known for this type of tower"))
    return rows
