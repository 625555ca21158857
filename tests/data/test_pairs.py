"""Pairs in every form people bring, and every defect named with its row."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from pivot_plugin.errors import DataError
from pivot_plugin.preferences import PairDataset, PairStream, hold_out, load
from tests.helpers import picture, row


@pytest.mark.parametrize("extra", [{}, {"idx": 3, "ds_name": "x", "origin_dataset": "y"}])
def test_rows_of_rlaif_v_and_mmpr_are_read_as_they_are(extra: dict[str, Any]) -> None:
    rows = [
        {"image": picture(9, 9, 1), "question": "what?", "chosen": "a", "rejected": "b", **extra},
        {"image": picture(9, 9, 1), "question": "<image>\nwhat?", "chosen": "a", "rejected": "b", **extra},
    ]
    for row_ in rows:
        pair = PairDataset([row_])[0]
        assert [part["type"] for part in pair["prompt"][0]["content"]] == ["image", "text"]
        assert text_of(pair["prompt"]).strip() == "what?"
    assert text_of(PairDataset([{"prompt": "?", "chosen": "a", "reject": "b"}])[0]["rejected"]) == "b"


def text_of(messages: list[dict[str, Any]]) -> str:
    return "".join(part.get("text", "") for message in messages for part in message["content"])


def test_layouts_of_trl_give_the_same_pair() -> None:
    image = picture(20, 20, 1)
    user = {"role": "user", "content": "what?"}
    layouts = [
        {"image": image, "prompt": "what?", "chosen": "a", "rejected": "b"},
        {"images": [image], "prompt": "<image>what?", "chosen": "a", "rejected": "b"},
        {
            "images": [image],
            "prompt": [user],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
        },
        {
            "images": [image],
            "chosen": [user, {"role": "assistant", "content": "a"}],
            "rejected": [user, {"role": "assistant", "content": "b"}],
        },
    ]
    pairs = [PairDataset([layout])[0] for layout in layouts]
    for pair in pairs:
        assert pair["prompt"] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
        assert (text_of(pair["chosen"]), text_of(pair["rejected"])) == ("a", "b")
        assert pair["image_key"] == pairs[0]["image_key"]


def test_markers_in_the_text_keep_their_place() -> None:
    pair = PairDataset([row("left <image> right <image>", "a", "b", picture(9, 9, 1), picture(9, 9, 2))])[0]
    assert [part["type"] for part in pair["prompt"][0]["content"]] == ["text", "image", "text", "image"]


def test_images_stay_encoded_in_a_data_set_until_a_pair_is_read() -> None:
    source = datasets.Dataset.from_list([row("?", "a", "b", picture(30, 20, 1))])
    pairs = PairDataset(source)
    assert set(pairs._rows[0]["images"][0]) == {"bytes", "path"}
    assert pairs[0]["images"][0].size == (30, 20)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_images_of_any_mode_become_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (12, 10)).save(buffer, format="TIFF" if mode == "CMYK" else "PNG")
    assert PairDataset([{**row("?", "a", "b"), "images": [buffer.getvalue()]}])[0]["images"][0].mode == "RGB"


def test_equal_images_have_equal_keys_whatever_they_come_from(tmp_path: Path) -> None:
    picture(20, 20, 1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    picture(20, 20, 2).save(tmp_path / "c.png")
    rows = [{**row("?", "a", "b"), "images": [str(tmp_path / name)]} for name in ("a.png", "b.png", "c.png")]
    first, same, other = PairDataset(rows).image_keys
    assert first == same != other and len(first) == 32


def test_a_folder_gives_what_its_rows_give(tmp_path: Path) -> None:
    picture(20, 20, 1).save(tmp_path / "one.png")
    lines = [{"image": "one.png", "prompt": "what?", "chosen": "a", "rejected": "b", "id": "x"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    for source in (tmp_path, tmp_path / "pairs.jsonl", str(tmp_path)):
        pairs = load(source)
        assert isinstance(pairs, PairDataset)
        assert pairs[0]["id"] == "x"
        assert pairs[0]["images"][0].size == (20, 20)


def refuse(rows: Any, *said: str) -> None:
    with pytest.raises(DataError) as caught:
        pairs = load(rows)
        list(pairs) if isinstance(pairs, PairStream) else pairs.verify()
    for text in said:
        assert text in str(caught.value)
    assert caught.value.remedy


GOOD = {"prompt": "?", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": "?", "chosen": "a"}, "no 'rejected'"),
        ({**GOOD, "rejected": None}, "no 'rejected'"),
        ({**GOOD, "rejected": "a"}, "chosen and rejected are equal"),
        ({**GOOD, "chosen": "  "}, "the chosen answer is empty"),
        ({**GOOD, "rejected": [{"role": "assistant", "content": ""}]}, "the rejected answer is empty"),
        ({**GOOD, "prompt": 3}, "prompt is int"),
        ({**GOOD, "chosen": [{"role": "assistant", "content": [{"type": "video"}]}]}, "content part"),
        ({**GOOD, "prompt": "<image> ?"}, "0 image(s) and 1 image marker(s)"),
        ({**GOOD, "prompt": "<image> ?", "images": [picture(9, 9, 1)] * 2}, "2 image(s) and 1 image marker(s)"),
        ({**GOOD, "images": [3]}, "an image is a int"),
        ({**GOOD, "images": ["nothing.png"]}, "cannot be read"),
        ({**GOOD, "images": ["https://example.org/a.png"]}, "is a URL"),
        ({**GOOD, "images": [b"GIF89a"]}, "unreadable or truncated"),
        ("text", "is a str"),
        ({"chosen": "a", "rejected": ""}, "the rejected answer is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(bad: Any, said: str) -> None:
    refuse([GOOD, GOOD, bad], "row 2 of prefs", said)
    if isinstance(bad, dict):
        stream = datasets.IterableDataset.from_generator(lambda: iter([GOOD, GOOD, bad]))
        refuse(stream, "row 2 of prefs", said)


def test_a_truncated_file_is_named_with_its_path(tmp_path: Path) -> None:
    picture(60, 60, 1).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**GOOD, "image": "cut.png"}))
    refuse(tmp_path, "row 0 of pairs.jsonl", "cut.png", "truncated")


def test_sources_that_are_none(tmp_path: Path) -> None:
    refuse([], "has no rows")
    refuse(17, "is a int")
    refuse(tmp_path, "does not hold one file with rows; it holds: none")
    refuse(tmp_path / "no.jsonl", "cannot be read")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "?"\n')
    refuse(tmp_path, "Line 1 of bad.jsonl is not JSON")
    refuse(datasets.IterableDataset.from_generator(lambda: iter([])), "has no pairs")


def test_no_image_is_on_both_sides_of_the_split() -> None:
    images = [picture(8, 8, seed) for seed in range(40)]
    pairs = PairDataset([row(f"{n}?", "a", "b", images[n % 40]) for n in range(160)])
    train, held = hold_out(pairs, 0.1, seed=0)
    assert held is not None
    assert 32 <= len(held) <= 40
    assert len(train) + len(held) == 160
    assert not set(train.image_keys) & set(held.image_keys)
    again = hold_out(pairs, 0.1, seed=0)[1]
    assert again is not None
    assert [pair["id"] for pair in map(held.__getitem__, range(len(held)))] == [
        pair["id"] for pair in map(again.__getitem__, range(len(again)))
    ]


def test_nothing_is_held_out_of_a_single_image_or_when_not_wanted() -> None:
    one = PairDataset([row(f"{n}?", "a", "b", picture(8, 8, 1)) for n in range(8)])
    assert hold_out(one, 0.5, seed=0)[1] is None
    many = PairDataset([row(f"{n}?", "a", "b", picture(8, 8, n)) for n in range(8)])
    assert hold_out(many, 0, seed=0)[1] is None
