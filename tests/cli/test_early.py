"""What the command line refuses before torch is imported."""

import time
from dataclasses import fields
from pathlib import Path

import pytest

from pivot_plugin.cli import early
from pivot_plugin.config import InstructConfig, PivotConfig, PivotGRPOConfig, PivotRLOOConfig
from pivot_plugin.errors import DataError, ModelError, SettingsError
from pivot_plugin.objectives import BUILT_IN, loss_types
from tests.helpers.processes import ROOT, pivot, python


@pytest.mark.parametrize(
    ("kind", "config"),
    [("pairs", PivotConfig), ("grpo", PivotGRPOConfig), ("rloo", PivotRLOOConfig), ("instruct", InstructConfig)],
)
def test_the_fields_that_are_read_are_those_that_are_imported(kind: str, config: type) -> None:
    """The whole list, so that a name is refused early if and only if the run would refuse it."""
    assert set(early.fields_of(kind)) == {field.name for field in fields(config)}
    assert early.fields_of(kind)["max_steps"] is int and early.fields_of(kind)["learning_rate"] is float


def test_the_objectives_that_are_read_are_those_that_are_imported() -> None:
    assert early._functions_in(early.HERE / "objectives.py", "BUILT_IN") == list(BUILT_IN)
    assert early._loss_types() == list(loss_types())
    early.check_objective("mpo")
    early.check_objective("apo_down")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": "ten"}, "max_steps is 'ten'. Give a whole number."),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'. Give a number."),
        ({"max_stepz": 2}, "Did you mean max_steps"),
        ({"samples": 2}, "has no option 'samples'"),
        ({"report_to": ["none", "dvclive"]}, "report_to names 'dvclive', which is not installed. Run: pip install"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        early.check_settings(settings, "pairs", False, "optimize")
    assert message in str(raised.value)


def test_options_of_own_answers_are_known_where_there_are_some() -> None:
    early.check_settings({"samples": 2, "max_steps": 3, "lr_scheduler_type": "cosine"}, "pairs", True, "optimize")


def test_paths_at_which_nothing_is_are_not_taken_for_the_hub(tmp_path: Path) -> None:
    for name in ("./nope", "../nope", str(tmp_path / "nope"), "~/nope/nope"):
        with pytest.raises(ModelError, match="There is no folder"):
            early.check_model(name)
        with pytest.raises(DataError, match="no such file or folder"):
            early.check_data(name)
    with pytest.raises(DataError, match="no such file or folder"):
        early.check_data("pairs.jsonl")
    early.check_model("owner/name")
    early.check_data("owner/name")
    early.check_data(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--objctive", "dpo"], 2, "--objective"),
        (["./nope", "owner/pairs"], 1, "There is no folder './nope'"),
        (["owner/model", "owner/pairs", "--set", "max_steps=ten"], 1, "max_steps is 'ten'"),
        (["owner/model", "owner/pairs", "--objective", "dop"], 1, "Did you mean dpo"),
    ],
)
def test_a_typo_costs_no_import_of_torch(arguments: list[str], status: int, message: str, tmp_path: Path) -> None:
    code = f"""
import sys
sys.argv = ["pivot", "optimize", *{arguments!r}]
from pivot_plugin.cli import main
try:
    main()
except SystemExit as end:
    print("status", end.code, "torch" in sys.modules, "transformers" in sys.modules)
"""
    begun = time.process_time()
    run = python(code, folder=tmp_path, cold=True)
    assert f"status {status} False False" in run.stdout, run.stderr
    assert message in run.stderr
    assert time.process_time() - begun < 2


def test_every_command_has_an_example_in_its_help() -> None:
    code = """
import sys, typer
from pivot_plugin.cli.app import cli
command = typer.main.get_command(cli)
def told(group, words):
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            told(one, [*words, name])
            continue
        print(" ".join([*words, name]), "pivot " + " ".join([*words, name])[6:] in (one.help or ""), sep="\\t")
told(command, ["pivot"])
"""
    run = python(code, folder=ROOT, cold=False)
    lines = [line.split("\t") for line in run.stdout.splitlines() if line.startswith("pivot ")]
    assert len(lines) > 20
    assert [name for name, example in lines if example != "True"] == []


def test_help_is_short_for_h_and_says_defaults_and_exit_statuses(tmp_path: Path) -> None:
    help_text = " ".join(pivot("optimize", "-h", folder=tmp_path).stdout.split())
    for words in ("--learning-rate", "2e-4", "--dry-run", "--column", "--split", "--allow-urls", "file.py:function"):
        assert words in help_text, words
    root = " ".join(pivot("-h", folder=tmp_path).stdout.split())
    assert "Exit status: 0 done" in root and "--install-completion" in root
