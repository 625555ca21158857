"""Virtual environments with other releases, which share the torch of this one by a .pth file."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest


def made_environment(folder: Path, installs: Sequence[Sequence[str]]) -> str:
    """Python of an environment; made where it is not there yet, skipped where pip cannot.

    With $PIVOT_REQUIRE_RELEASES it is a failure that pip cannot.

    Args:
        folder: of the environment.
        installs: what pip is asked for, one command after another.
    """
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for words in installs:
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
            installed = subprocess.run(pip, capture_output=True, text=True, check=False)
            if installed.returncode:
                give_up = pytest.fail if os.environ.get("PIVOT_REQUIRE_RELEASES") else pytest.skip
                give_up(f"pip cannot install {' '.join(words)}: {installed.stderr[-300:]}")
        site = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        # behind its own packages on the path, so that its own releases come first
        (Path(site) / "torch-of-the-tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (folder / "made").touch()
    return str(python)
