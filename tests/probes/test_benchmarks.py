"""The bridge to lmms-eval: the command for every family, and a real process that stands in for lmms-eval."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from pivot_plugin.errors import ModelError, SettingsError, TrainingError
from pivot_plugin.probes import GROUPS, benchmark_command, run_benchmarks
from pivot_plugin.probes.benchmarks import grey_copy
from tests.helpers import picture

STAND_IN = """
import json, pathlib, sys
words = [word for word in sys.argv[1:] if word != "--log_samples"]
arguments = dict(zip(words[::2], words[1::2]))
assert arguments["--model"] == "llava_hf", arguments
tasks = arguments["--tasks"].split(",")
if "mme" in tasks:
    sys.exit(3)
place = pathlib.Path(arguments["--output_path"]) / "model"
place.mkdir(parents=True)
folder = arguments["--model_args"].removeprefix("pretrained=")
from transformers import AutoProcessor
from PIL import Image
# a model that is right on eight of ten questions where it sees, and on four of them all the same
noise = Image.effect_noise((64, 64), 90).convert("RGB")
processor = AutoProcessor.from_pretrained(folder).image_processor
sees = float(processor(images=[noise], return_tensors="pt").pixel_values.std()) > 1e-6
share = 0.8 if sees else 0.4
if "--log_samples" in sys.argv:
    for task in tasks:
        rows = [{"doc_id": n, "exact_match": float(n < 10 * share), "judged": {"by": "kind"}} for n in range(10)]
        (place / f"20261121_samples_{task}.jsonl").write_text(chr(10).join(map(json.dumps, rows)))
results = {task: {"alias": task, "exact_match,none": share, "exact_match_stderr,none": "N/A"} for task in tasks}
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
    llava[1].save_pretrained(tmp_path / "model")
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


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "library" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


@pytest.mark.usefixtures("library")
def test_the_blind_control_shows_the_same_model_one_grey(saved: str, tmp_path: Path) -> None:
    found = run_benchmarks(saved, ["vision-centric"], tmp_path / "out", blind=True)
    assert found["mmvp"] == {
        "exact_match": 0.8,
        "exact_match/without-picture": 0.4,
        "exact_match/needs-picture": pytest.approx(0.4),
        # four questions, all to one side: 2 / 2 ** 4
        "exact_match/p": pytest.approx(0.125),
    }
    assert list((tmp_path / "out" / "without-picture").rglob("*_results.json"))


def test_a_grey_copy_has_the_weights_and_no_pictures_of_every_family(tiny: Any, tmp_path: Path) -> None:
    for part in tiny:
        part.save_pretrained(tmp_path / "model")
    copy = grey_copy(str(tmp_path / "model"), tmp_path / "grey")
    grey = AutoProcessor.from_pretrained(copy)
    assert grey.image_processor(images=[picture(80, 60, 1)], return_tensors="pt")["pixel_values"].abs().max() < 1e-8
    assert (copy / "config.json").read_text() == (tmp_path / "model" / "config.json").read_text()
    assert (copy / "model.safetensors").is_symlink()
    # the original is as it was
    untouched = AutoProcessor.from_pretrained(tmp_path / "model").image_processor
    assert untouched(images=[picture(80, 60, 1)], return_tensors="pt")["pixel_values"].std() > 0


@pytest.mark.usefixtures("library")
def test_results_are_read_from_what_it_writes(saved: str, tmp_path: Path) -> None:
    found = run_benchmarks(saved, ["vision-centric", "knowledge"], tmp_path / "out", python=sys.executable)
    assert len(found) == 8
    assert found["mmvp"] == {"exact_match": 0.8}
    assert json.loads(next((tmp_path / "out").rglob("*.json")).read_text())
    with pytest.raises(TrainingError, match="ended with status 3") as caught:
        run_benchmarks(saved, ["general"], tmp_path / "other")
    assert "-m lmms_eval" in caught.value.remedy


def test_what_cannot_be_run_is_named(saved: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no group of benchmarks 'ocr'"):
        benchmark_command(saved, ["ocr"])
    with pytest.raises(SettingsError, match="lmms-eval is not installed"):
        run_benchmarks(saved, ["general"], tmp_path / "out")
    with pytest.raises(ModelError, match="No MLLM could be loaded"):
        benchmark_command(str(tmp_path / "absent"))
