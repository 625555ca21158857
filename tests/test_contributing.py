"""The pages to enter by: what they say about the code is so."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import pivot_plugin as pivot
from tests.helpers import picture, row

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


STEPS = re.findall(r"^(\d+)\. `([^`]+)` `([^`]+)`: .+[.?]$", section(PAGE, "Follow one pair"), re.MULTILINE)


def test_one_pair_is_followed_in_at_most_twenty_five_steps() -> None:
    assert [int(number) for number, *_ in STEPS] == list(range(1, len(STEPS) + 1))
    assert 15 <= len(STEPS) <= 25
    assert len(STEPS) == len(re.findall(r"^\d+\. ", section(PAGE, "Follow one pair"), re.MULTILINE))


def test_the_steps_are_entered_in_the_order_of_the_page(llava: Any, fast: Any) -> None:
    """The first call of every function that the page names, in a run of one step."""
    entered: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            entered.setdefault((frame.f_code.co_filename, frame.f_code.co_qualname))

    pairs = [row(f"number {n}?", f"it is {n}", "no", picture(40, 40, n // 2)) for n in range(8)]
    # the verb is looked up, which imports its room, before calls are noted
    optimize = pivot.optimize
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        optimize(llava[0], pairs, processor=llava[1], lora=4, eval_fraction=0.25, **{**fast, "max_steps": 1})
    finally:
        sys.setprofile(before)
    steps = [(str(ROOT / file), name) for _, file, name in STEPS]
    assert [step for step in steps if step not in entered] == []
    assert [step for step in entered if step in steps] == steps


def test_every_room_is_described_in_one_line() -> None:
    described = re.findall(r"^\| `(\w+)` \|", section(PAGE, "The house"), re.MULTILINE)
    assert len(described) == len(set(described))
    folders = {path.parent.name for path in (ROOT / "pivot_plugin").glob("*/__init__.py")} | {"hooks", "adapters"}
    assert set(described) | {"preferences"} == folders | {"objectives"}


def paths_of_the_tree() -> list[str]:
    """Files and folders of the tree: a room's name begins its line, its files stand in what is said of it."""
    tree = section(PAGE, "The house").partition("### Where things are")[2].split("```")[1]
    paths, room = [], ""
    for line in tree.strip("\n").splitlines():
        named = re.match(r"(  )?(\w+/) +(.*)", line)
        if named:
            room = ("pivot_plugin/" if named[1] else "") + named[2]
            paths.append(room)
        said = named[3] if named else line
        paths += [room + file for file in re.findall(r"[\w-]+(?:\.py|\.yaml|/)", said)]
    return paths


@pytest.mark.parametrize("path", paths_of_the_tree())
def test_what_the_tree_names_is_there(path: str) -> None:
    assert (ROOT / path).exists(), path


def test_the_tree_names_every_room() -> None:
    rooms = {f"pivot_plugin/{path.parent.name}/" for path in (ROOT / "pivot_plugin").glob("*/__init__.py")}
    assert rooms | {"hooks/", "adapters/"} <= set(paths_of_the_tree())
