"""No maker gives its answers away without looking, and a maker that does is found out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pivot_plugin.data.edits import edited, light
from pivot_plugin.generation.makers import make
from pivot_plugin.generation.makers.captions import MAKERS as CAPTION_MAKERS
from pivot_plugin.generation.makers.comparing import MAKERS as COMPARING
from pivot_plugin.generation.makers.geometry import MAKERS as GEOMETRY
from pivot_plugin.preferences import PairDataset, QuestionDataset
from pivot_plugin.testing.leaks import leaks
from tests.helpers.fields import stored

COUNT = 200
PICTURES = stored(40)
# said of pictures far from evenly: most dogs are brown, and most numbers two
CAPTIONS = [
    f"a {colour} {animal} and {number} {vehicle} on the {side}"
    for colour in ("red", "red", "red", "blue", "green")
    for animal in ("dog", "dog", "cat", "horse")
    for number in ("two", "two", "two", "three", "four")
    for vehicle in ("buses", "bicycles")
    for side in ("left", "right")
]
CAPTIONED = [{"image": PICTURES[number % len(PICTURES)], "caption": caption} for number, caption in enumerate(CAPTIONS)]


def made(maker: str, **options: Any) -> QuestionDataset:
    captioned = maker == "planted_error"
    return make(CAPTIONED if captioned else PICTURES, maker, count=COUNT, **options)


@pytest.mark.parametrize("maker", [*GEOMETRY, *COMPARING, *CAPTION_MAKERS])
def test_neither_the_text_nor_a_simple_number_tells_an_answer(maker: str) -> None:
    leaks(made(maker)).check()


@pytest.mark.parametrize("maker", ["locate", "same_or_different", "jigsaw", "planted_error"])
def test_no_text_tells_the_chosen_answer_of_a_pair(maker: str) -> None:
    leaks(made(maker, form="pairs")).check()


def planted(rows: QuestionDataset, leak: Callable[[dict[str, Any], bool], dict[str, Any]]) -> QuestionDataset:
    """The same questions, with something done where the answer is the first of its kind."""
    plain = [dict(rows.plain(position)) for position in range(len(rows))]
    first = plain[0]["answer"]
    return QuestionDataset([leak(row, row["answer"] == first) for row in plain])


def worded(row: dict[str, Any], hit: bool) -> dict[str, Any]:
    *before, last = row["prompt"][-1]["content"]
    told = {"type": "text", "text": f"{'Now' if hit else 'Well'}: {last.get('text', '')}"}
    return row | {"prompt": [{"role": "user", "content": [*before, told]}]}


def lit(row: dict[str, Any], hit: bool) -> dict[str, Any]:
    return row | {"images": [edited(source, light(0.6 if hit else 1.0)) for source in row["images"]]}


def compressed(row: dict[str, Any], hit: bool) -> dict[str, Any]:
    return row | {"images": [edited(source, {"edit": "blur", "radius": 0.03 * hit}) for source in row["images"]]}


@pytest.mark.parametrize(("leak", "found"), [(worded, ("text",)), (lit, ("statistic",)), (compressed, ("statistic",))])
def test_a_planted_leak_is_found(leak: Callable[..., dict[str, Any]], found: tuple[str, ...]) -> None:
    report = leaks(planted(made("flip"), leak))
    assert report.leaks == found
    with pytest.raises(AssertionError, match=f"told by {found[0]}"):
        report.check()


def test_an_answer_that_comes_too_often_is_found() -> None:
    rows = made("rotation")
    plain = [dict(rows.plain(position)) for position in range(len(rows))]
    kept = [row for number, row in enumerate(plain) if row["answer"] == "90" or number % 6 == 0]
    assert leaks(QuestionDataset(kept)).leaks == ("text",)


def planted_by_chance(captions: Sequence[str]) -> list[dict[str, Any]]:
    """True captions, and the same with the number drawn anew from all numbers: the rarer one is the wrong one."""
    numbers = ("two", "three", "four")
    return [
        {"images": [], "prompt": "?", "chosen": caption, "rejected": caption.replace(said, other)}
        for number, caption in enumerate(captions)
        for said in numbers
        if said in caption
        for other in [[name for name in numbers if name != said][number % 2]]
    ]


def test_phrases_that_are_drawn_evenly_would_leak() -> None:
    assert leaks(PairDataset(planted_by_chance(CAPTIONS))).leaks == ("text",)


def test_the_report_says_what_chance_is() -> None:
    report = leaks(made("rotation"))
    assert (report.blind_chance, report.rows) == (0.25, COUNT)
    assert report.statistic_chance == pytest.approx(0.25)
    assert not dataclasses.replace(report, blind=0.4).leaks
    assert dataclasses.replace(report, blind=0.45).leaks == ("text",)
