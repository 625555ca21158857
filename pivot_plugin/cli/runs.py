"""Commands that train: `pivot optimize` and `pivot demo`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pivot_plugin.errors import SettingsError


def optimize(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    prefs: Annotated[str, typer.Argument(help="Preference pairs: a file, folder, zip or Hub id.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the run.")] = Path("pivot-run"),
    objective: Annotated[str, typer.Option(help="dpo, mpo, specs, sft, or a TRL loss type.")] = "dpo",
    train: Annotated[str, typer.Option(help="encoder, encoder+projector or all.")] = "encoder",
    lora: Annotated[str, typer.Option(help="LoRA rank, or none to train the weights themselves.")] = "16",
    eval_prefs: Annotated[str | None, typer.Option(help="Held-out pairs, in the same form.")] = None,
    eval_fraction: Annotated[float, typer.Option(help="Share of the pairs to hold out.")] = 0.02,
    on_bad_row: Annotated[str, typer.Option(help="raise, or skip: leave bad pairs out and list them.")] = "raise",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of TRL's DPOConfig, as name=value; repeat it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a model's vision encoder better on preference pairs.

    pivot optimize llava-hf/llava-1.5-7b-hf ./pairs -o run --set learning_rate=1e-4 --set max_steps=500
    """
    options = dict(_setting(text) for text in settings or [])
    if not (rank := lora.lower()).isdigit() and rank != "none":
        raise SettingsError(f"--lora is {lora!r}.", "Give a rank such as 16, or none.")
    import pivot_plugin as pivot

    # the trainer's log goes to standard output, which holds nothing but JSON if JSON is asked for
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = pivot.optimize(
            model,
            prefs,
            output_dir=output_dir,
            objective=objective,
            train=train,  # type: ignore[arg-type]
            lora=None if rank == "none" else int(rank),
            eval_prefs=eval_prefs,
            eval_fraction=eval_fraction,
            on_bad_row=on_bad_row,  # type: ignore[arg-type]
            resume=resume,
            **options,  # type: ignore[arg-type]
        )
    folder = result.output_dir / "encoder"
    if as_json:
        print(json.dumps({"encoder": str(folder), "metrics": result.metrics, "weight_change": result.weight_change}))
        return
    from rich.console import Console
    from rich.table import Table

    if result.metrics:
        table = Table(title="Held-out pairs")
        for column in ("measure", *result.metrics):
            table.add_column(column, justify="left" if column == "measure" else "right")
        for name in result.metrics["after"]:
            table.add_row(name, *(f"{values[name]:.4f}" for values in result.metrics.values()))
        Console().print(table)
    print(f"Encoder: {folder}")


def _setting(text: str) -> tuple[str, object]:
    """`name=value`, the value read as JSON where it is JSON, and as text otherwise."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise SettingsError(f"--set {text!r} is not name=value.", "For example: --set learning_rate=1e-4.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, {"true": True, "false": False, "none": None}.get(value.lower(), value)


def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the run.")] = Path("pivot-demo"),
) -> None:
    """Run the whole job on a small built-in world: no network, two minutes on a laptop's CPU.

    pivot demo
    """
    from pivot_plugin.quickstart import demo as demonstration

    demonstration.run(output_dir)
