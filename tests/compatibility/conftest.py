"""Environments with other releases of transformers, which share the torch of this one.

They are made once, below $PIVOT_TEST_ENVS or in a temporary folder: a virtual environment in which pip installs the
release and what it asks for, and a .pth file by which everything else, torch first of all, is found where this process
has it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.helpers.environments import made_environment
from tests.helpers.releases import OTHERS, Reader

READER = Path(__file__).with_name("reader.py")


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the environments."""
    kept = os.environ.get("PIVOT_TEST_ENVS")
    return Path(kept) if kept else tmp_path_factory.mktemp("environments")


def python_of(release: str, environments: Path) -> str:
    """Python that imports a release of transformers."""
    if release == transformers.__version__:
        return sys.executable
    return made_environment(environments / f"transformers-{release}", [[f"transformers=={release}"]])


@pytest.fixture(scope="session", params=[*OTHERS, transformers.__version__])
def release(request: pytest.FixtureRequest) -> str:
    """Every release in turn, this process's own last."""
    return request.param


@pytest.fixture(scope="session")
def read_by(release: str, environments: Path) -> Reader:
    """A function that has a release read folders, in a process of its own."""
    python = python_of(release, environments)
    # neither this package nor its environment may be seen there
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def read(jobs: dict[str, Any], folder: Path) -> dict[str, Any]:
        (folder / f"jobs-{release}.json").write_text(json.dumps(jobs))
        run = subprocess.run(
            [python, str(READER), str(folder / f"jobs-{release}.json")],
            capture_output=True,
            text=True,
            env=variables,
            cwd=folder,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        answers: dict[str, Any] = json.loads(run.stdout.rpartition("@@")[2])
        assert answers.pop("transformers") == release
        return answers

    return read
