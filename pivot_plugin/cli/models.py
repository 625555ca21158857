"""Commands about models: `pivot inspect`, `pivot assemble`, `pivot check`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, empty_folder
from .showing import chatter_aside


def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what the family adapter sees in a model, without loading its weights.

    pivot inspect Qwen/Qwen2.5-VL-3B-Instruct
    """
    from pivot_plugin.training.inspection import inspect_model

    facts = inspect_model(model)
    if as_json:
        print(json.dumps(facts))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=Path(model).name, show_header=False)
    for name, value in facts.items():
        table.add_row(name, "\n".join(map(str, value)) if isinstance(value, list) else str(value))
    Console().print(table)


def assemble(
    encoder: Annotated[str, typer.Argument(help="Folder or Hub id of a vision encoder.")],
    language_model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the MLLM.")],
    feature_layer: Annotated[int, typer.Option(help="Hidden state that the projector reads.")] = -2,
    chat_template: Annotated[str | None, typer.Option(help="chatml, plain, or Jinja, where there is none.")] = None,
    seed: Annotated[int, typer.Option(help="Of the projector's weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Join a vision encoder and a language model to an MLLM, in an ordinary transformers folder.

    pivot assemble google/siglip2-so400m-patch16-384 Qwen/Qwen2.5-1.5B-Instruct -o mllm
    """
    empty_folder(output_dir)
    import pivot_plugin as pivot
    from pivot_plugin.encoders.compatibility import save_model
    from pivot_plugin.files import whole_folder

    with chatter_aside(as_json):
        model, processor = pivot.assemble(
            encoder, language_model, feature_layer=feature_layer, chat_template=chat_template, seed=seed
        )
        with whole_folder(output_dir) as aside:
            save_model(model, aside)
            processor.save_pretrained(aside)
    if as_json:
        made = {"model": str(output_dir), "model_class": type(model).__name__, "parameters": model.num_parameters()}
        print(json.dumps(made))
        return
    print(f"MLLM: {output_dir} ({model.num_parameters():,} parameters)")


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
    from pivot_plugin.testing import conformance

    loaded, processor = load_model(model, None)
    checks = conformance(loaded, processor)
    if as_json:
        print(json.dumps([asdict(one) for one in checks]))
    else:
        from rich.console import Console
        from rich.table import Table

        colours = {"passed": "green", "failed": "red", "not verified": "yellow", "skipped": "yellow"}
        table = Table(title=f"{type(loaded).__name__}: what its adapter promises")
        for column in ("promise", "result", "what was found"):
            table.add_column(column, overflow="fold")
        for one in checks:
            table.add_row(one.name, f"[{colours[one.result]}]{one.result}[/]", one.reason)
        Console().print(table)
    if any(one.result == "failed" for one in checks):
        raise typer.Exit(1)
