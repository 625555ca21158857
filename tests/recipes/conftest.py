"""A recipe small enough to be run in seconds: a random encoder, a random language model, rows about noise."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pivot_plugin.recipes import PivotRecipe, RecipeResult, run_recipe
from tests.helpers.recipes import small_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., PivotRecipe]:
    """The small recipe in a folder of the test, with sections replaced."""
    return lambda **replaced: small_recipe(tmp_path / "recipe", **replaced)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> RecipeResult:
    """The small recipe as it ended; not to be changed."""
    return run_recipe(small_recipe(tmp_path_factory.mktemp("done") / "recipe"), estimate=False)


@pytest.fixture
def copied(done: RecipeResult, tmp_path: Path) -> Path:
    """Its folder, where a test's own recipe looks for it."""
    return Path(shutil.copytree(done.output_dir, tmp_path / "recipe"))
