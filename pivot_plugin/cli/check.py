"""`pivot check`: whether this package is right about a model, shown on the model itself."""

import json
from typing import Annotated

import typer


def check(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Try every promise of a model's adapter on its own weights: trees, gradients, patch grid, encoder out and in.

    pivot check llava-hf/llava-1.5-7b-hf

    Exit status 1 if a promise is broken.
    """
    from dataclasses import asdict

    from pivot_plugin.models.loading import load_model
    from pivot_plugin.testing.conformance import conformance

    loaded, processor = load_model(model, None)
    checks = conformance(loaded, processor)
    if as_json:
        print(json.dumps([asdict(one) for one in checks]))
    else:
        from rich.console import Console
        from rich.table import Table

        colours = {"passed": "green", "failed": "red", "skipped": "yellow"}
        table = Table(title=f"{type(loaded).__name__}: what its adapter promises")
        for column in ("promise", "result", "what was found"):
            table.add_column(column, overflow="fold")
        for one in checks:
            table.add_row(one.name, f"[{colours[one.result]}]{one.result}[/]", one.reason)
        Console().print(table)
    if any(one.result == "failed" for one in checks):
        raise typer.Exit(1)
