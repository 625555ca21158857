"""A hook of mkdocs: the reference is read from the sources as a wheel has them, hooks and adapters in the package."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
# named in mkdocs.yml; must be there before mkdocstrings looks for it
SOURCES = ROOT / "build/docs-source"


def on_startup(**_: object) -> None:
    """Copy the sources; mkdocs calls this before anything else."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pivot_plugin", SOURCES / "pivot_plugin", ignore=ignored)
    for beside in ("hooks", "adapters"):
        shutil.copytree(ROOT / beside, SOURCES / "pivot_plugin" / beside, ignore=ignored)
