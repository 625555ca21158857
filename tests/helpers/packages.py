"""What is released, built of a copy of the tree, so that a build leaves nothing in it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT

# the copy has no tags
VERSION = "1.2.3"


def copied(folder: Path) -> Path:
    """A repository of the files that are or will be tracked."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    # what goes into a source distribution is what is tracked
    me = ["-c", "user.name=tests", "-c", "user.email=tests@127.0.0.1"]
    for words in (["init", "--quiet"], ["add", "--all"], [*me, "commit", "--quiet", "--message", "copy"]):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)
    return folder


def built(kind: str, folder: Path) -> Path:
    """A wheel ("wheel") or a source distribution ("sdist").

    Args:
        kind: of what is built.
        folder: to work in.
    """
    source, out = copied(folder / "source"), folder / kind
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    variables = {**os.environ, "SETUPTOOLS_SCM_PRETEND_VERSION_FOR_PIVOT_PLUGIN": VERSION}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(out.iterdir())
