"""One command in several processes: accelerate's launcher, with accelerate's own configuration file."""

import logging
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import typer

from pivot_plugin.errors import SettingsError, TrainingError, unknown

ACCELERATE = typer.Option(
    "--accelerate-config",
    help="Launch on several GPUs or nodes: a file that `accelerate config` writes, or TRL's fsdp2, zero2, ...",
)
PROCESSES = typer.Option("--num-processes", help="How many, instead of what the accelerate configuration says.")
# tells a process that it is one of those launched
LAUNCHED = "PIVOT_LAUNCHED"


MACHINES = typer.Option("--num-machines", help="Nodes of the run; the command is started on each.")
MACHINE_RANK = typer.Option("--machine-rank", help="Which of the nodes this one is, from 0.")
RENDEZVOUS = typer.Option("--rendezvous", help="Where the nodes meet: HOST:PORT of node 0.")


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run.

    Attributes:
        count: how many; what accelerate's file says where None.
        rank: of this one, from 0.
        rendezvous: host and port of node 0.

    Raises:
        SettingsError: for several nodes without a place to meet, or a rank that is none of theirs.
    """

    count: int | None = None
    rank: int | None = None
    rendezvous: str | None = None

    def __post_init__(self) -> None:
        if (self.count or 1) > 1 and (self.rank is None or self.rendezvous is None):
            raise SettingsError(
                f"--num-machines is {self.count}, and this node does not know which it is or where they meet.",
                "Give --machine-rank (from 0) and --rendezvous HOST:PORT, the same address on every node.",
            )
        if self.rank is not None and not 0 <= self.rank < (self.count or 1):
            raise SettingsError(
                f"--machine-rank is {self.rank} of {self.count or 1} nodes.", "Ranks of nodes count from 0."
            )
        if self.rendezvous is not None and not self.rendezvous.rpartition(":")[2].isdigit():
            raise SettingsError(f"--rendezvous is {self.rendezvous!r}.", "Give HOST:PORT.")

    def words(self) -> list[str]:
        """For accelerate's launcher."""
        words = [] if self.count is None else ["--num_machines", str(self.count)]
        words += [] if self.rank is None else ["--machine_rank", str(self.rank)]
        if self.rendezvous is not None:
            host, _, port = self.rendezvous.rpartition(":")
            words += ["--main_process_ip", host, "--main_process_port", port]
        return words


def relaunched(config: Path | None, processes: int | None = None, nodes: Nodes | None = None) -> bool:
    """Run this very command under `accelerate launch`, and wait for it.

    Args:
        config: accelerate's configuration file, or the name of one that TRL has; None, or a process that is launched
            already, runs nothing.
        processes: how many, on all nodes, instead of what the file says.
        nodes: instead of what the file says.

    Returns:
        whether it was run, so that nothing is left to do.

    Raises:
        SettingsError: if there is no such file, or it says what accelerate does not know.
        TrainingError: if a process was ended by a signal.
        SystemExit: with the status of the first process to fail.
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
    _check_keys(file)
    words = ["--config_file", str(file)]
    words += ["--num_processes", str(processes)] if processes else []
    words += nodes.words() if nodes else []
    _launch([*words, "-m", "pivot_plugin.cli", *sys.argv[1:]])
    return True


def _launch(words: list[str]) -> None:
    """Be accelerate's launcher: in this process, so that a signal to it reaches those it starts before it ends.

    What a process that failed has said is not said again by the launcher.

    Args:
        words: of its command line.

    Raises:
        TrainingError: if a process was ended by a signal, of which it could say nothing.
        SystemExit: with another status than 0, if one failed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = "1"
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            raise SystemExit(failure.exitcode) from None
        raise TrainingError(
            f"Process {rank} was ended by {failure.signal_name()}, and the others with it.",
            "SIGKILL often means that the memory was full: look at the system's log. --resume goes on from the last "
            "checkpoint.",
        ) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    finally:
        del os.environ[LAUNCHED]


def _check_keys(file: Path) -> None:
    """Refuse a file with a key that accelerate does not know, before processes are started."""
    import yaml
    from accelerate.commands.config.config_args import ClusterConfig

    try:
        keys = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SettingsError(f"{str(file)!r} is no YAML: {error}", "Write it by `accelerate config`.") from error
    if not isinstance(keys, dict):
        raise SettingsError(f"{str(file)!r} holds no settings.", "Write it by `accelerate config`.")
    # named by its reader, which goes on to a class of its own
    names = {field.name for field in fields(ClusterConfig)} | {"compute_environment", "debug"}
    if absent := sorted(set(keys) - names):
        raise unknown("key", absent[0], names, f"{str(file)!r} has the key {absent[0]!r}.")


def _configurations_of_trl() -> list[Path]:
    trl = find_spec("trl")
    folders = trl.submodule_search_locations if trl else None
    return [path for folder in folders or [] for path in Path(folder).glob("accelerate_configs/*.yaml")]
