"""Imports run one way, as they are written and as they happen."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, python

# from top to bottom; a module imports from its own room and from those below
LAYERS = (
    ("cli",),
    ("quickstart", "testing"),
    ("recipes",),
    ("runs",),
    ("report",),
    ("probes",),
    ("preferences",),
    ("encoders", "training"),
    ("generation",),
    ("data",),
    ("rewards",),
    ("models",),
    ("objectives",),
    ("adapters",),
    ("hooks",),
    ("config",),
    ("hub",),
    ("files", "extras", "deadline", "choices", "typed", "progress", "verdict"),
    ("errors",),
)
HEIGHT = {room: -depth for depth, rooms in enumerate(LAYERS) for room in rooms}


def sources() -> dict[str, Path]:
    """Every module of the package, below `pivot_plugin`, and its file."""
    found = {}
    for base in (ROOT / "pivot_plugin", ROOT / "hooks", ROOT / "adapters"):
        above = base if base.name == "pivot_plugin" else ROOT
        for file in base.rglob("*.py"):
            found[".".join(file.relative_to(above).with_suffix("").parts).removesuffix(".__init__")] = file
    return found


def imports(module: str, file: Path) -> Iterator[tuple[int, str]]:
    """Line and target, below `pivot_plugin`, of every import that runs; those for type checkers do not."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(file.read_text())
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["pivot_plugin", *package[: len(package) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                if base == "pivot_plugin":
                    yield node.lineno, alias.name
                elif base.startswith("pivot_plugin."):
                    yield node.lineno, f"{base.removeprefix('pivot_plugin.')}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("pivot_plugin."):
                    yield node.lineno, alias.name.removeprefix("pivot_plugin.")


def test_every_room_has_its_place_in_the_list() -> None:
    rooms = {module.split(".")[0] for module in sources()} - {"__init__"}
    assert rooms == set(HEIGHT)


def test_imports_run_one_way() -> None:
    upward = [
        f"{file.relative_to(ROOT)}:{line} imports {target}: {room} stands below {target.split('.')[0]}"
        for module, file in sources().items()
        if (room := module.split(".")[0]) in HEIGHT
        for line, target in imports(module, file)
        if HEIGHT.get(target.split(".")[0], HEIGHT[room]) > HEIGHT[room]
        or (target.split(".")[0] != room and HEIGHT.get(target.split(".")[0]) == HEIGHT[room])
    ]
    assert not upward, "\n".join(upward)


def test_the_floors_are_drawn_as_they_are() -> None:
    drawing = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    drawn = [re.split(r"\s{3,}", line.strip())[0] for line in drawing.strip().splitlines()]
    floors = [set(re.findall(r"\w+", floor)) for floor in drawn]
    # what every room uses is one floor of the drawing
    *upper, ground = floors
    assert upper == [set(rooms) for rooms in LAYERS[: len(upper)]]
    assert ground == {room for rooms in LAYERS[len(upper) :] for room in rooms}


def loaded_by(code: str, cold: bool = True) -> list[str]:
    """Names of all modules that a piece of code loads, in a process of its own; if not cold, of our modules."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = python(script, folder=ROOT, cold=cold)
    assert run.returncode == 0, run.stderr
    names: list[str] = json.loads(run.stdout.splitlines()[-1])
    return names


def own(modules: list[str], room: str = "") -> list[str]:
    prefix = f"pivot_plugin.{room}".rstrip(".")
    return [name for name in modules if name == prefix or name.startswith(f"{prefix}.")]


FIND = """
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel
small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
model = CLIPVisionModel(CLIPVisionConfig(**small, image_size=8, patch_size=4))
from pivot_plugin.models.find import find_adapter
assert find_adapter(model, encoder=True) is not None
"""


def test_finding_an_adapter_loads_the_adapters_and_no_probe_and_no_trainer() -> None:
    modules = loaded_by(FIND)
    assert own(modules, "adapters.llava")
    for room in ("probes", "training", "data", "rewards", "quickstart", "recipes", "runs", "objectives", "encoders"):
        assert not own(modules, room), room
    assert "trl" not in modules


@pytest.mark.parametrize("names", ["__name__", "load_encoder, graft"])
def test_the_encoders_load_no_trl_and_few_modules_of_ours(names: str) -> None:
    modules = loaded_by(f"from pivot_plugin.encoders import {names}")
    assert "trl" not in modules
    ours = own(modules)
    assert len(ours) < 27, ours


@pytest.mark.parametrize("hook", ["pivot_rewards", "pivot_objectives", "pivot_probes", "pivot_makers", "pivot_sources"])
def test_a_built_in_plugin_loads_when_its_hook_is_first_asked(hook: str) -> None:
    modules = loaded_by(f"from pivot_plugin import hooks\nassert hooks.offered({hook!r})", cold=False)
    from pivot_plugin.hooks.manager import BUILT_IN

    for plugin in BUILT_IN.values():
        if hook in plugin.hooks:
            assert plugin.module in modules
    assert not own(modules, "adapters.qwen_vl")


def test_what_tests_share_is_in_the_helpers() -> None:
    """No test imports another or a conftest: what it would borrow is in `tests.helpers`."""
    borrowed = []
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                target = "." * node.level + (node.module or "")
                if target.startswith((".", "tests")) and not target.startswith("tests.helpers"):
                    borrowed.append(f"{file.relative_to(ROOT)}:{node.lineno} imports from {target}")
    assert not borrowed, "\n".join(borrowed)
