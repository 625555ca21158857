"""What is installed, and that it imports from anywhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.processes import python

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    # a copy, so that a build leaves nothing in the working tree
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


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
