"""Commands that train: `pivot optimize`, `pivot compare-arms`, `pivot recipe`, `pivot demo`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_plugin.errors import SettingsError

from .launching import ACCELERATE, PROCESSES, relaunched


def optimize(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    prefs: Annotated[str, typer.Argument(help="Pairs, or questions for grpo and rloo: a file, folder, zip or Hub id.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the run.")] = Path("pivot-run"),
    objective: Annotated[str, typer.Option(help="dpo, mpo, specs, sft, grpo, rloo, ... or a TRL loss type.")] = "dpo",
    train: Annotated[str, typer.Option(help="encoder, encoder+projector, language_model or all.")] = "encoder",
    lora: Annotated[str, typer.Option(help="LoRA rank, or none to train the weights themselves.")] = "16",
    eval_prefs: Annotated[str | None, typer.Option(help="Held-out pairs, in the same form.")] = None,
    eval_fraction: Annotated[float, typer.Option(help="Share of the pairs to hold out.")] = 0.02,
    rewards: Annotated[
        list[str] | None, typer.Option("--reward", help="For grpo and rloo: name, or name=weight; repeat it.")
    ] = None,
    on_bad_row: Annotated[str, typer.Option(help="raise, or skip: leave bad pairs out and list them.")] = "raise",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of TRL's DPOConfig, as name=value; repeat it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    accelerate_config: Annotated[Path | None, ACCELERATE] = None,
    num_processes: Annotated[int | None, PROCESSES] = None,
) -> None:
    """Make a model's vision encoder better on preference pairs.

    pivot optimize llava-hf/llava-1.5-7b-hf ./pairs -o run --set learning_rate=1e-4 --set max_steps=500
    """
    options = dict(setting(text) for text in settings or [])
    rank = lora_rank(lora)
    if rewards:
        weighted = [reward_weight(text) for text in rewards]
        options |= {"rewards": [name for name, _ in weighted], "reward_weights": [weight for _, weight in weighted]}
    if relaunched(accelerate_config, num_processes):
        return
    import pivot_plugin as pivot

    # the trainer's log goes to standard output, which holds nothing but JSON if JSON is asked for
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = pivot.optimize(
            model,
            prefs,
            output_dir=output_dir,
            objective=objective,
            train=train,  # type: ignore[arg-type]
            lora=rank,
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


def compare_arms(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    prefs: Annotated[str, typer.Argument(help="Preference pairs: a file, folder, zip or Hub id.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the runs.")] = Path("pivot-arms"),
    arms: Annotated[str, typer.Option(help="Objectives, separated by commas.")] = "sft,dpo,mpo",
    seeds: Annotated[int, typer.Option(help="How many.")] = 3,
    rates: Annotated[
        list[str] | None, typer.Option("--learning-rate", help="Of one arm, as arm=value; repeat it.")
    ] = None,
    train: Annotated[str, typer.Option(help="encoder, encoder+projector, language_model or all.")] = "encoder",
    lora: Annotated[str, typer.Option(help="LoRA rank, or none to train the weights themselves.")] = "16",
    eval_prefs: Annotated[str | None, typer.Option(help="Held-out pairs, the same for all.")] = None,
    eval_fraction: Annotated[float, typer.Option(help="Share of the pairs to hold out.")] = 0.02,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of TRL's DPOConfig, as name=value; repeat it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every run as JSON.")] = False,
) -> None:
    """Run several objectives on the same pairs, in the same order, with several seeds, and print the table.

    Finished runs are not run again: the same command goes on where it stopped.

    pivot compare-arms my-model ./pairs --arms sft,dpo,mpo --seeds 3 --learning-rate sft=5e-4 --set max_steps=500
    """
    options = dict(setting(text) for text in settings or [])
    learning_rates = dict(map(setting, rates or []))
    for name, value in learning_rates.items():
        if not isinstance(value, int | float):
            raise SettingsError(f"--learning-rate {name}={value!r} is no number.", "For example: sft=5e-4.")
    rank = lora_rank(lora)
    import pivot_plugin as pivot

    with contextlib.redirect_stdout(sys.stderr):
        comparison = pivot.compare_arms(
            model,
            prefs,
            [arm.strip() for arm in arms.split(",") if arm.strip()],
            seeds,
            eval_prefs=eval_prefs,
            eval_fraction=eval_fraction,
            output_dir=output_dir,
            learning_rates=learning_rates,  # type: ignore[arg-type]
            train=train,
            lora=rank,
            **options,  # type: ignore[arg-type]
        )
    print(json.dumps([vars(run) for run in comparison.runs]) if as_json else comparison)


def specs(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the base.")],
    questions: Annotated[str, typer.Argument(help="File, folder or Hub id of questions with answers.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the stages.")] = Path("pivot-specs"),
    skip: Annotated[list[str] | None, typer.Option(help="zero, pairs, cold-start or final; repeat it.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Of the cold start, where the stage pairs is skipped.")] = None,
    lora: Annotated[str, typer.Option(help="LoRA rank, or none to train the weights themselves.")] = "16",
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
    stages: dict[str, dict[str, object]] = {}
    for text in settings or []:
        stage, dot, rest = text.partition(".")
        if dot and "=" not in stage:
            name, value = setting(rest)
            stages.setdefault(stage, {})[name] = value
        else:
            common |= dict([setting(text)])
    rank = lora_rank(lora)
    from pivot_plugin import recipes

    with contextlib.redirect_stdout(sys.stderr):
        result = recipes.specs(
            *(model, questions),
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


def lora_rank(text: str) -> int | None:
    """A rank, or None for "none"."""
    if not text.isdigit() and text.lower() != "none":
        raise SettingsError(f"--lora is {text!r}.", "Give a rank such as 16, or none.")
    return int(text) if text.isdigit() else None


def reward_weight(text: str) -> tuple[str, float]:
    """`name` or `name=weight`."""
    name, equals, weight = text.partition("=")
    try:
        return name, float(weight) if equals else 1.0
    except ValueError as error:
        raise SettingsError(
            f"--reward {text!r}: {weight!r} is no number.", "For example: --reward format=0.5."
        ) from error


def setting(text: str) -> tuple[str, object]:
    """`name=value`, the value read as JSON where it is JSON, and as text otherwise."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise SettingsError(f"{text!r} is not name=value.", "For example: --set learning_rate=1e-4.")
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
