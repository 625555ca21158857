"""The command's root: options shared by all, plugins' commands, and errors as sentences."""

import logging
import os
import shlex
import sys
import warnings
from typing import Annotated

import typer

from pivot_plugin import __version__
from pivot_plugin.errors import PeerError, PivotError, TrainingError, said

from . import encoders, measure, models, prefs, recipe, starting, training

INTERRUPTED = 130
# commands with --resume
RESUMABLE = ("optimize", "align", "instruct")

cli = typer.Typer(
    name="pivot",
    help="Make the vision encoder of a multimodal language model better by preference optimisation.",
    epilog="Exit status: 0 done; 1 refused or failed, with the reason in one sentence (also: a check that failed); 2 a "
    "word of the command line that is not known; 130 Ctrl-C. PIVOT_TRACEBACK=1 shows where an error "
    "comes from. Shell completion: pivot --install-completion. For example: pivot init MODEL PAIRS, then pivot "
    "optimize --config run.yaml.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
cli.command("optimize")(training.optimize)
cli.command("compare-arms")(training.compare_arms)
cli.command("assemble")(models.assemble)
cli.command("align")(training.align)
cli.command("instruct")(training.instruct)
cli.command("compare")(measure.compare)
cli.command("report")(measure.report)
cli.command("benchmark")(measure.benchmark)
cli.command("push")(encoders.push)
cli.command("verify")(encoders.verify)
cli.command("extract")(encoders.extract)
cli.command("export")(encoders.export)
cli.command("graft")(encoders.graft)
cli.command("list")(encoders.list_published)
cli.command("demo")(training.demo)
cli.command("inspect")(models.inspect)
cli.command("check")(models.check)
cli.command("init")(starting.init)
cli.command("watch")(starting.watch)
cli.add_typer(starting.adapters, name="adapters")
cli.add_typer(prefs.group, name="prefs")
cli.add_typer(recipe.group, name="recipe")


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@cli.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # TRL 1.16 calls transformers by names that are going: nothing a user of this command can change
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    # what other libraries tell of their own doings is not this command's output
    for name in ("httpx", "httpx2", "datasets", "transformers", "huggingface_hub", "accelerate", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("bitsandbytes", "kernels"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Entry point of the `pivot` command: a PivotError becomes a sentence and exit status 1."""
    # before the command line is read, so that it knows their commands; only then, since plugins import torch
    if _names_no_built_in_command():
        from pivot_plugin.hooks import notify

        notify("pivot_commands", cli=cli)
    try:
        cli()
    except PeerError as error:
        # the process that failed first has said so
        sys.exit(error.code)
    except PivotError as error:
        if os.environ.get("PIVOT_TRACEBACK"):
            raise
        print(f"pivot: {error}", file=sys.stderr)
        if isinstance(error, TrainingError) and (command := _go_on()):
            print(command, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if os.environ.get("PIVOT_TRACEBACK"):
            raise
        print(f"pivot: {said(error)}: {str(error.filename)[:200]!r}.", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        # foreign code, or a mistake of ours: told like an error, and not as one that we expected
        if os.environ.get("PIVOT_TRACEBACK"):
            raise
        print(
            f"pivot: stopped by {said(error)}. Nothing was expected to raise this: PIVOT_TRACEBACK=1 shows where it "
            "comes from, for a report.",
            file=sys.stderr,
        )
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as error:
        # typer makes the one into the other
        if isinstance(error, SystemExit) and error.code != INTERRUPTED:
            raise
        # of several processes the launcher says it for all
        if "LOCAL_RANK" not in os.environ:
            print(f"pivot: interrupted; checkpoints are kept. {_go_on()}".strip(), file=sys.stderr)
        sys.exit(INTERRUPTED)


def _go_on() -> str:
    """The command that goes on with a run which was cut off, empty for commands that have none."""
    words = sys.argv[1:]
    if not words or words[0] not in RESUMABLE:
        return ""
    return f"Go on by: {shlex.join(['pivot', *words, *([] if '--resume' in words else ['--resume'])])}"


def _names_no_built_in_command() -> bool:
    """Whether the command line names a command that only a plugin can have."""
    words = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    built_in = {command.name for command in cli.registered_commands} | {group.name for group in cli.registered_groups}
    return bool(words) and words[0] not in built_in
