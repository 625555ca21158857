"""The bridge to lmms-eval: the command for every family, and a real process that stands in for lmms-eval."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pivot_plugin.errors import ModelError, SettingsError, TrainingError
from pivot_plugin.probes import GROUPS, benchmark_command, run_benchmarks

STAND_IN = """
import json, pathlib, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert arguments["--model"] == "llava_hf", arguments
tasks = arguments["--tasks"].split(",")
if "mme" in tasks:
    sys.exit(3)
place = pathlib.Path(arguments["--output_path"]) / "model"
place.mkdir(parents=True)
results = {task: {"alias": task, "exact_match,none": 0.5, "exact_match_stderr,none": "N/A"} for task in tasks}
(place / "20261121_results.json").write_text(json.dumps({"results": results}))
"""
NAMES = {
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "internvl": "internvl_hf",
}


@pytest.fixture
def saved(llava: Any, tmp_path: Path) -> str:
    llava[0].save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_sixteen_benchmarks_of_the_paper_are_named() -> None:
    tasks = [task for group in GROUPS.values() for task in group]
    assert len(GROUPS) == 4
    assert len(tasks) == len(set(tasks)) == 16


def test_every_family_has_the_name_that_lmms_eval_knows(family: str, tiny: Any, tmp_path: Path) -> None:
    tiny[0].save_pretrained(tmp_path)
    command = benchmark_command(str(tmp_path), ["vision-centric"], "out", limit=5)
    assert command[1:5] == ["-m", "lmms_eval", "--model", NAMES[family]]
    assert f"pretrained={tmp_path}" in command
    assert "mmvp,realworldqa,cv_bench_2d,cv_bench_3d" in command
    assert command[-2:] == ["--limit", "5"]


def test_results_are_read_from_what_it_writes(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "library" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    found = run_benchmarks(saved, ["vision-centric", "knowledge"], tmp_path / "out", python=sys.executable)
    assert len(found) == 8
    assert found["mmvp"] == {"exact_match": 0.5}
    assert json.loads(next((tmp_path / "out").rglob("*.json")).read_text())
    with pytest.raises(TrainingError, match="ended with status 3") as caught:
        run_benchmarks(saved, ["general"], tmp_path / "other")
    assert "-m lmms_eval" in caught.value.remedy


def test_what_cannot_be_run_is_named(saved: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no group of benchmarks 'ocr'"):
        benchmark_command(saved, ["ocr"])
    with pytest.raises(SettingsError, match="lmms-eval is not installed"):
        run_benchmarks(saved, ["general"], tmp_path / "out")
    with pytest.raises(ModelError, match="No MLLM could be found"):
        benchmark_command(str(tmp_path / "absent"))
