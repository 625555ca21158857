"""The report of one pass: every defect singly and mixed, with its rows."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pivot_plugin.data.layout import text_of
from pivot_plugin.errors import DataError, ModelError
from pivot_plugin.preferences import PairDataset, check, load
from pivot_plugin.training.batch import ForestCollator
from tests.helpers import Tiny, picture, row
from tests.helpers.images import encoded, png_header


def good(number: int) -> dict[str, Any]:
    return row(f"{number}?", f"yes {number}", f"no! {number}", picture(16, 16, number))


def with_image(content: bytes) -> dict[str, Any]:
    return {**good(90), "images": [content]}


PICTURE = encoded(picture(60, 60, 5))
# each row that cannot be used, and the kind it is reported under
BAD: dict[str, tuple[Any, str]] = {
    "not an image": (with_image(b"text"), "unreadable image"),
    "truncated": (with_image(PICTURE[: len(PICTURE) // 2]), "unreadable image"),
    "zero-size": (with_image(b""), "empty image"),
    "over-large": (with_image(png_header(30_000, 30_000)), "over-large image"),
    "missing": ({**good(91), "images": ["nothing.png"]}, "image not found"),
    "url": ({**good(91), "images": ["https://example.org/a.png"]}, "image given as URL"),
    "markers": (row("<image> and <image>", "a", "b", picture(9, 9, 1)), "images and markers differ"),
    "marker in answer": (row("?", "a <image>", "b"), "image marker in an answer"),
    "empty": (row("?", " ", "b"), "empty answer"),
    "equal": (row("?", "same", "same"), "equal answers"),
    "no rejected": ({"prompt": "?", "chosen": "a", "rejected": None}, "missing column"),
    "wrong type": (row("?", 3, "b"), "wrong type"),  # type: ignore[arg-type]
    "not a dict": (17, "wrong type"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_single_defect_is_reported_with_its_row(name: str) -> None:
    bad, kind = BAD[name]
    report = check([good(0), good(1), bad, good(2)])
    assert [(defect.kind, list(defect.rows), defect.severity) for defect in report.defects] == [(kind, [2], "error")]
    assert "row 2 of prefs" in report.defects[0].examples[0]
    assert report.defects[0].remedy
    assert report.errors == 1
    assert report.statistics["usable_pairs"] == 3


def mixed() -> tuple[list[Any], dict[str, list[int]]]:
    """All bad rows among good ones, and where each kind stands."""
    rows: list[Any] = [good(0)]
    expected: dict[str, list[int]] = {}
    for bad, kind in BAD.values():
        expected.setdefault(kind, []).append(len(rows))
        rows += [bad, good(len(rows))]
    return rows, expected


def test_defects_are_told_apart_when_mixed() -> None:
    rows, expected = mixed()
    report = check(rows)
    assert {defect.kind: list(defect.rows) for defect in report.defects} == expected
    assert report.errors == len(BAD)


def test_processes_find_what_one_process_finds() -> None:
    rows, expected = mixed()
    many = rows + [good(200 + n) for n in range(1000)]
    found = {defect.kind: list(defect.rows) for defect in check(many).defects if defect.severity == "error"}
    assert found == expected


def test_skipping_leaves_out_what_check_reports_and_lists_it(tmp_path: Path) -> None:
    rows, expected = mixed()
    listed = tmp_path / "deep" / "skipped.jsonl"
    pairs = load(rows, on_bad_row="skip", skipped=listed)
    assert isinstance(pairs, PairDataset)
    assert len(pairs) == len(rows) - len(BAD)
    # rows keep the numbers they have in the source, and what they say
    sound = sorted(set(range(len(rows))) - {row for bad_rows in expected.values() for row in bad_rows})
    assert [pairs.where(i) for i in range(len(pairs))] == [f"row {row} of prefs" for row in sound]
    assert [text_of(pairs[i]["chosen"]) for i in range(len(pairs))] == [rows[row]["chosen"] for row in sound]
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    by_kind: dict[str, list[int]] = {}
    for line in lines:
        by_kind.setdefault(line["defect"], []).append(line["row"])
        assert f"row {line['row']} of prefs" in line["finding"]
    assert by_kind == expected


def test_skipping_works_on_a_stream_too(tmp_path: Path) -> None:
    rows, _ = mixed()
    stream = load(iter(rows), on_bad_row="skip", skipped=tmp_path / "skipped.jsonl")
    assert len(list(stream)) == len(rows) - len(BAD)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == len(BAD)


def test_nothing_but_bad_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"All 2 rows of prefs are bad; the last: .*empty"):
        load([row("?", " ", "b"), row("?", "", "b")], on_bad_row="skip", skipped=tmp_path / "s.jsonl")


def kinds(rows: list[Any], **options: Any) -> dict[str, list[int]]:
    return {defect.kind: list(defect.rows) for defect in check(rows, **options).defects}


def test_repeats_and_contradictions() -> None:
    image = picture(16, 16, 1)
    rows = [
        row("?", "a", "b", image),
        row("?", "a", "c", image),
        row("?", "a", "b", image),
        row("?", "b", "a", image),
        row("other?", "b", "a", image),
        row("?", "b", "a", picture(16, 16, 2)),
    ]
    report = check(rows)
    found = {defect.kind: (list(defect.rows), defect.severity) for defect in report.defects}
    assert found == {
        "contradictory pairs": ([0, 2, 3], "error"),
        "duplicated pairs": ([2], "warning"),
    }
    assert report.errors == 3
    assert report.statistics["distinct_image_sets"] == 2
    assert report.statistics["pairs_that_share_an_image"] == 5
    assert report.statistics["most_pairs_on_one_image"] == 5


def test_near_equal_answers() -> None:
    assert kinds([row("?", "A cat.", "a cat"), row("?", "a  cat", "a cat"), row("?", "a cat", "a car")]) == {
        "near-equal answers": [0, 1]
    }
    # where nothing but signs is said, they are the answer
    assert kinds([row("?", "+", "-"), row("?", "\u00bd", "\u00bc")]) == {}


def test_special_tokens_are_named() -> None:
    found = kinds([row("?", "<think>x</think>a", "b"), row("?", "a", "b"), row("?", "a", "b<|im_end|>")])
    assert found == {
        "special token </think>": [0],
        "special token <think>": [0],
        "special token <|im_end|>": [2],
    }


@pytest.mark.parametrize(("longer", "named"), [(0.9, "chosen"), (0.1, "rejected"), (0.5, None)])
def test_length_bias_is_named_where_it_is_none_of_chance(longer: float, named: str | None) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(200):
        answers = [f"{number} " + "x" * 30, f"{number} y"]
        if rng.random() > longer:
            answers.reverse()
        rows.append(row(f"{number}?", *answers))
    found = [defect for defect in check(rows).defects if defect.kind == "length bias"]
    assert [named in defect.examples[0] for defect in found] == ([True] if named else [])


def test_tokens_are_those_that_training_sees(tiny: Tiny, rows: Any) -> None:
    """Against the batch that the trainer's collator makes of each pair."""
    _, processor = tiny
    report = check(rows, processor)
    statistics = report.statistics
    marker = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    collator = ForestCollator(processor, marker, shared="all")
    pairs = PairDataset(rows)
    lengths, images = [], []
    for position in range(len(pairs)):
        batch = collator([pairs[position]])
        forest = batch["forest"].forest
        lengths.append(int(forest.is_node[0].sum()))
        images.append(sum(batch["forest"].image_tokens))
    assert statistics["image_tokens_per_pair"]["mean"] == pytest.approx(np.mean(images), abs=0.01)
    assert statistics["tokens_prompt_and_chosen"]["mean"] == pytest.approx(np.mean(lengths), abs=0.01)
    assert statistics["image_tokens_per_image"] == pytest.approx(sum(images) / 8, abs=0.01)


def test_a_processor_without_images_is_refused(llava: Tiny) -> None:
    with pytest.raises(ModelError, match="without image token or tokenizer"):
        check([good(0)], llava[1].tokenizer)


def test_the_report_reads_as_text_and_as_data() -> None:
    rows, _ = mixed()
    report = check(rows)
    text = str(report)
    assert text.startswith(f"prefs: {len(rows)} pairs, {len(BAD)} with errors")
    assert "error: over-large image: 1 (rows 7)" in text
    data = json.loads(json.dumps(report.as_dict()))
    assert data["rows_with_errors"] == len(BAD)


def test_a_stream_is_not_checked_as_a_whole() -> None:
    with pytest.raises(DataError, match="prefs is a stream"):
        check(iter([good(0)]))


def test_modes_that_processors_do_not_take_are_no_defect() -> None:
    buffer = io.BytesIO()
    Image.new("I;16", (9, 9)).save(buffer, "PNG")
    assert kinds([with_image(buffer.getvalue())]) == {}
