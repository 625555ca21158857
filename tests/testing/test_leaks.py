"""No maker gives its answers away without looking, and a maker that does is found out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from pivot_plugin.data.edits import edited, light, paste
from pivot_plugin.generation.makers import comparing, geometry, make
from pivot_plugin.generation.makers.captions import MAKERS as CAPTION_MAKERS
from pivot_plugin.generation.makers.comparing import MAKERS as COMPARING
from pivot_plugin.generation.makers.geometry import MAKERS as GEOMETRY
from pivot_plugin.preferences import PairDataset, QuestionDataset
from pivot_plugin.testing.leaks import leaks
from tests.helpers.fields import field, stored
from tests.helpers.images import encoded

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


@pytest.mark.parametrize("maker", ["same_or_different", "odd_one_out"])
def test_a_patch_in_one_view_alone_would_be_found(maker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_or_without(self: Any, draw: object, which: int) -> dict[str, Any]:
        return edited(self.base, *([paste(self.patches[1], self.place)] if which else []))

    monkeypatch.setattr(comparing._Patched, "view", with_or_without)
    assert leaks(made(maker)).leaks == ("statistic",)


def test_how_jpeg_keeps_colours_does_not_say_how_a_picture_was_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    uneven = [encoded(field(90, seed), "JPEG", quality=70, subsampling=1) for seed in range(24)]

    def apart() -> float:
        rows = make(uneven, "rotation", count=96)
        ratios: dict[bool, list[float]] = {True: [], False: []}
        for row in map(rows.plain, range(len(rows))):
            pixels = np.asarray(rows.access.open(row["images"][0]), dtype=float)
            colour = pixels[..., 0] - pixels[..., 2]
            along, across = (np.abs(np.diff(colour, 2, axis=axis)).mean() for axis in (0, 1))
            ratios[row["answer"] in ("0", "180")].append(np.log(along / across))
        return float(abs(np.mean(ratios[True]) - np.mean(ratios[False])) / np.std(ratios[True]))

    assert apart() < 1.0
    monkeypatch.setattr(geometry, "even_colours", lambda: light(1.0))
    assert apart() > 3.0


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
