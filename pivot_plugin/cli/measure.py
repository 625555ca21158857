"""Commands that measure: `pivot compare`, `pivot report`, `pivot benchmark`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_plugin.errors import SettingsError

from .options import AsJson, setting
from .showing import chatter_aside, show_comparison


def compare(
    examined: Annotated[
        list[str],
        typer.Argument(help="Models, encoders or runs: folders or Hub ids, what the others are held against first."),
    ],
    probes: Annotated[
        list[str] | None,
        typer.Option(
            "--probe", help="name=data, or label:name=data; repeat it. Names: linear, prototype, segmentation, ..."
        ),
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="Of one probe, as label.name=value; repeat it.")
    ] = None,
    mllm: Annotated[str | None, typer.Option(help="MLLM to graft encoders into, for probes that need one.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the results.")] = None,
    extract: Annotated[
        bool, typer.Option("--extract", help="Take the towers out of MLLMs first, and examine them by themselves.")
    ] = False,
    extract_to: Annotated[Path | None, typer.Option(help="Folder that keeps the extracted encoders.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Run probes on several encoders and mark which differences are beyond noise.

    pivot compare google/siglip2-base-patch16-384 run/encoder --probe linear=imagenet-1k --probe segmentation=ade20k

    With --extract two MLLMs are asked whether the tower got better: linear and knn of one data set, and what else is
    given; --probe ravel=captions.jsonl with the first one's language model, --probe vqa=questions.jsonl with and
    without the picture.

    pivot compare Qwen/Qwen2.5-VL-3B-Instruct my-checkpoint --extract --probe linear=./flowers
    """
    options_of: dict[str, dict[str, Any]] = {}
    for text in options or []:
        label, dot, rest = text.partition(".")
        if not dot:
            raise SettingsError(f"--option {text!r} is not label.name=value.", "For example: --option linear.seed=1.")
        name, value = setting(rest)
        options_of.setdefault(label, {})[name] = value
    data_of = dict(_probe(text) for text in probes or [])
    if unknown := sorted(set(options_of) - set(data_of)):
        raise SettingsError(
            f"--option names the probe {unknown[0]!r}.", f"The probes are {', '.join(data_of) or 'none'}."
        )
    from pivot_plugin.probes import ProbeTask
    from pivot_plugin.probes.comparison import compare as compare_all

    tasks = {label: ProbeTask(probe, data, options_of.get(label, {})) for label, (probe, data) in data_of.items()}
    comparison = compare_all(examined, tasks, mllm=mllm, output=output, extract=extract_to or extract)
    if as_json:
        print(json.dumps(comparison.as_dict()))
    elif sys.stdout.isatty():
        show_comparison(comparison)
    else:
        print(comparison)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="HTML file to write.", show_default="report.html in the first run"),
    ] = None,
    comparison: Annotated[
        Path | None, typer.Option(help="JSON of `pivot compare -o`; by default comparison.json in the first run.")
    ] = None,
    audit: Annotated[
        Path | None, typer.Option(help="JSON of `pivot prefs audit -o`; by default audit.json in the first run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page about runs: pairs, curves, probes, saliency, cost, provenance.

    pivot report run
    """
    results: dict[str, Any] | None = None
    if comparison is not None:
        try:
            results = json.loads(comparison.read_text())
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{str(comparison)!r} is no comparison: {error}", "Give what `pivot compare -o` wrote."
            ) from error
    from pivot_plugin.preferences import AuditReport
    from pivot_plugin.report import write_report

    audited = None if audit is None else AuditReport.load(audit)
    page = runs[0] / "report.html" if output is None else output
    if output is None and not runs[0].is_dir():
        raise SettingsError(f"There is no folder {str(runs[0])!r}.", "Give the output_dir of pivot optimize -o.")
    with chatter_aside(as_json):
        written = write_report(page, runs, results, audited)
    print(json.dumps({"report": str(written), "runs": list(map(str, runs))}) if as_json else f"Report: {written}")


def benchmark(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    groups: Annotated[
        list[str] | None,
        typer.Option("--group", help="general, knowledge, ocr-chart or vision-centric; repeat it. All by default."),
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="For lmms-eval's results.")] = Path(
        "pivot-benchmarks"
    ),
    limit: Annotated[int | None, typer.Option(help="Questions of each benchmark.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at once.")] = 1,
    python: Annotated[str, typer.Option(help="Interpreter of the environment that has lmms-eval.")] = sys.executable,
    blind: Annotated[bool, typer.Option("--blind", help="Run them again with every picture one grey.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and do nothing.")] = False,
) -> None:
    """Run the paper's sixteen benchmarks by lmms-eval.

    pivot benchmark ./my-model --group vision-centric --python ~/lmms/bin/python
    """
    import shlex

    from pivot_plugin.probes.benchmarks import GROUPS, benchmark_command, run_benchmarks

    chosen = groups or list(GROUPS)
    if dry_run:
        print(
            shlex.join(benchmark_command(model, chosen, output_dir, limit=limit, batch_size=batch_size, python=python))
        )
        return
    metrics = run_benchmarks(model, chosen, output_dir, limit=limit, batch_size=batch_size, python=python, blind=blind)
    print(json.dumps(metrics, indent=1))


def _probe(text: str) -> tuple[str, tuple[str, str]]:
    """`name=data` or `label:name=data`."""
    named, equals, data = text.partition("=")
    label, _, name = named.rpartition(":")
    if not equals or not name or not data:
        raise SettingsError(f"--probe {text!r} is not name=data.", "For example: --probe linear=./flowers.")
    return label or name, (name, data)
