"""Commands to begin with: `pivot init`, `pivot watch`, `pivot adapters` and `pivot adapters new`."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_plugin.errors import SettingsError

from . import early
from .options import AllowUrls, Columns, ImageFolder, Split, columns_given, empty_folder
from .showing import show_facts

SECONDS_BETWEEN_LOOKS = 1.0
# how rows are read, by the names of `optimize`
READING = ("columns", "split", "allow_urls", "image_folder")

adapters = typer.Typer(help="List the plugins that are installed, or begin one of your own.")


def init(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an MLLM.")],
    prefs: Annotated[str, typer.Argument(help="Pairs, or questions with --reward: a file, folder, zip or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; must not be there.")] = Path(
        "run.yaml"
    ),
    rewards: Annotated[
        list[str] | None, typer.Option("--reward", help="Of the model's answers to questions; repeat it.")
    ] = None,
    columns: Columns = None,
    split: Split = None,
    allow_urls: AllowUrls = False,
    image_folder: ImageFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Look at a model and at data, write a commented configuration for them, and say what the run would cost.

    pivot init llava-hf/llava-1.5-7b-hf ./pairs -o run.yaml
    """
    early.check_model(model)
    early.check_data(prefs)
    if output.exists():
        raise SettingsError(f"{str(output)!r} is there already.", "Choose another file, or delete it.")
    reading: dict[str, Any] = {
        "columns": columns_given(columns),
        "split": split,
        "allow_urls": allow_urls,
        "image_folder": None if image_folder is None else str(image_folder),
    }
    reading = {name: value for name, value in reading.items() if value}
    options = {
        "output_dir": "pivot-run",
        "objective": "dpo",
        "train": "encoder",
        "lora": 16,
        "eval_fraction": 0.02,
        **reading,
    }
    from pivot_plugin.files import write_whole
    from pivot_plugin.runs.forecast import forecast

    facts = forecast(model, prefs, options, {}, bool(rewards))
    write_whole(output, configuration_text(model, prefs, options, rewards or [], facts))
    show_facts(facts, "What would be trained", as_json)
    if not as_json:
        print(f"Configuration: {output}")
        print(f"next: pivot optimize --config {output} --dry-run")


def configuration_text(
    model: str, prefs: str, options: dict[str, Any], rewards: list[str], facts: dict[str, Any]
) -> str:
    """A commented configuration.

    Args:
        model, prefs: as given.
        options: arguments of `optimize`.
        rewards: of own answers, none for given pairs.
        facts: what a forecast found.
    """
    said = "\n".join(
        f"#   {name}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in facts.items()
    )
    reading = {name: options[name] for name in READING if name in options}
    parts = [
        "# A run of pivot_plugin: pivot optimize --config THIS_FILE. What is typed on the command line comes first.",
        "# Found when this was written:",
        said,
        "",
        f"model: {json.dumps(model)}",
        f"prefs: {json.dumps(prefs)}",
        *(f"{name}: {json.dumps(value)}" for name, value in reading.items()),
        f"output_dir: {json.dumps(options['output_dir'])}",
        "",
        "# dpo, mpo, specs, sft, ipo, dpo_norm; grpo or rloo with questions",
        f"objective: {options['objective']}",
        "# encoder, encoder+projector, all, language_model, projector, projector+language_model",
        f"train: {options['train']}",
        "# a LoRA rank, or null to train the weights themselves",
        f"lora: {options['lora']}",
        "# share of the rows that are held out; the best look at them is kept",
        f"eval_fraction: {options['eval_fraction']}",
    ]
    if rewards:
        parts += [
            "# the model answers the questions, and its better answers are paired with its worse ones",
            "rewards:",
            *(f"  - {json.dumps(name)}" for name in rewards),
            "samples: 8",
        ]
    else:
        parts += ["# with questions in place of pairs:", "# rewards: [accuracy]", "# samples: 8"]
    parts += [
        "",
        "# Settings of the trainer: any field of TRL's DPOConfig (GRPOConfig for grpo)",
        f"learning_rate: {facts['learning rate']}",
        "per_device_train_batch_size: 8",
        "# double this and halve the line above where memory is short: the same steps, in less of it",
        "gradient_accumulation_steps: 1",
        "# max_steps: 500",
        "# looks in a row that are worse by more than noise before the run stops; null never stops early",
        "patience: 3",
        "# report_to: [tensorboard]",
        "",
    ]
    return "\n".join(parts)


def watch(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are shown side by side.")],
    once: Annotated[bool, typer.Option("--once", help="Show them as they are, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print how far they are as JSON, and end.")] = False,
) -> None:
    """Show runs while they go on, from the files they write: from another terminal, or another machine's disk.

    pivot watch pivot-run

    pivot watch runs/dpo runs/sft --once
    """
    from pivot_plugin.runs.progress import read_progress

    if as_json:
        print(json.dumps([_as_dict(read_progress(run)) for run in runs]))
        return
    from rich.console import Console
    from rich.live import Live

    from pivot_plugin.runs.panel import panel, side_by_side

    def shown() -> tuple[Any, bool]:
        several = [read_progress(run) for run in runs]
        drawn = panel(several[0]) if len(several) == 1 else side_by_side(several)
        return drawn, all(one.finished for one in several)

    drawn, over = shown()
    console = Console()
    if once or over or not console.is_terminal:
        console.print(drawn)
        return
    with Live(drawn, console=console, auto_refresh=False) as live:
        while not over:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            drawn, over = shown()
            live.update(drawn, refresh=True)


def _as_dict(progress: Any) -> dict[str, Any]:
    label, held_out = progress.held_out
    return {
        "run": progress.name,
        "finished": progress.finished,
        "step": progress.step,
        "planned": progress.planned,
        "per_second": progress.rate,
        "seconds_left": progress.left,
        "loss": progress.last("loss"),
        "held_out": {label: held_out[-1]} if held_out else {},
        "watch": progress.opinion,
    }


@adapters.callback(invoke_without_command=True)
def list_adapters(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False
) -> None:
    """List the plugins that are installed, in the order in which they are asked.

    pivot adapters
    """
    if context.invoked_subcommand is not None:
        return
    from dataclasses import asdict

    from pivot_plugin.hooks import installed

    if as_json:
        print(json.dumps([asdict(info) for info in installed()]))
        return
    from rich.console import Console
    from rich.table import Table

    plugins = list(installed())
    table = Table(title="Plugins, first asked first")
    for column in ("plugin", "distribution", "version", "hooks"):
        # a name is worth a second line, and no dots
        table.add_column(column, overflow="fold", no_wrap=column == "hooks")
    broken = any(info.problem for info in plugins)
    if broken:
        table.add_column("problem", overflow="fold")
    for info in plugins:
        problem = [info.problem or ""] if broken else []
        table.add_row(info.name, info.distribution, info.version, "\n".join(info.hooks), *problem)
    Console().print(table)


@adapters.command("new")
def new_adapter(
    name: Annotated[str, typer.Argument(help="Of the family, as transformers calls its model type: vipllava.")],
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Folder to write.", show_default="pivot-NAME")
    ] = None,
) -> None:
    """Write a package that teaches pivot-plugin a family, with the test that tries every promise of its adapter.

    pivot adapters new vipllava
    """
    if not name.isidentifier() or not name.isascii():
        raise SettingsError(f"{name!r} cannot be the name of a module.", "Give letters, digits and underscores.")
    folder = output_dir or Path(f"pivot-{name}")
    empty_folder(folder)
    from pivot_plugin.files import whole_folder

    if folder.exists():
        folder.rmdir()
    with whole_folder(folder) as aside:
        for file, text in package_of(name).items():
            (aside / file).write_text(text, encoding="utf-8")
    print(f"Package: {folder}")
    print(f"next: pip install -e {folder} && pytest {folder}")


def package_of(name: str) -> dict[str, str]:
    """The files of a plugin for a family.

    Args:
        name: of the family.
    """
    cls = "".join(part.capitalize() for part in name.split("_"))
    return {
        "pyproject.toml": PYPROJECT.format(name=name),
        f"pivot_{name}.py": ADAPTER.format(name=name, cls=cls),
        f"test_{name}.py": CONFORMANCE.format(name=name),
    }


PYPROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "pivot-{name}"
version = "0.1.0"
description = "Teaches pivot-plugin the {name} family"
dependencies = ["pivot-plugin"]

[project.entry-points.pivot_plugin]
{name} = "pivot_{name}"

[tool.setuptools]
py-modules = ["pivot_{name}"]
"""
ADAPTER = '''"""{cls} for pivot-plugin: `pivot adapters` lists it, `pivot check MODEL` tries its promises."""

from transformers import PreTrainedModel

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.hooks import hookimpl

# of the whole model, and of its vision tower by itself: an encoder that was saved is asked about, too
MODEL_TYPES = ("{name}", "{name}_vision_model", "{name}_vision")


class {cls}Adapter(VisionAdapter):
    """What differs from the defaults of `VisionAdapter`, which follow transformers' conventions.

    Override what `pivot check` finds wrong: `tower_path` and `projector_paths` (where the parts are), `feature_layer`
    (which hidden state the model reads), `lora_targets` (which linear layers train), ...
    """

    family = "{name}"


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    return {cls}Adapter(model) if model.config.model_type in MODEL_TYPES else None
'''
CONFORMANCE = '''"""Every promise of the adapter, tried on a tiny model of the family: `pytest test_{name}.py`."""

import pytest

from pivot_plugin.testing import Check, conformance, zoo


# a family that the zoo does not have: pass a tiny model and its processor instead
@pytest.mark.parametrize("check", conformance(*zoo.build("{name}")), ids=str)
def test_{name}(check: Check) -> None:
    check.raise_on_failure()
'''
