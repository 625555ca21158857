"""Options that several commands share, and how their texts are read."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_plugin.choices import OnBadRow, Train
from pivot_plugin.errors import SettingsError

from .launching import ACCELERATE, MACHINE_RANK, MACHINES, PROCESSES, RENDEZVOUS

RunFolder = Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the run.")]
TrainedParts = Annotated[Train, typer.Option(help="Which parts of the model train.")]
Lora = Annotated[str, typer.Option(help="LoRA rank, or none to train the weights themselves.")]
BadRows = Annotated[OnBadRow, typer.Option(help="Stop at a bad row, or leave bad rows out and list them.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")]
ImageFolder = Annotated[Path | None, typer.Option(help="What relative image paths start from.")]
HeldOutShare = Annotated[float, typer.Option(help="Share of the rows to hold out.")]
DPOSettings = Annotated[
    list[str] | None, typer.Option("--set", help="Any field of TRL's DPOConfig, as name=value; repeat it.")
]
SFTSettings = Annotated[
    list[str] | None, typer.Option("--set", help="Any field of TRL's SFTConfig, as name=value; repeat it.")
]
AccelerateConfig = Annotated[Path | None, ACCELERATE]
Processes = Annotated[int | None, PROCESSES]
Machines = Annotated[int | None, MACHINES]
MachineRank = Annotated[int | None, MACHINE_RANK]
Rendezvous = Annotated[str | None, RENDEZVOUS]


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


def setting(text: str) -> tuple[str, Any]:
    """`name=value`, the value read as JSON where it is JSON, and as text otherwise."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise SettingsError(f"{text!r} is not name=value.", "For example: --set learning_rate=1e-4.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, {"true": True, "false": False, "none": None}.get(value.lower(), value)


def settings_of(texts: list[str] | None) -> dict[str, Any]:
    """What `--set` says, by name."""
    return dict(setting(text) for text in texts or [])


def empty_folder(folder: Path) -> None:
    """Refuse a folder that holds something."""
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"Folder {str(folder)!r} is not empty.", "Choose another folder, or empty it.")
