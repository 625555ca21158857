"""Property tests whose failures can be counted: a few hundred examples in `make test`, as many as asked in `make fuzz`.

With PIVOT_FUZZ=10000 in the environment so many are tried of each; nothing stops at the first that breaks, and how many
broke, of how many kinds, is printed, each with an example. Such an example is then kept as a test.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
from hypothesis import strategies as st

from pivot_plugin.errors import PivotError
from tests.helpers.examples import EXAMPLES, FUZZING

WANTED = EXAMPLES if FUZZING else 0
Case = TypeVar("Case")


@dataclass
class Tally:
    """How many cases were tried, refused in words, and broke, by where."""

    name: str
    tried: int = 0
    refused: int = 0
    broke: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"{self.name}: {self.tried:,} tried, {self.refused:,} refused, {self.broke.total():,} broke"
        kinds = [f"  {count:,} x {kind}: {self.examples[kind]}" for kind, count in self.broke.most_common()]
        return "\n".join([f"{head}, of {len(self.broke)} kinds", *kinds])


def fuzz(name: str, cases: st.SearchStrategy[Case], look: Callable[[Case], Any], cheap: int = 200) -> None:
    """Try cases: each works, or is refused with a `PivotError`.

    Args:
        name: of what is tried.
        cases: strategy.
        look: tries one; it may assert more.
        cheap: how many are tried in `make test`.
    """
    tally = Tally(name)

    @hypothesis.settings(
        max_examples=WANTED or cheap,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        database=None,
        print_blob=True,
    )
    @hypothesis.given(cases)
    def tried(case: Case) -> None:
        tally.tried += 1
        try:
            try:
                look(case)
            except PivotError as error:
                tally.refused += 1
                assert error.finding.strip() and error.remedy.strip(), f"an error without content: {error!r}"
                str(error).encode()
        except Exception as error:
            if not WANTED:
                raise
            kind = _kind(error)
            tally.broke[kind] += 1
            tally.examples.setdefault(kind, f"{error!r:.200} of {case!r:.300}")

    tried()
    print(f"\n{tally}")
    assert not tally.broke, str(tally)


def _kind(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "pivot_plugin" in frame.filename] or frames
    return f"{type(error).__name__} in {Path(own[-1].filename).name}:{own[-1].name}"


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of a file with some of them changed, left out, repeated, or cut off."""
    damage = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not damage:
            break
        start = draw(st.integers(0, len(damage) - 1))
        length = draw(st.integers(1, 16))
        match draw(st.sampled_from(["set", "flip", "insert", "drop", "cut", "repeat", "zero"])):
            case "set":
                damage[start : start + length] = draw(st.binary(min_size=length, max_size=length))
            case "flip":
                damage[start] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                damage[start:start] = draw(st.binary(min_size=1, max_size=length))
            case "drop":
                del damage[start : start + length]
            case "cut":
                del damage[start:]
            case "repeat":
                damage[start:start] = damage[start : start + length]
            case "zero":
                damage[start : start + length] = bytes(length)
    return bytes(damage)


# what stands where something else is expected
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 3.5, float("nan"), float("inf"), 10**5000, "", " ", "text", "\ud800", "\x00", "/dev/zero",
    "a" * 300, [], {}, [None], [[]], [{}], {"a": 1}, b"", b"\xff", "<image>", "<|im_end|>", {"role": "user"},
    [{"role": 1}],
    [{"role": "user", "content": [{"type": "text", "content": "x"}]}], [{"role": "user", "content": 3}],
    object(), {1: 2},
]  # fmt: skip
