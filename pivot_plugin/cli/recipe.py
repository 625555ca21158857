"""Commands of the whole recipe: `pivot assemble`, `align`, `instruct`, `recipe run`, `recipe show`."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pivot_plugin.errors import SettingsError

from .launching import ACCELERATE, PROCESSES, relaunched
from .runs import lora_rank, setting

Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any field of TRL's SFTConfig, as name=value; repeat it.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")]
ImageFolder = Annotated[Path | None, typer.Option(help="What relative image paths start from.")]
Fraction = Annotated[float, typer.Option(help="Share of the rows to hold out.")]
OnBadRow = Annotated[str, typer.Option(help="raise, or skip: leave bad rows out and list them.")]
AccelerateConfig = Annotated[Path | None, ACCELERATE]
Processes = Annotated[int | None, PROCESSES]


def assemble(
    encoder: Annotated[str, typer.Argument(help="Folder or Hub id of a vision encoder.")],
    language_model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the MLLM.")],
    feature_layer: Annotated[int, typer.Option(help="Hidden state that the projector reads.")] = -2,
    chat_template: Annotated[str | None, typer.Option(help="chatml, plain, or Jinja, where there is none.")] = None,
    seed: Annotated[int, typer.Option(help="Of the projector's weights.")] = 0,
) -> None:
    """Join a vision encoder and a language model to an MLLM, in an ordinary transformers folder.

    pivot assemble google/siglip2-so400m-patch16-384 Qwen/Qwen2.5-1.5B-Instruct -o mllm
    """
    if output_dir.exists() and any(output_dir.iterdir()):
        raise SettingsError(f"{str(output_dir)!r} is not empty.", "Choose another folder.")
    import pivot_plugin as pivot

    model, processor = pivot.assemble(
        encoder, language_model, feature_layer=feature_layer, chat_template=chat_template, seed=seed
    )
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    print(f"MLLM: {output_dir} ({model.num_parameters():,} parameters)")


def align(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    captions: Annotated[str, typer.Argument(help="Images with captions: a file, folder, zip or Hub id.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the run.")] = Path("pivot-align"),
    image_folder: ImageFolder = None,
    eval_fraction: Fraction = 0.0,
    on_bad_row: OnBadRow = "raise",
    resume: Resume = False,
    settings: Settings = None,
    accelerate_config: AccelerateConfig = None,
    num_processes: Processes = None,
) -> None:
    """Teach an MLLM's projector the language of its language model.

    pivot align mllm blip_laion_cc_sbu_558k.json --image-folder images -o aligned
    """
    options = dict(setting(text) for text in settings or [])
    if relaunched(accelerate_config, num_processes):
        return
    import pivot_plugin as pivot

    result = pivot.align(
        *(model, captions),
        output_dir=output_dir,
        image_folder=image_folder,
        eval_fraction=eval_fraction,
        on_bad_row=on_bad_row,  # type: ignore[arg-type]
        resume=resume,
        **options,  # type: ignore[arg-type]
    )
    print(f"MLLM: {result.output_dir / 'model'}")


def instruct(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    conversations: Annotated[str, typer.Argument(help="Conversations: a file, folder, zip or Hub id.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the run.")] = Path("pivot-instruct"),
    train: Annotated[str, typer.Option(help="projector+language_model, all, ...")] = "projector+language_model",
    lora: Annotated[str, typer.Option(help="LoRA rank, or none to train the weights themselves.")] = "none",
    image_folder: ImageFolder = None,
    eval_fraction: Fraction = 0.0,
    on_bad_row: OnBadRow = "raise",
    resume: Resume = False,
    settings: Settings = None,
    accelerate_config: AccelerateConfig = None,
    num_processes: Processes = None,
) -> None:
    """Teach an MLLM to answer questions about images.

    pivot instruct aligned/model conversations.json --train all -o instructed
    """
    options = dict(setting(text) for text in settings or [])
    rank = lora_rank(lora)
    if relaunched(accelerate_config, num_processes):
        return
    import pivot_plugin as pivot

    result = pivot.instruct(
        *(model, conversations),
        output_dir=output_dir,
        train=train,  # type: ignore[arg-type]
        lora=rank,
        image_folder=image_folder,
        eval_fraction=eval_fraction,
        on_bad_row=on_bad_row,  # type: ignore[arg-type]
        resume=resume,
        **options,  # type: ignore[arg-type]
    )
    print(f"MLLM: {result.output_dir / 'model'}")


def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a ready recipe: paper, single-gpu, embedded.")],
    output_dir: Annotated[Path | None, typer.Option("--output-dir", "-o", help="Instead of the recipe's.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Instead of the recipe's, separated by commas.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it, say how many steps, and load nothing.")] = False,
    estimate: Annotated[bool, typer.Option(help="Measure a few steps of every kind beforehand.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores, or the plan, as JSON.")] = False,
    accelerate_config: AccelerateConfig = None,
    num_processes: Processes = None,
) -> None:
    """The paper's recipe: a bare encoder in, a better one out, proved in a new MLLM.

    Finished stages are not run again: the same command goes on where it stopped.

    pivot recipe run embedded -o out
    """
    if not dry_run and relaunched(accelerate_config, num_processes):
        return
    with contextlib.redirect_stdout(sys.stderr):
        from pivot_plugin.recipes import load_recipe, plan_recipe, run_recipe

        read = load_recipe(recipe)
        if output_dir is not None:
            read = replace(read, output_dir=output_dir)
        if seeds is not None:
            read = replace(read, seeds=_numbers(seeds))
        found = plan_recipe(read) if dry_run else run_recipe(read, estimate=estimate)
    if not as_json:
        print(found)
        return
    rows = [vars(score) for score in getattr(found, "scores", [])]
    print(json.dumps(found.as_dict() if dry_run else rows))  # type: ignore[union-attr]


def show(name: Annotated[str, typer.Argument(help="paper, single-gpu or embedded.")]) -> None:
    """Print a ready recipe, to begin one's own with.

    pivot recipe show paper > mine.yaml
    """
    from pivot_plugin.recipes import ready_recipe

    print(ready_recipe(name), end="")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SettingsError(f"--seeds is {text!r}.", "Give numbers separated by commas, such as 0,1,2.") from error
