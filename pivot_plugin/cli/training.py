"""Commands that train: `pivot optimize`, `compare-arms`, `align`, `instruct`, `demo`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_plugin.choices import Train
from pivot_plugin.errors import SettingsError

from . import display, early
from .config_file import Config
from .launching import Nodes, relaunched
from .options import (
    AccelerateConfig,
    AllowUrls,
    AsJson,
    BadRows,
    Columns,
    Difficulty,
    DPOSettings,
    HeldOutShare,
    ImageFolder,
    LearningRate,
    Lora,
    MachineRank,
    Machines,
    MadeCount,
    Makers,
    Processes,
    Quiet,
    Rendezvous,
    Resume,
    RunFolder,
    SFTSettings,
    Split,
    TrainedParts,
    Verbose,
    columns_given,
    lora_rank,
    making_options,
    rewards_given,
    setting,
    settings_of,
)
from .showing import chatter_aside, show_facts, show_instructed, show_result


def optimize(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id of an MLLM.")] = None,
    prefs: Annotated[
        str | None,
        typer.Argument(help="Pairs, questions (--reward) or pictures (--make): a file, folder, zip or Hub id."),
    ] = None,
    output_dir: RunFolder = Path("pivot-run"),
    objective: Annotated[
        str,
        typer.Option(
            help="dpo, mpo, specs, sft, ipo, dpo_norm, mdpo, svco, grpo, rloo, a plugin's, or a TRL loss type."
        ),
    ] = "dpo",
    train: TrainedParts = "encoder",
    lora: Lora = "16",
    learning_rate: LearningRate = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Pairs at once (roll-outs, for grpo): per_device_train_batch_size.", show_default="8"),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps.", show_default="3 epochs of pairs")] = None,
    eval_prefs: Annotated[str | None, typer.Option(help="Held-out pairs or pictures, in the same form.")] = None,
    eval_fraction: Annotated[float, typer.Option(help="Share of the pairs to hold out.")] = 0.02,
    rewards: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            help="Of the model's answers to questions: a name, file.py:function or package.module.function; with "
            "=weight; repeat it. Names: accuracy, exact_match, multiple_choice, numeric, bleu, rouge_l, box_iou, "
            "format, ...",
        ),
    ] = None,
    make: Makers = None,
    difficulty: Difficulty = None,
    count: MadeCount = None,
    columns: Columns = None,
    split: Split = None,
    allow_urls: AllowUrls = False,
    image_folder: ImageFolder = None,
    on_bad_row: BadRows = "raise",
    resume: Resume = False,
    keep_model: Annotated[
        bool, typer.Option("--save-model", help="Write the whole MLLM too, into `model` in the run's folder.")
    ] = False,
    settings: DPOSettings = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML with all of this by name; `pivot init` writes one.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look at model and data, say what would happen and cost; train nothing.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
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

    pivot optimize llava-hf/llava-1.5-7b-hf ./pairs -o run --learning-rate 1e-4 --max-steps 500

    pivot optimize llava-hf/llava-1.5-7b-hf ./questions --reward accuracy --set samples=8 --set rounds=2

    pivot optimize llava-hf/llava-1.5-7b-hf ./photos --make jigsaw --difficulty 0.5 --objective grpo

    pivot optimize --config run.yaml --resume
    """
    said = Config(context, config)
    model, prefs = said.of("model", model), said.of("prefs", prefs)
    if model is None or (prefs is None and not memory_plan):
        raise SettingsError(
            f"No {'model is' if model is None else 'pairs to train on are'} named.",
            "For example: pivot optimize llava-hf/llava-1.5-7b-hf ./pairs -o run; or --config run.yaml (pivot init).",
        )
    objective, rewards = said.of("objective", objective), said.of("rewards", rewards)
    columns_of = columns_given(said.of("columns", columns))
    options = said.settings | settings_of(settings)
    for name, value in (
        ("learning_rate", learning_rate),
        ("per_device_train_batch_size", batch_size),
        ("max_steps", max_steps),
    ):
        if value is not None:
            options[name] = value
    made = making_options(said.of("make", make), said.of("difficulty", difficulty), said.of("count", count))
    online = objective in early.ONLINE
    questions = online or bool(rewards) or bool(made)
    early.check_objective(objective)
    early.check_settings(
        options,
        objective if online else "pairs",
        questions and not online,
        f"optimize with objective={objective!r}",
    )
    rank = lora_rank(str(said.of("lora", lora)))
    early.check_model(model)
    if memory_plan:
        _print_plan(model, said.of("train", train), rank, num_processes, options)
        return
    for name in (prefs, said.of("eval_prefs", eval_prefs)):
        early.check_data(name)
    if rewards:
        options |= rewards_given(rewards)
    reading: dict[str, Any] = {
        "columns": columns_of,
        "split": said.of("split", split),
        "allow_urls": said.of("allow_urls", allow_urls),
        "image_folder": said.of("image_folder", image_folder),
    }
    reading = {name: value for name, value in reading.items() if value}
    folder = Path(said.of("output_dir", output_dir))
    fixed = {
        "output_dir": folder,
        "objective": objective,
        "train": said.of("train", train),
        "lora": rank,
        "eval_prefs": said.of("eval_prefs", eval_prefs),
        "eval_fraction": said.of("eval_fraction", eval_fraction),
        "on_bad_row": said.of("on_bad_row", on_bad_row),
        **reading,
        **made,
    }
    if dry_run and made:
        raise SettingsError(
            "--dry-run looks at every row, and --make makes them when they are needed.",
            "Write them with `pivot prefs make`, and look at those.",
        )
    if not dry_run and relaunched(accelerate_config, num_processes, Nodes(num_machines, machine_rank, rendezvous)):
        return
    if dry_run:
        from pivot_plugin.runs.forecast import forecast

        show_facts(forecast(model, prefs, fixed, options, questions), "What would be trained", as_json)
        return
    from accelerate import PartialState

    import pivot_plugin as pivot

    # the trainer's log goes to standard output, which holds nothing but JSON if JSON is asked for
    with (
        chatter_aside(as_json),
        display.of_a_run(folder, quiet or as_json, verbose) as shown,
    ):
        result = pivot.optimize(model, prefs, resume=resume, display=shown, **fixed, **options)
    if not PartialState().is_main_process:
        # who has the result, and says so
        return
    if said.of("keep_model", keep_model, "save_model"):
        from pivot_plugin.recipes.runs import save_model

        save_model(result.model, result.processor, result.output_dir / "model")
        keep_model = True
    encoder = result.output_dir / "encoder"
    if as_json:
        told = {"encoder": str(encoder), "metrics": result.metrics, "weight_change": result.weight_change}
        told["verdict"] = result.verdict.as_dict()
        print(json.dumps(told | {"answers": [summary.as_dict() for summary in result.answers]}))
        return
    show_result(result, quiet)
    if keep_model:
        print(f"MLLM: {result.output_dir / 'model'}")


def _print_plan(model: str, train: Train, lora: int | None, num_processes: int | None, options: dict[str, Any]) -> None:
    """What a run would take of a GPU's memory."""
    import pivot_plugin as pivot

    told = {"gradient_checkpointing": "gradient_checkpointing", "per_device_train_batch_size": "pairs"}
    settings = {ours: options[name] for name, ours in told.items() if name in options}
    print(pivot.plan(model, train=train, lora=lora, processes=num_processes, **settings))


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
    early.check_model(model)
    early.check_data(prefs)
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
    as_json: AsJson = False,
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
    early.check_settings(options, "instruct", False, "align")
    early.check_model(model)
    early.check_data(captions)
    if relaunched(accelerate_config, num_processes, Nodes(num_machines, machine_rank, rendezvous)):
        return
    import pivot_plugin as pivot

    with chatter_aside(as_json):
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
    show_instructed(result, as_json)


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
    as_json: AsJson = False,
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
    early.check_settings(options, "instruct", False, "instruct")
    rank = lora_rank(lora)
    early.check_model(model)
    early.check_data(conversations)
    if relaunched(accelerate_config, num_processes, Nodes(num_machines, machine_rank, rendezvous)):
        return
    import pivot_plugin as pivot

    with chatter_aside(as_json):
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
    show_instructed(result, as_json)


def demo(
    output_dir: RunFolder = Path("pivot-demo"),
) -> None:
    """Run the whole job on a small built-in world: no network, under four minutes on two CPU cores.

    pivot demo
    """
    from pivot_plugin.quickstart import demo as demonstration

    with display.of_a_run(output_dir / "dpo", False, False):
        demonstration.run(output_dir)
