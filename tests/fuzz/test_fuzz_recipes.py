"""Whatever a recipe holds, it is read or refused with the line of what cannot be."""

import re
import tempfile
from pathlib import Path

from hypothesis import strategies as st

from pivot_plugin.errors import PivotError
from pivot_plugin.recipes import load_recipe
from pivot_plugin.recipes.file import READY, ready_recipe
from tests.helpers.fuzzing import fuzz

KEYED = re.compile(r"(\s*)([\w.-]+):\s*(.*)")
VALUES = [
    *["", "null", "true", "-1", "0", "1.5", "1e400", ".nan", ".inf", "'text'", "[]", "{}", "[1, [2]]", "{a: 1}"],
    *["{1: 2}", "{null: 1}", "2026-01-01", "!!binary aGk=", "!!python/object:os.system {}", "&a [*a]", "? [1,2] : 3"],
    *["9" * 30, "9" * 5000, "0x1F", "1_000", "''", "' '", "!!set {a}", "*missing", "!!int x", "!!float z", "!foo bar"],
    *['"\\ud800"', "[~]", "1:30", "'\\x00'", "{source: 1}", "{path: 3}", "{source: x, rows: a}", "{? {a: 1} : 2}", "-"],
    *["{path: x, split: 3}", "{path: x, sample: -1}", "[1, 1]", "'2+2'", "{probe: 3}", "[" * 2000, "yes", "<<: 3"],
]
CHARACTERS = "\x00\x07\t :{}[]'\"&*!\ud800\u0085\U0001f600"


@st.composite
def broken_recipes(draw: st.DrawFn) -> str:
    lines = ready_recipe(draw(st.sampled_from(READY))).splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        keyed = KEYED.match(lines[at])
        indent, key, value = keyed.groups() if keyed else ("", "a", lines[at])
        match draw(st.sampled_from(["value", "value", "value", "key", "colon", "repeat", "drop", "character"])):
            case "value":
                lines[at] = f"{indent}{key}: {draw(st.sampled_from(VALUES))}"
            case "key":
                lines[at] = f"{indent}{draw(st.sampled_from([*VALUES, 'datta', 'lerning_rate']))}: {value}"
            case "colon":
                lines[at] = lines[at].replace(":", draw(st.sampled_from(["", " :", "::"])), 1)
            case "repeat":
                lines.insert(at, draw(st.sampled_from(lines)))
            case "drop" if len(lines) > 1:
                del lines[at]
            case "character":
                cut = draw(st.integers(0, len(lines[at])))
                lines[at] = lines[at][:cut] + draw(st.sampled_from(CHARACTERS)) + lines[at][cut:]
    return "\n".join(lines)


def test_broken_recipes() -> None:
    def look(text: str) -> None:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "mine.yaml"
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            try:
                load_recipe(path).described()
            except PivotError as error:
                assert re.search(r"mine\.yaml, line \d+", error.finding), error.finding
                raise

    fuzz("recipes", broken_recipes(), look, cheap=200)
