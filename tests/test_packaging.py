"""What is installed, and that it imports from anywhere."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.helpers.packages import VERSION, built
from tests.helpers.processes import python

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("sdist", tmp_path_factory.mktemp("sdist"))


@pytest.mark.slow
def test_what_is_released_is_what_pypi_takes(wheel: Path, sdist: Path) -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert wheel.name == f"pivot_plugin-{VERSION}-py3-none-any.whl" and sdist.name == f"pivot_plugin-{VERSION}.tar.gz"
    with zipfile.ZipFile(wheel) as opened:
        (metadata,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: Apache-2.0" in opened.read(metadata).decode()
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in opened.namelist())


@pytest.mark.slow
def test_the_source_distribution_has_what_the_wheel_is_made_of(wheel: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    moved = {re.sub(r"^pivot_plugin/(hooks|adapters)/", r"\1/", name) for name in inside}
    assert moved <= names
    assert {"LICENSE", "README.md", "CITATION.cff", "tests/test_packaging.py"} <= names


def test_the_version_is_that_of_the_distribution() -> None:
    import pivot_plugin

    assert pivot_plugin.__version__ == importlib.metadata.version("pivot-plugin")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["license"] == "Apache-2.0"
    assert {"arXiv:2510.16333", "arXiv:2510.25801"} == {one["notes"] for one in cited["references"]}


@pytest.mark.slow
def test_the_wheel_installs_nothing_outside_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pivot_plugin"}
    for wanted in ("hooks/hookspecs.py", "adapters/llava.py", "py.typed", "quickstart/first_stage.safetensors"):
        assert f"pivot_plugin/{wanted}" in names
    for template in ("encoders/card.md.jinja", "data/card.md.jinja", "report/template.html"):
        assert f"pivot_plugin/{template}" in names
    sources = {p.relative_to(ROOT / "pivot_plugin") for p in (ROOT / "pivot_plugin").rglob("*.py")}
    for source in sources:
        assert f"pivot_plugin/{source}" in names


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["root", "elsewhere"])
def test_sub_packages_import_after_a_plain_install(wheel: Path, folder: str, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = """
import pivot_plugin, pivot_plugin.hooks, pivot_plugin.adapters.llava, pivot_plugin.training.forest
from pivot_plugin.hooks import installed
assert {"llava", "qwen-vl", "internvl", "generic"} <= {info.name for info in installed() if not info.problem}
print(pivot_plugin.__file__)
"""
    # -S leaves out the environment's editable install, whose finder would hide what this is about
    packages = [path for path in sys.path if path.endswith("site-packages")]
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT if folder == "root" else tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(target), *packages])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).parent == (ROOT if folder == "root" else target) / "pivot_plugin"


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, pivot_plugin; dir(pivot_plugin); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists_and_unknown_ones_do_not() -> None:
    import pivot_plugin

    assert pivot_plugin.__all__ == sorted(pivot_plugin.__all__)
    for name in pivot_plugin.__all__:
        assert getattr(pivot_plugin, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        pivot_plugin.optimise  # noqa: B018


def test_names_are_written_alike_for_users_and_for_type_checkers() -> None:
    import ast
    from importlib import import_module

    import pivot_plugin
    from pivot_plugin import encoders

    for package in (pivot_plugin, encoders):
        tree = ast.parse(Path(str(package.__file__)).read_text())
        block = next(
            node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        typed = {
            alias.name: import_module(f"{'.' * node.level}{node.module}", package.__name__)
            for node in block.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert sorted(typed) == package.__all__
        assert {name: getattr(module, name) for name, module in typed.items()} == {
            name: getattr(package, name) for name in package.__all__
        }


@pytest.mark.parametrize("name", ["tests", "benchmarks", "examples"])
def test_what_stands_beside_the_package_is_no_part_of_it(name: str) -> None:
    code = f"""
import importlib, pivot_plugin.hooks, pivot_plugin.adapters
try:
    importlib.import_module("pivot_plugin.{name}")
except ModuleNotFoundError:
    print("refused")
"""
    assert python(code, folder=ROOT).stdout == "refused\n"
