"""The documents: links lead somewhere, code is code of this release, the tutorial runs, the site is built."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import pivot_plugin as pivot
from pivot_plugin import objectives, preferences
from pivot_plugin.cli.app import cli
from pivot_plugin.config import PivotConfig, PivotGRPOConfig, PivotRLOOConfig
from pivot_plugin.generation.makers import makers
from pivot_plugin.generation.own_answers import OwnAnswers
from pivot_plugin.hooks import hookspecs
from pivot_plugin.probes.lookup import available
from tests.helpers.processes import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/**/*.md")])
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# pages that docs/generate.py writes, and files it puts in other places of the site
GENERATED = re.compile(
    r"(objectives|probes|makers|hooks|reference|stacks)/[\w-]+\.md|(commands|errors|rewards|benchmarks)\.md|"
)
MOVED = re.compile(r"(contributing|security|changelog)\.md")
SETTINGS = {
    field.name for kind in (PivotConfig, PivotGRPOConfig, PivotRLOOConfig, OwnAnswers) for field in fields(kind)
}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield match[1], match[2]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)}


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        linked = (page.parent / path).resolve() if path else page
        if DOCS in linked.parents and not linked.exists():
            inside = linked.relative_to(DOCS).as_posix()
            # the strict build follows these
            if GENERATED.fullmatch(inside) or MOVED.fullmatch(inside):
                continue
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_on_a_page_calls_what_there_is(page: Path) -> None:
    known = {"pivot": pivot, "preferences": preferences, "result": pivot.PivotResult}
    wrong = []
    for language, body in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Call) and (function := resolved(node.func, known)) is not None:
                wrong += [f"{ast.unparse(node.func)}({name}=)" for name in unknown_keywords(node, function)]
    assert wrong == []


def resolved(node: ast.expr, known: dict[str, Any]) -> Any:
    """What a dotted name stands for; None for one that does not begin with a name of ours."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, known)
        if is_dataclass(owner) and node.attr in {field.name for field in fields(owner)}:
            return None
        return None if owner is None else getattr(owner, node.attr)
    return None


def unknown_keywords(call: ast.Call, function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters
    takes_settings = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    allowed = set(parameters) | (SETTINGS if takes_settings else set())
    return [word.arg for word in call.keywords if word.arg is not None and word.arg not in allowed]


def commands_of(page: Path) -> list[str]:
    lines = []
    for language, body in blocks(page):
        if language in ("", "bash", "shell"):
            lines += [line for line in body.replace("\\\n", " ").splitlines() if line.strip().startswith("pivot ")]
    return lines


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=named)
def test_commands_on_a_page_have_the_options_they_are_given(page: Path) -> None:
    for line in commands_of(page):
        words = shlex.split(line, comments=True)[1:]
        command: Any = get_command(cli)
        while hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        spelled = {name for one in command.params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
        unknown = [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in spelled]
        assert unknown == [], line


@pytest.mark.training
def test_the_tutorial_runs_from_its_first_line_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for language, body in blocks(DOCS / "tutorial.md"):
        if language == "python":
            exec(compile(body, "<tutorial>", "exec"), namespace)
        if language == "bash":
            for line in body.strip().splitlines():
                done = CliRunner().invoke(cli, shlex.split(line)[1:])
                assert done.exit_code == 0, done.output
    captions = namespace["comparison"].results
    before, after = (captions[name]["captions"].scores for name in ("before", "with the new encoder"))
    # what the page says of its own figures
    assert after["all"].value > before["all"].value + 0.1
    assert after["all/needs-picture"].value > before["all/needs-picture"].value + 0.1
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a link or an anchor that leads nowhere is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_site_has_a_page_for_everything_that_has_a_name(site: Path) -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("pivot_")]
    for folder, names in (
        ("objectives", objectives.BUILT_IN),
        ("probes", available()),
        ("makers", makers()),
        ("hooks", hooks),
    ):
        missing = [name for name in names if not (site / folder / f"{name}.html").exists()]
        assert missing == [], folder
    commands, reference = (site / "commands.html").read_text(), (site / "reference/pivot_plugin.html").read_text()
    assert [name for name in get_command(cli).commands if f">pivot {name}" not in commands] == []  # type: ignore[attr-defined]
    assert [name for name in pivot.__all__ if f".{name}" not in reference] == []
    assert "There is no ... ..." in (site / "errors.html").read_text()


@pytest.mark.slow
def test_no_page_of_the_site_asks_another_host_for_anything(site: Path) -> None:
    loading = re.compile(
        r"<(?:script|img|iframe)[^>]+src=[\"']?(https?:)?//|<link[^>]+stylesheet[^>]+href=[\"']?https?://"
    )
    assert [page.name for page in site.rglob("*.html") if loading.search(page.read_text())] == []


@pytest.mark.slow
def test_assistants_find_the_pages_as_markdown(site: Path) -> None:
    listed = re.findall(r"\(http://127\.0\.0\.1:8000/([^)]+)\)", (site / "llms.txt").read_text())
    assert {"tutorial.md", "objectives/dpo.md", "how-to/pairs.md", "reference/encoders.md"} <= set(listed)
    assert [page for page in listed if not (site / page).exists()] == []
    assert "preference optimisation" in (site / "tutorial.md").read_text() + (site / "index.md").read_text()
