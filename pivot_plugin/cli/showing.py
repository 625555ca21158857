"""How commands print what they found: tables that fit eighty columns, and whole sentences."""

import contextlib
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

# hexadecimal digits from which on a text is taken for one
SHORTEST_HASH = 32

if TYPE_CHECKING:
    from pivot_plugin.probes.comparison import Comparison
    from pivot_plugin.runs.instruct import InstructResult
    from pivot_plugin.runs.result import PivotResult
    from pivot_plugin.verdict import Verdict


def readable(name: str, value: object, indent: str = "") -> list[str]:
    """A record as lines that people read: a name and what it is, deeper ones indented, hashes shortened.

    Args:
        name: of the value.
        value: as JSON has it.
        indent: before every line.
    """
    if isinstance(value, Mapping) and value:
        inner = [line for key, one in value.items() for line in readable(str(key), one, f"{indent}  ")]
        return [f"{indent}{name}:", *inner]
    if isinstance(value, list | tuple) and not any(isinstance(one, Mapping | list | tuple) for one in value):
        text = ", ".join(map(_short, value)) or "none"
    else:
        text = _short(value) if not isinstance(value, Mapping | list | tuple) else json.dumps(value)
    return [f"{indent}{name}: {text}"]


def _short(value: object) -> str:
    text = "not known" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    is_hash = len(text) >= SHORTEST_HASH and all(character in "0123456789abcdef" for character in text)
    return f"{text[:12]}..." if is_hash else text


def chatter_aside(as_json: bool) -> contextlib.AbstractContextManager[object]:
    """What is printed meanwhile goes to standard error where standard output is to hold one JSON object.

    Args:
        as_json: whether it is.
    """
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def show_facts(facts: Mapping[str, Any], title: str, as_json: bool) -> None:
    """Print facts by name.

    Args:
        facts: values, or lists of such.
        title: of the table.
        as_json: whether to print them as JSON.
    """
    if as_json:
        print(json.dumps(facts))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text("\n".join(map(str, value)) if isinstance(value, list) else str(value)))
    Console().print(table)


def show_comparison(comparison: "Comparison") -> None:
    """Print a comparison as a table for the terminal.

    Args:
        comparison: of encoders.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    head, *rows = comparison.cells()
    table = Table(caption=Text(comparison.note()), caption_justify="left")
    for index, name in enumerate(head):
        table.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def show_result(result: "PivotResult", quiet: bool) -> None:
    """Print what a run came to: the verdict, what was measured, where the encoder is, what to do next.

    Args:
        result: of the run.
        quiet: whether the encoder's folder alone is wanted.
    """
    from rich.console import Console
    from rich.table import Table

    from pivot_plugin.verdict import READABLE

    folder = result.output_dir
    if quiet:
        print(folder / "encoder")
        return
    _show_verdict(result.verdict)
    if result.metrics:
        rows = result.verdict.rows_are
        table = Table(title=f"Held-out {rows}", show_edge=False)
        for column in ("measure", *result.metrics):
            table.add_column(column, justify="left" if column == "measure" else "right")
        for name in result.metrics["after"]:
            table.add_row(READABLE.get(name, name), *(f"{values[name]:.4f}" for values in result.metrics.values()))
        Console().print(table)
    # paths stay in one line, so that they can be copied
    print(f"Encoder: {folder / 'encoder'}")
    print(f"next: pivot report {folder}   (pivot push {folder} OWNER/NAME --dry-run shows what would be published)")


def show_instructed(result: "InstructResult", as_json: bool) -> None:
    """Print what an alignment or an instruction came to, and where the model is.

    Args:
        result: of the run.
        as_json: whether to print it as JSON.
    """
    folder = result.output_dir / "model"
    if as_json:
        told = {"model": str(folder), "metrics": result.metrics, "trained": result.trained}
        print(json.dumps(told | {"verdict": result.verdict.as_dict()}))
        return
    _show_verdict(result.verdict)
    print(f"MLLM: {folder}")


def _show_verdict(verdict: "Verdict") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    colour = {"better": "green", "worse": "red"}.get(verdict.outcome, "yellow")
    console.print(Text(f"{verdict.title}.", style=f"bold {colour}"))
    for sentence in verdict.sentences():
        console.print(Text(sentence))
