"""Commands that train: `pivot optimize`, `compare-arms`, `align`, `instruct`, `demo`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_plugin.choices import Train
from pivot_plugin.errors import SettingsError

from .launching import Nodes, relaunched
from .options import (
    AccelerateConfig,
    BadRows,
    DPOSettings,
    HeldOutShare,
    ImageFolder,
    Lora,
    MachineRank,
    Machines,
    Processes,
    Rendezvous,
    Resume,
    RunFolder,
    SFTSettings,
    TrainedParts,
    lora_rank,
    reward_weight,
    setting,
    settings_of,
)


def optimize(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    prefs: Annotated[str, typer.Argument(help="Pairs, or questions with --reward: a file, folder, zip or Hub id.")],
    output_dir: RunFolder = Path("pivot-run"),
    objective: Annotated[str, typer.Option(help="dpo, mpo, specs, sft, grpo, rloo, ... or a TRL loss type.")] = "dpo",
    train: TrainedParts = "encoder",
    lora: Lora = "16",
    eval_prefs: Annotated[str | None, typer.Option(help="Held-out pairs, in the same form.")] = None,
    eval_fraction: Annotated[float, typer.Option(help="Share of the pairs to hold out.")] = 0.02,
    rewards: Annotated[
        list[str] | None,
        typer.Option("--reward", help="Of the model's answers to questions: name, or name=weight; repeat it."),
    ] = None,
    image_folder: ImageFolder = None,
    on_bad_row: BadRows = "raise",
    resume: Resume = False,
    keep_model: Annotated[
        bool, typer.Option("--save-model", help="Write the whole MLLM too, into `model` in the run's folder.")
    ] = False,
    settings: DPOSettings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    memory_plan: Annotated[
        bool, typer.Option("--plan", help="Say what it takes of a GPU's memory under each engine, and load nothing.")
    ] = False,
    accelerate_config: AccelerateConfig = None,
    num_processes: Processes = None,
    num_machines: Machines = None,
    machine_rank: MachineRank = None,
    rendezvous: Rendezvous = None,
) -> None:
    """Make a model's vision encoder better on preference pairs: given ones, or the model's own answers to questions.

    pivot optimize llava-hf/llava-1.5-7b-hf ./pairs -o run --set learning_rate=1e-4 --set max_steps=500

    pivot optimize llava-hf/llava-1.5-7b-hf ./questions --reward accuracy --set samples=8 --set rounds=2
    """
    options = settings_of(settings)
    rank = lora_rank(lora)
    if memory_plan:
        _print_plan(model, train, rank, num_processes, options)
        return
    if rewards:
        weighted = [reward_weight(text) for text in rewards]
        options |= {"rewards": [name for name, _ in weighted], "reward_weights": [weight for _, weight in weighted]}
    if relaunched(accelerate_config, num_processes, Nodes(num_machines, machine_rank, rendezvous)):
        return
    questions = bool(rewards) or objective in ("grpo", "rloo")
    import pivot_plugin as pivot

    # the trainer's log goes to standard output, which holds nothing but JSON if JSON is asked for
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = pivot.optimize(
            model,
            _rows(prefs, "prefs", image_folder, questions),
            output_dir=output_dir,
            objective=objective,
            train=train,
            lora=rank,
            eval_prefs=None if eval_prefs is None else _rows(eval_prefs, "eval_prefs", image_folder, questions),
            eval_fraction=eval_fraction,
            on_bad_row=on_bad_row,
            resume=resume,
            **options,
        )
    if keep_model:
        from pivot_plugin.recipes.runs import save_model

        save_model(result.model, result.processor, result.output_dir / "model")
    folder = result.output_dir / "encoder"
    if as_json:
        told = {"encoder": str(folder), "metrics": result.metrics, "weight_change": result.weight_change}
        print(json.dumps(told | {"answers": [summary.as_dict() for summary in result.answers]}))
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
    if keep_model:
        print(f"MLLM: {result.output_dir / 'model'}")


def _print_plan(model: str, train: Train, lora: int | None, num_processes: int | None, options: dict[str, Any]) -> None:
    """What a run would take of a GPU's memory."""
    import pivot_plugin as pivot

    told = {"gradient_checkpointing": "gradient_checkpointing", "per_device_train_batch_size": "pairs"}
    settings = {ours: options[name] for name, ours in told.items() if name in options}
    print(pivot.plan(model, train=train, lora=lora, processes=num_processes, **settings))


def _rows(source: str, name: str, image_folder: Path | None, questions: bool) -> object:
    """What is trained on: a path as it is, or the rows whose images lie in another folder."""
    if image_folder is None:
        return source
    from pivot_plugin.preferences import load, load_questions

    if questions:
        return load_questions(source, name, image_folder=image_folder)
    return load(source, name=name, image_folder=image_folder)


def compare_arms(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    prefs: Annotated[str, typer.Argument(help="Preference pairs: a file, folder, zip or Hub id.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the runs.")] = Path("pivot-arms"),
    arms: Annotated[str, typer.Option(help="Objectives, separated by commas.")] = "sft,dpo,mpo",
    seeds: Annotated[int, typer.Option(help="How many.")] = 3,
    rates: Annotated[
        list[str] | None, typer.Option("--learning-rate", help="Of one arm, as arm=value; repeat it.")
    ] = None,
    train: TrainedParts = "encoder",
    lora: Lora = "16",
    eval_prefs: Annotated[str | None, typer.Option(help="Held-out pairs, the same for all.")] = None,
    eval_fraction: Annotated[float, typer.Option(help="Share of the pairs to hold out.")] = 0.02,
    settings: DPOSettings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every run as JSON.")] = False,
) -> None:
    """Run several objectives on the same pairs, in the same order, with several seeds, and print the table.

    Finished runs are not run again: the same command goes on where it stopped.

    pivot compare-arms my-model ./pairs --arms sft,dpo,mpo --seeds 3 --learning-rate sft=5e-4 --set max_steps=500
    """
    options = settings_of(settings)
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
            learning_rates=learning_rates,
            train=train,
            lora=rank,
            **options,
        )
    print(json.dumps([vars(run) for run in comparison.runs]) if as_json else comparison)


def align(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    captions: Annotated[str, typer.Argument(help="Images with captions: a file, folder, zip or Hub id.")],
    output_dir: RunFolder = Path("pivot-align"),
    image_folder: ImageFolder = None,
    eval_fraction: HeldOutShare = 0.0,
    on_bad_row: BadRows = "raise",
    resume: Resume = False,
    settings: SFTSettings = None,
    accelerate_config: AccelerateConfig = None,
    num_processes: Processes = None,
    num_machines: Machines = None,
    machine_rank: MachineRank = None,
    rendezvous: Rendezvous = None,
) -> None:
    """Teach an MLLM's projector the language of its language model.

    pivot align mllm blip_laion_cc_sbu_558k.json --image-folder images -o aligned
    """
    options = settings_of(settings)
    if relaunched(accelerate_config, num_processes, Nodes(num_machines, machine_rank, rendezvous)):
        return
    import pivot_plugin as pivot

    result = pivot.align(
        model,
        captions,
        output_dir=output_dir,
        image_folder=image_folder,
        eval_fraction=eval_fraction,
        on_bad_row=on_bad_row,
        resume=resume,
        **options,
    )
    print(f"MLLM: {result.output_dir / 'model'}")


def instruct(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    conversations: Annotated[str, typer.Argument(help="Conversations: a file, folder, zip or Hub id.")],
    output_dir: RunFolder = Path("pivot-instruct"),
    train: TrainedParts = "projector+language_model",
    lora: Lora = "none",
    image_folder: ImageFolder = None,
    eval_fraction: HeldOutShare = 0.0,
    on_bad_row: BadRows = "raise",
    resume: Resume = False,
    settings: SFTSettings = None,
    accelerate_config: AccelerateConfig = None,
    num_processes: Processes = None,
    num_machines: Machines = None,
    machine_rank: MachineRank = None,
    rendezvous: Rendezvous = None,
) -> None:
    """Teach an MLLM to answer questions about images.

    pivot instruct aligned/model conversations.json --train all -o instructed
    """
    options = settings_of(settings)
    rank = lora_rank(lora)
    if relaunched(accelerate_config, num_processes, Nodes(num_machines, machine_rank, rendezvous)):
        return
    import pivot_plugin as pivot

    result = pivot.instruct(
        model,
        conversations,
        output_dir=output_dir,
        train=train,
        lora=rank,
        image_folder=image_folder,
        eval_fraction=eval_fraction,
        on_bad_row=on_bad_row,
        resume=resume,
        **options,
    )
    print(f"MLLM: {result.output_dir / 'model'}")


def demo(
    output_dir: RunFolder = Path("pivot-demo"),
) -> None:
    """Run the whole job on a small built-in world: no network, under four minutes on two CPU cores.

    pivot demo
    """
    from pivot_plugin.quickstart import demo as demonstration

    demonstration.run(output_dir)
