"""Options that several commands share, and how their texts are read."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_plugin.choices import OnBadRow, Train
from pivot_plugin.errors import SettingsError

from .launching import ACCELERATE, MACHINE_RANK, MACHINES, PROCESSES, RENDEZVOUS

# of the verbs, and of the recipe of SPECS: options of the commands, or what cannot be written on a command line
ARGUMENTS = (
    "model",
    "prefs",
    "captions",
    "conversations",
    "processor",
    "eval_prefs",
    "output_dir",
    "objective",
    "train",
    "lora",
    "eval_fraction",
    "rewards",
    "make",
    "difficulty",
    "count",
    "ood_prefs",
    "on_bad_row",
    "resume",
    "probes",
    "probe_steps",
    "saliency",
    "image_folder",
    "columns",
    "split",
    "allow_urls",
    "display",
    "arms",
    "seeds",
)
ARGUMENTS_OF_SPECS = (
    "model",
    "questions",
    "processor",
    "final_questions",
    "pairs",
    "output_dir",
    "train",
    "lora",
    "skip",
    "stages",
    "resume",
)
LONGEST_RANK = 7

RunFolder = Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the run.")]
TrainedParts = Annotated[Train, typer.Option(help="Which parts of the model train.")]
Lora = Annotated[str, typer.Option(help="LoRA rank, or none to train the weights themselves.")]
BadRows = Annotated[OnBadRow, typer.Option(help="Stop at a bad row, or leave bad rows out and list them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")]
ImageFolder = Annotated[Path | None, typer.Option(help="What relative image paths start from.")]
HeldOutShare = Annotated[float, typer.Option(help="Share of the rows to hold out.")]
DPOSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field of TRL's DPOConfig (GRPOConfig), or of own answers, as name=value."),
]
SFTSettings = Annotated[
    list[str] | None, typer.Option("--set", help="Any field of TRL's SFTConfig, as name=value; repeat it.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", "--columns", help="Of the data's own names: ours=theirs; repeat it. Ours: prompt, ..."),
]
Split = Annotated[str | None, typer.Option(help="Of a data set that has several.", show_default="train")]
AllowUrls = Annotated[bool, typer.Option("--allow-urls", help="Fetch images given by address.")]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Of everything that trains.",
        show_default="with LoRA 2e-4, sft 6e-4; of the weights themselves 1e-6, sft 5e-6",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing while it runs; the result at its end.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Every line of every library, as it comes.")]
Makers = Annotated[
    list[str] | None, typer.Option("--make", help="What to make of pictures: name, or name=share; repeat it.")
]
Difficulty = Annotated[
    float | None, typer.Option(help="Of what is made, from 0 (easy) to 1 (hard); 0.5 where not given.")
]
MadeCount = Annotated[int | None, typer.Option("--count", help="How many to make; one a picture, at least 1000.")]
AccelerateConfig = Annotated[Path | None, ACCELERATE]
Processes = Annotated[int | None, PROCESSES]
Machines = Annotated[int | None, MACHINES]
MachineRank = Annotated[int | None, MACHINE_RANK]
Rendezvous = Annotated[str | None, RENDEZVOUS]


def lora_rank(text: str) -> int | None:
    """A rank, or None for "none"."""
    if text.lower() == "none":
        return None
    # of digits there are more than ten, and of ranks fewer than so many
    if not (text.isascii() and text.isdigit() and len(text) < LONGEST_RANK):
        raise SettingsError(f"--lora is {text[:40]!r}.", "Give a rank such as 16, or none.")
    return int(text)


def reward_weight(text: str) -> tuple[str, float]:
    """`name` or `name=weight`."""
    name, equals, weight = text.partition("=")
    try:
        return name, float(weight) if equals else 1.0
    except ValueError as error:
        raise SettingsError(
            f"--reward {text!r}: {weight!r} is no number.", "For example: --reward format=0.5."
        ) from error


def rewards_given(rewards: object) -> dict[str, list[Any]]:
    """What the command line (name, name=weight) or a configuration file (a name, a list, a mapping) says of rewards."""
    if isinstance(rewards, dict):
        weighted = [(str(name), float(weight)) for name, weight in rewards.items()]
    else:
        weighted = [reward_weight(text) for text in ([rewards] if isinstance(rewards, str) else rewards)]  # type: ignore[union-attr, attr-defined]
    return {"rewards": [name for name, _ in weighted], "reward_weights": [weight for _, weight in weighted]}


def columns_given(columns: object) -> dict[str, str]:
    """Our column names to the data's own, as the command line or a configuration file says."""
    if isinstance(columns, dict):
        return columns
    return dict(column(text) for text in columns or [])  # type: ignore[attr-defined]


def column(text: str) -> tuple[str, str]:
    """`ours=theirs`."""
    ours, equals, theirs = text.partition("=")
    if not equals or not ours or not theirs:
        raise SettingsError(f"--column {text!r} is not ours=theirs.", "For example: --column prompt=instruction.")
    return ours, theirs


def shares_of(texts: list[str]) -> dict[str, float]:
    """`name` or `name=share`, several times."""
    shares: dict[str, float] = {}
    for text in texts:
        name, equals, share = text.partition("=")
        try:
            shares[name] = float(share) if equals else 1.0
        except ValueError as error:
            raise SettingsError(f"{text!r}: {share!r} is no number.", "For example: jigsaw=2.") from error
    return shares


def making_options(makers: object, difficulty: float | None, count: int | None) -> dict[str, Any]:
    """What `--make`, `--difficulty` and `--count`, or a configuration file, say; nothing where they are not given."""
    if isinstance(makers, str):
        makers = [makers]
    shares = shares_of(makers) if isinstance(makers, list) else makers
    given = {"make": shares or None, "difficulty": difficulty, "count": count}
    return {name: value for name, value in given.items() if value is not None}


def setting(text: str) -> tuple[str, Any]:
    """`name=value`, the value read as JSON where it is JSON, and as text otherwise."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise SettingsError(f"{text!r} is not name=value.", "For example: --set learning_rate=1e-4.")
    try:
        return name, json.loads(value)
    # numbers of thousands of digits, brackets in brackets
    except (ValueError, RecursionError):
        return name, {"true": True, "false": False, "none": None}.get(value.lower(), value)


def settings_of(texts: list[str] | None, arguments: Collection[str] = ARGUMENTS) -> dict[str, Any]:
    """What `--set` says, by name: fields of the trainer's configuration, not options of the command.

    Args:
        texts: as given.
        arguments: of the function that is called, which are no settings.

    Raises:
        SettingsError: for a text that is not name=value, or an option of a command.
    """
    settings: dict[str, Any] = {}
    for name, value in map(setting, texts or []):
        if name in arguments:
            raise SettingsError(
                f"--set {name}= is no setting of the trainer.",
                f"Give it as --{name.replace('_', '-')}, where it is an option.",
            )
        settings[name] = value
    return settings


def empty_folder(folder: Path) -> None:
    """Refuse a folder that holds something."""
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{str(folder)!r} is no folder.", "Choose another folder.")
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"Folder {str(folder)!r} is not empty.", "Choose another folder, or empty it.")
