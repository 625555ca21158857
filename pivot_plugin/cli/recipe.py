"""Commands of the group `pivot recipe`: several runs one after another."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_plugin.errors import SettingsError

from .launching import Nodes, relaunched
from .options import (
    ARGUMENTS_OF_SPECS,
    AccelerateConfig,
    Lora,
    MachineRank,
    Machines,
    Processes,
    Rendezvous,
    lora_rank,
    setting,
    settings_of,
)

group = typer.Typer(help="Several runs one after another.", no_args_is_help=True)


@group.command("specs")
def specs(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the base.")],
    questions: Annotated[str, typer.Argument(help="File, folder or Hub id of questions with answers.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the stages.")] = Path("pivot-specs"),
    skip: Annotated[list[str] | None, typer.Option(help="zero, pairs, cold-start or final; repeat it.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Of the cold start, where the stage pairs is skipped.")] = None,
    lora: Lora = "16",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value of all training stages, or stage.name=value of one; repeat it."),
    ] = None,
) -> None:
    """SPECS: a short GRPO, self-distilled pairs, a cold start on them, and GRPO again.

    Finished stages are not run again: the same command goes on where it stopped.

    pivot recipe specs my-model ./questions.jsonl -o out --set zero.max_steps=200 --set pairs.n=8
    """
    common: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}
    for text in settings or []:
        stage, dot, rest = text.partition(".")
        if dot and "=" not in stage:
            name, value = setting(rest)
            stages.setdefault(stage, {})[name] = value
        else:
            common |= settings_of([text], ARGUMENTS_OF_SPECS)
    rank = lora_rank(lora)
    from pivot_plugin import recipes

    with contextlib.redirect_stdout(sys.stderr):
        result = recipes.specs(
            model,
            questions,
            pairs=pairs,
            output_dir=output_dir,
            lora=rank,
            skip=skip or (),
            stages=stages,
            **common,
        )
    for done in result.stages:
        trains = "-" if done.trains is None else done.trains
        print(f"{done.name}: {done.folder} (trains: {trains}; {done.seconds:.0f} s) {json.dumps(done.metrics)}")


@group.command("run")
def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a ready recipe: paper, single-gpu, embedded, twin.")],
    output_dir: Annotated[Path | None, typer.Option("--output-dir", "-o", help="Instead of the recipe's.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Instead of the recipe's, separated by commas.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it, say how many steps, and load nothing.")] = False,
    estimate: Annotated[bool, typer.Option(help="Measure a few steps of every kind beforehand.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores, or the plan, as JSON.")] = False,
    accelerate_config: AccelerateConfig = None,
    num_processes: Processes = None,
    num_machines: Machines = None,
    machine_rank: MachineRank = None,
    rendezvous: Rendezvous = None,
) -> None:
    """The paper's recipe: a bare encoder in, a better one out, proved in a new MLLM; or arms from an MLLM on.

    Finished stages are not run again: the same command goes on where it stopped.

    pivot recipe run embedded -o out
    """
    nodes = Nodes(num_machines, machine_rank, rendezvous)
    if not dry_run and relaunched(accelerate_config, num_processes, nodes):
        return
    with contextlib.redirect_stdout(sys.stderr):
        from pivot_plugin.recipes import PostTrainingResult, load_recipe, plan_recipe, run_recipe

        read = load_recipe(recipe)
        if output_dir is not None:
            read = replace(read, output_dir=output_dir)
        if seeds is not None:
            read = replace(read, seeds=_numbers(seeds))
        if dry_run:
            plan = plan_recipe(read)
        else:
            result = run_recipe(read, estimate=estimate)
    if dry_run:
        print(json.dumps(plan.as_dict()) if as_json else plan)
    else:
        told = result.as_dict() if isinstance(result, PostTrainingResult) else [vars(score) for score in result.scores]
        print(json.dumps(told, default=str) if as_json else result)


@group.command("show")
def show(name: Annotated[str, typer.Argument(help="paper, single-gpu, embedded or twin.")]) -> None:
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
