"""The main job in the oldest releases that this package says it works with; torch is that of the tests."""

import json
import os
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.helpers.environments import made_environment
from tests.helpers.packages import built
from tests.helpers.processes import ROOT

DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
FLOORS = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", dependency).groups() for dependency in DEPENDENCIES)  # type: ignore[union-attr]
SHARED = ("torch", "torchvision")
# these ask for torch, which pip would have
ALONE = ("trl", "peft", "accelerate")
JOB = """
import importlib.metadata, json
import pivot_plugin as pivot
from pivot_plugin.quickstart import world

result = pivot.optimize(
    world.model(), world.pairs(60, seed=1), processor=world.processor(), output_dir="run", max_steps=2, use_cpu=True,
    per_device_train_batch_size=4, eval_fraction=0, learning_rate=1e-3, warmup_steps=0, disable_tqdm=True,
)
pivot.graft(world.model(), pivot.load_encoder("run/encoder"))
said = {
    "file": pivot.__file__,
    "verified": pivot.verify("run/encoder").passed,
    "moved": max(result.weight_change.values()),
    "versions": {name: importlib.metadata.version(name) for name in %r},
}
print("@@" + json.dumps(said))
"""


def pins(*names: str) -> list[str]:
    return [f"{name}=={FLOORS[name]}" for name in names]


@pytest.fixture(scope="module")
def python(environments: Path) -> str:
    """Python of an environment with every floor."""
    rest = [name for name in FLOORS if name not in (*SHARED, *ALONE)]
    return made_environment(environments / "floors", [pins(*rest), ["--no-deps", *pins(*ALONE)]])


def test_the_wheel_trains_saves_and_grafts_with_the_oldest_releases(python: str, tmp_path: Path) -> None:
    names = [name for name in FLOORS if name not in SHARED]
    site = tmp_path / "site"
    zipfile.ZipFile(built("wheel", tmp_path)).extractall(site)
    run = subprocess.run(
        [python, "-c", JOB % names],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout.rpartition("@@")[2])
    assert Path(said["file"]).is_relative_to(site)
    assert {name: release(said["versions"][name]) for name in names} == {name: release(FLOORS[name]) for name in names}
    assert said["verified"] and said["moved"] > 0


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without zeros at its end."""
    numbers = [int(part) for part in version.split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
