"""The `pivot` command, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pivot_plugin.testing import build

from ..conftest import picture


def pivot(*arguments: str | Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1", **variables}
    command = [sys.executable, "-c", "from pivot_plugin.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and with pairs."""
    folder = tmp_path_factory.mktemp("world")
    model, processor = build("llava")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "pairs").mkdir()
    rows = []
    for number in range(8):
        picture(40, 40, number).save(folder / "pairs" / f"{number}.png")
        rows.append({"image": f"{number}.png", "prompt": "what?", "chosen": f"it is {number}", "rejected": "no"})
    (folder / "pairs" / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_help_loads_no_torch(tmp_path: Path) -> None:
    code = """
import sys
sys.argv = ["pivot", "--help"]
from pivot_plugin.cli import main
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules and "transformers" not in sys.modules, "heavy import"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for command in ("optimize", "inspect", "adapters", "demo"):
        assert command in run.stdout


def test_optimize_trains_and_says_where_the_encoder_is(world: Path, tmp_path: Path) -> None:
    options = ["--set", "max_steps=2", "--set", "use_cpu=true", "--set", "disable_tqdm=true", "-o", tmp_path / "run"]
    run = pivot("optimize", world / "model", world / "pairs", *options, "--lora", "4", folder=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "preference_accuracy" in run.stdout
    assert "encoder" in run.stdout
    assert "parameters train" in run.stdout
    assert (tmp_path / "run" / "encoder" / "model.safetensors").exists()
    as_json = pivot(
        "optimize", world / "model", world / "pairs", *options[:-1], tmp_path / "other", "--json", folder=tmp_path
    )
    assert json.loads(as_json.stdout)["metrics"].keys() == {"before", "after"}
    again = pivot("optimize", world / "model", world / "pairs", *options, "--lora", "4", folder=tmp_path)
    assert again.returncode == 1
    assert again.stderr.startswith("pivot: output_dir")
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "max_stepz=2"], "Did you mean max_steps"),
        (["--set", "oops"], "is not name=value"),
        (["--lora", "many"], "--lora is 'many'"),
        (["--train", "tower"], "train is 'tower'"),
        (["--objective", "dop"], "Did you mean dpo"),
    ],
)
def test_a_typo_is_one_sentence(world: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    run = pivot("optimize", world / "model", world / "pairs", "-o", tmp_path / "run", *arguments, folder=tmp_path)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_inspect_shows_what_the_adapter_sees(world: Path, tmp_path: Path) -> None:
    run = pivot("inspect", world / "model", "--json", folder=tmp_path)
    facts: dict[str, Any] = json.loads(run.stdout)
    assert facts["family"] == "llava"
    assert facts["vision tower"] == "CLIPVisionModel at model.vision_tower"
    assert facts["features in use"] == "hidden state -2 of 3 blocks"
    assert facts["image tokens"] == ["16 for 336x336 px", "16 for 672x336 px", "16 for 1024x768 px"]
    assert facts["prefix forest"] == "yes"
    assert "model.vision_tower.encoder.layers.*.mlp.fc1 (2)" in facts["LoRA"]
    table = pivot("inspect", world / "model", folder=tmp_path)
    assert "CLIPVisionModel at model.vision_tower" in table.stdout


def test_inspect_of_nothing_is_one_sentence(tmp_path: Path) -> None:
    run = pivot("inspect", tmp_path / "nothing", folder=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith("pivot: No MLLM could be found")


def test_adapters_lists_the_built_in_ones(tmp_path: Path) -> None:
    run = pivot("adapters", "--json", folder=tmp_path)
    names = [info["name"] for info in json.loads(run.stdout)]
    assert names[-6:] == ["internvl", "qwen-vl", "llava", "generic", "objectives", "published-layouts"]


def test_version_is_printed(tmp_path: Path) -> None:
    import pivot_plugin

    assert pivot("--version", folder=tmp_path).stdout.strip() == pivot_plugin.__version__
