"""Commands to begin with: a configuration that is written and read, a run that is watched, a package that is begun."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pivot_plugin.cli.config_file import _read
from pivot_plugin.cli.starting import configuration_text, package_of
from pivot_plugin.errors import SettingsError
from pivot_plugin.files import write_whole
from pivot_plugin.runs.progress import Lines
from pivot_plugin.testing import build
from tests.helpers import picture
from tests.helpers.processes import pivot, python

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    model, processor = build("llava")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = []
    for number in range(12):
        picture(40, 40, number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "ask": "what?", "good": f"it is {number}", "bad": "no"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_init_writes_what_optimize_reads_and_a_dry_run_trains_nothing(world: Path, tmp_path: Path) -> None:
    columns = [word for pair in ("prompt=ask", "chosen=good", "rejected=bad") for word in ("--column", pair)]
    written = pivot("init", world / "model", world / "pairs.jsonl", *columns, "-o", "run.yaml", folder=tmp_path)
    assert written.returncode == 0, written.stderr
    assert "12 about 12 images" in written.stdout and "cost, roughly" in written.stdout
    said = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert said["columns"] == {"prompt": "ask", "chosen": "good", "rejected": "bad"} and said["lora"] == 16
    again = pivot("init", world / "model", world / "pairs.jsonl", "-o", "run.yaml", folder=tmp_path)
    assert again.returncode == 1 and "is there already" in again.stderr

    options = ["--config", "run.yaml", "--set", "use_cpu=true", "-o", "elsewhere", "--lora", "4"]
    dry = pivot("optimize", *options, "--max-steps", "2", "--dry-run", "--json", folder=tmp_path)
    assert dry.returncode == 0, dry.stderr
    facts = json.loads(dry.stdout.splitlines()[-1])
    # the command line comes before the file
    assert facts["optimiser steps"] == "2 of 8 rows" and "rank 4" in facts["what trains"]
    assert not (tmp_path / "elsewhere").exists()

    run = pivot("optimize", *options, "--max-steps", "2", "--learning-rate", "1e-3", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "elsewhere" / "run.json").read_text())
    assert record["settings"]["lora"] == 4 and record["settings"]["learning_rate"] == 1e-3
    assert record["settings"]["columns"] == said["columns"]
    # the verdict comes first, dictionaries and bars do not come at all
    assert "Not decidable with so few rows." in run.stdout and "next: pivot report" in run.stdout
    assert "{'" not in run.stdout and "it/s" not in run.stdout + run.stderr
    assert "step 2 of 2" in run.stdout
    assert not (tmp_path / "elsewhere" / "README.md").exists()
    quiet = pivot("optimize", *options[:-4], "-o", "q", "--max-steps", "1", "--quiet", folder=tmp_path)
    assert quiet.stdout.strip().splitlines()[-1] == "q/encoder" and "parameters train" not in quiet.stderr
    assert "parameters train" in (tmp_path / "q" / "output.log").read_text()

    watched = pivot("watch", "elsewhere", "q", "--once", folder=tmp_path)
    assert "elsewhere" in watched.stdout and "2/2" in watched.stdout
    (told,) = json.loads(pivot("watch", "elsewhere", "--json", folder=tmp_path).stdout)
    assert told["finished"] and told["step"] == 2
    page = pivot("report", "elsewhere", "--json", folder=tmp_path)
    assert page.returncode == 0 and (tmp_path / "elsewhere" / "report.html").is_file()
    assert json.loads(page.stdout) == {"report": "elsewhere/report.html", "runs": ["elsewhere"]}
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "holds no settings by name"),
        ("model: [", "is no YAML"),
        ("train: tower", "Give one of 'encoder'"),
        ("eval_fraction: much", "eval_fraction in .* is 'much'. Give a number"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    write_whole(tmp_path / "run.yaml", text)
    with pytest.raises(SettingsError, match=message):
        _read(tmp_path / "run.yaml")
    with pytest.raises(SettingsError, match="cannot be read"):
        _read(tmp_path / "none.yaml")


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    write_whole(tmp_path / "run.yaml", "learning_rate: 1e-4\nbeta: 2.5e-1\nobjective: dpo\nlora: null\n")
    assert _read(tmp_path / "run.yaml") == {"learning_rate": 1e-4, "beta": 0.25, "objective": "dpo", "lora": None}


def test_names_with_quotes_and_colons_come_back() -> None:
    options: dict[str, Any] = {
        "output_dir": 'a: "b"',
        "objective": "dpo",
        "train": "encoder",
        "lora": 16,
        "eval_fraction": 0.02,
        "columns": {"prompt": "a: b # c"},
    }
    facts = {"learning rate": "0.0002", "rows": ["1", "2"]}
    text = configuration_text("m # x", 'p"q', options, ["format"], facts)
    said = yaml.safe_load(text)
    assert (said["model"], said["prefs"], said["output_dir"]) == ("m # x", 'p"q', 'a: "b"')
    assert said["columns"] == options["columns"] and said["rewards"] == ["format"]


def test_a_run_that_goes_on_is_shown_from_its_files(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "run")
    lines.write(event="begin", planned=100, first_step=0, batch=8, rows_are="pairs", trained={"encoder": [10, 20]})
    lines.write(event="log", step=10, logs={"loss": 0.6})
    shown = pivot("watch", "run", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "10 of 100 steps" in shown.stdout and "run: runs" in shown.stdout and "encoder 10" in shown.stdout
    assert pivot("watch", "nothing", folder=tmp_path).returncode == 1


def test_a_package_that_is_begun_teaches_its_family(tmp_path: Path) -> None:
    begun = pivot("adapters", "new", "vipllava", folder=tmp_path)
    assert begun.returncode == 0, begun.stderr
    assert (tmp_path / "pivot-vipllava" / "test_vipllava.py").is_file()
    code = """
import sys
sys.path.insert(0, "pivot-vipllava")
import pivot_vipllava
from pivot_plugin.testing import build, zoo
model, _ = zoo.build("vipllava")
print(pivot_vipllava.pivot_adapter(model).family, pivot_vipllava.pivot_adapter(build("llava")[0]))
"""
    told = python(code, folder=tmp_path, cold=False)
    assert told.stdout.splitlines()[-1:] == ["vipllava None"], told.stderr
    assert pivot("adapters", "new", "no-name", folder=tmp_path).returncode == 1
    again = pivot("adapters", "new", "vipllava", folder=tmp_path)
    assert again.returncode == 1 and "is not empty" in again.stderr
    assert set(package_of("mine")) == {"pyproject.toml", "pivot_mine.py", "test_mine.py"}
    listed = pivot("adapters", folder=tmp_path).stdout
    assert "pivot_preference_layout" in listed and "..." not in listed and "\u2026" not in listed
