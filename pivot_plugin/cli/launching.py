"""One command in several processes: accelerate's launcher, with accelerate's own configuration file."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import typer

from pivot_plugin.errors import SettingsError

ACCELERATE = typer.Option(
    "--accelerate-config",
    help="Launch on several GPUs or nodes: a file that `accelerate config` writes, or TRL's fsdp2, zero2, ...",
)
PROCESSES = typer.Option("--num-processes", help="How many, instead of what the accelerate configuration says.")
# tells a process that it is one of those launched
LAUNCHED = "PIVOT_LAUNCHED"


def relaunched(config: Path | None, processes: int | None = None) -> bool:
    """Run this very command under `accelerate launch`, and wait for it.

    Args:
        config: accelerate's configuration file, or the name of one that TRL has; None, or a process that is launched
            already, runs nothing.
        processes: how many, instead of what the file says.

    Returns:
        whether it was run, so that nothing is left to do.

    Raises:
        SettingsError: if there is no such file.
        SystemExit: with the launcher's status, if that is not 0.
    """
    if config is None or LAUNCHED in os.environ:
        return False
    of_trl = {path.stem: path for path in _configurations_of_trl()}
    file = config if config.is_file() else of_trl.get(str(config))
    if file is None:
        raise SettingsError(
            f"There is no accelerate configuration {str(config)!r}.",
            f"Write one by `accelerate config`, or choose one of TRL's: {', '.join(sorted(of_trl)) or 'it has none'}.",
        )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["--num_processes", str(processes)] if processes else []
    launched = subprocess.run(
        [*command, "-m", "pivot_plugin.cli", *sys.argv[1:]], env=os.environ | {LAUNCHED: "1"}, check=False
    )
    if launched.returncode:
        raise SystemExit(launched.returncode)
    return True


def _configurations_of_trl() -> list[Path]:
    trl = find_spec("trl")
    folders = trl.submodule_search_locations if trl else None
    return [path for folder in folders or [] for path in Path(folder).glob("accelerate_configs/*.yaml")]
