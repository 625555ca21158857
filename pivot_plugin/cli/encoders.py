"""Commands about encoders: extract, export, push, verify, graft, list."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pivot_plugin.choices import ExportTarget, Projector

from .options import AsJson, empty_folder
from .showing import chatter_aside, readable


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved encoder, or of the run that made it.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is created.")] = False,
    revision: Annotated[str, typer.Option(help="Branch; made where it does not exist.")] = "main",
    tag: Annotated[str | None, typer.Option(help="To set on the commit.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Also into a repository with other contents.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every file and the card; send nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Publish a saved encoder on the Hub in one commit. Safe to repeat after a failure.

    pivot push run/encoder me/siglip2-so400m-pivot
    """
    from dataclasses import asdict

    import pivot_plugin as pivot
    from pivot_plugin.encoders.card import CARD, PICTURE

    encoder = folder / "encoder" if (folder / "run.json").is_file() else folder
    published = pivot.publish(
        encoder,
        repo_id,
        private=private or None,
        revision=revision,
        tag=tag,
        commit_message=message,
        create_pr=create_pr,
        exist_ok=exist_ok,
        dry_run=dry_run,
    )
    if as_json:
        print(json.dumps(asdict(published)))
        return
    if dry_run:
        print(f"One commit to {repo_id} ({revision}):")
        for name, size in published.files.items():
            print(f"  {size:>14,}  {name}")
        if published.left_out:
            print(f"Left out: {', '.join(published.left_out)}")
        if PICTURE in published.files:
            print(f"{PICTURE} shows pictures of your held-out rows.")
        print(f"The card, {CARD}, as it will look; its settings and names are those of pivot.json:\n")
        print(published.card)
        return
    print(f"Published: {published.url}")


def verify(
    encoder: Annotated[str, typer.Argument(help="Folder or Hub id of a published encoder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print checks and provenance as JSON.")] = False,
) -> None:
    """Check hashes and features of an encoder and print where it comes from; exit status 1 where a check fails.

    pivot verify me/siglip2-so400m-pivot
    """
    from dataclasses import asdict

    import pivot_plugin as pivot

    report = pivot.verify(encoder, revision)
    commit = report.origin.revision if report.origin else None
    if as_json:
        print(
            json.dumps(
                {
                    "passed": report.passed,
                    "commit": commit,
                    "checks": [asdict(check) for check in report.checks],
                    "provenance": report.provenance(),
                }
            )
        )
    else:
        words = {True: "ok", False: "FAILED", None: "not known"}
        for check in report.checks:
            print(f"{check.name}: {words[check.passed]}: {check.detail}")
        if commit:
            print(f"commit: {commit}")
        for name, value in report.provenance().items():
            print("\n".join(readable(name, value)))
    if not report.passed:
        raise typer.Exit(1)


def graft(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    encoder: Annotated[str, typer.Argument(help="Folder or Hub id of an encoder.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the new MLLM.")],
    projector: Annotated[Projector, typer.Option(help="Whether the MLLM keeps its projector.")] = "keep",
    revision: Annotated[str | None, typer.Option(help="Of the encoder.")] = None,
    seed: Annotated[int, typer.Option(help="Of a new projector.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Put an encoder into an MLLM and save it as an ordinary transformers model with its processor.

    pivot graft llava-hf/llava-1.5-7b-hf me/clip-pivot -o better-llava
    """
    empty_folder(output_dir)
    import pivot_plugin as pivot
    from pivot_plugin.encoders.compatibility import save_model
    from pivot_plugin.files import whole_folder
    from pivot_plugin.models.loading import load_model

    with chatter_aside(as_json):
        loaded, processor = load_model(model)
        pivot.graft(loaded, pivot.load_encoder(encoder, revision), projector, processor=processor, seed=seed)
        with whole_folder(output_dir) as aside:
            save_model(loaded, aside)
            processor.save_pretrained(aside)
    if as_json:
        made = {"model": str(output_dir), "model_class": type(loaded).__name__, "parameters": loaded.num_parameters()}
        print(json.dumps(made | {"encoder": encoder, "projector": projector}))
        return
    print(f"MLLM: {output_dir}")


def extract(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM, or of a LoRA of one.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the encoder.")],
    base: Annotated[str | None, typer.Option(help="MLLM or encoder that training began with, to compare with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Take the vision encoder out of any MLLM, whoever trained it; an adapter (LoRA) is merged first.

    pivot extract ./qwen-lora -o encoder --base Qwen/Qwen2.5-VL-3B-Instruct

    A folder that holds an encoder of ours already is replaced as a whole.
    """
    if not (output_dir / "pivot.json").is_file():
        empty_folder(output_dir)
    from pivot_plugin.encoders import extract as take_out

    taken = take_out(model, output_dir, base=base)
    if as_json:
        change = taken.change
        print(
            json.dumps(
                {
                    "folder": str(taken.folder),
                    "encoder_class": type(taken.encoder).__name__,
                    "parameters": taken.encoder.num_parameters(),
                    "trained": change.trained if change else None,
                    "change": dict(change.parts) if change else None,
                }
            )
        )
        return
    print(f"Encoder: {taken.folder} ({type(taken.encoder).__name__}, {taken.encoder.num_parameters():,} parameters)")
    if taken.change is not None:
        print(taken.change)


def export(
    encoder: Annotated[str, typer.Argument(help="Folder or Hub id of an encoder; with --like also of an MLLM.")],
    target: Annotated[ExportTarget, typer.Option("--for", help="Who is to read it.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write.")],
    like: Annotated[
        str | None, typer.Option(help="A checkpoint of LLaVA-NeXT or InternVL: write the whole of it, in its form.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write an encoder under the names that timm, LLaVA-NeXT, InternVL or transformers 4 read.

    pivot export me/siglip2-so400m-pivot --for timm -o timm-encoder

    With --like the whole checkpoint is written, the encoder in place of its tower; or all weights of an MLLM that was
    trained from it, as `pivot instruct` and `pivot optimize --save-model` leave one.

    pivot export run/encoder --for internvl --like ./InternVL3-2B -o better-internvl
    """
    from pivot_plugin.encoders import export as write_out

    written = write_out(encoder, target, output_dir, like=like)
    if as_json:
        told = {"folder": str(written.folder), "settings": written.settings, "notes": list(written.notes)}
        print(json.dumps(told))
        return
    print(f"For {target}: {written.folder}")
    for name, value in written.settings.items():
        print(f"  {name}: {value}")
    for note in written.notes:
        print(f"  {note}")


def list_published(
    author: Annotated[str | None, typer.Option(help="User or organisation.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List PIVOT encoders on the Hub, with base, family and scores.

    pivot list --author me
    """
    from dataclasses import asdict

    import pivot_plugin as pivot

    published = pivot.list_encoders(author)
    if as_json:
        print(json.dumps([asdict(one) for one in published]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(published)} published encoder(s)")
    for column in ("repository", "base", "family", "scores"):
        table.add_column(column)
    for one in published:
        scores = "\n".join(f"{name} {value:.4g}" for name, value in list(one.scores.items())[:6])
        table.add_row(one.repo_id, one.base, one.family, scores)
    Console().print(table)
