"""The notebook with a language model in 4 bits, where bitsandbytes is: it is no dependency, and slow to import."""

import os
import subprocess
from pathlib import Path

from tests.helpers.environments import made_environment
from tests.helpers.processes import ROOT


def test_the_notebook_runs_with_a_language_model_in_four_bits(environments: Path) -> None:
    python = made_environment(environments / "four-bit", [["--no-deps", "bitsandbytes>=0.46"]])
    words = ["-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "tests/test_notebooks.py", "-k", "one_gpu"]
    run = subprocess.run(
        [python, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "2 passed" in run.stdout, "the one in 4 bits was left out"
