"""The column `rejected_images`: read in every layout, held to its number, looked at like any image, and saved."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pivot_plugin.data.blind import WithoutPicture
from pivot_plugin.data.pairs import PairDataset, PairStream
from pivot_plugin.data.split import hold_out
from pivot_plugin.errors import DataError
from pivot_plugin.preferences import check, load, load_questions, save
from tests.helpers import picture
from tests.helpers.images import encoded

TRUE, OTHER = picture(20, 20, 1), picture(20, 20, 2)
USER = {"role": "user", "content": "<image>what?"}
CAT, DOG = ({"role": "assistant", "content": f"a {name}"} for name in ("cat", "dog"))
V1_USER, V1_CAT, V1_DOG = (
    {"role": role, "content": [{"type": "text", "value": text}]}
    for role, text in (("user", "what?"), ("assistant", "a cat"), ("assistant", "a dog"))
)


def v1(image: Image.Image) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "value": image}, {"type": "text", "value": "what?"}]}


# what is there beside images and rejected_images
LAYOUTS: dict[str, dict[str, Any]] = {
    "trl": {"prompt": "what?", "chosen": "a cat", "rejected": "a dog"},
    "trl, messages": {"prompt": [USER], "chosen": [CAT], "rejected": [DOG]},
    "trl, implicit prompt": {"chosen": [USER, CAT], "rejected": [USER, DOG]},
    "rlaif-v": {"question": "what?", "chosen": "a cat", "rejected": "a dog"},
    "rlhf-v": {"text": json.dumps({"question": "what?", "chosen": "a cat", "rejected": "a dog"})},
    "scored": {"prompt": "what?", "completions": ["a dog", "a cat"], "scores": [0, 1]},
    "ranked": {"prompt": "what?", "ranked": ["a cat", "a dog"]},
    "ms-swift": {"messages": [USER, CAT], "rejected_response": "a dog"},
    "ms-swift, messages": {"messages": [USER, CAT], "rejected_messages": [USER, DOG]},
    "ms-swift, query": {"query": "what?", "response": "a cat", "rejected_response": "a dog"},
    "llama-factory, sharegpt": {"conversations": [USER], "chosen": CAT, "rejected": DOG},
    "llama-factory, alpaca": {"instruction": "what?", "chosen": "a cat", "rejected": "a dog"},
}
ONE_ANSWER: dict[str, dict[str, Any]] = {
    "trl": {"prompt": "what?", "chosen": "a cat"},
    "ms-swift": {"messages": [USER, CAT]},
    "ms-swift, messages": {"messages": [USER, CAT], "rejected_messages": [USER, CAT]},
    "ms-swift, query": {"query": "what?", "response": "a cat"},
    "trl, both": {"prompt": "what?", "chosen": "a cat", "rejected": "a cat"},
}


def said(pair: dict[str, Any]) -> tuple[str, str]:
    chosen, rejected = (pair[side][0]["content"][0]["text"] for side in ("chosen", "rejected"))
    return chosen, rejected


def shown(pair: dict[str, Any]) -> tuple[list[bytes], list[bytes]]:
    images, rejected = ([image.tobytes() for image in pair[name]] for name in ("images", "rejected_images"))
    return images, rejected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_column_is_read_in_every_layout(layout: str) -> None:
    rows = [{**LAYOUTS[layout], "images": [TRUE], "rejected_images": [OTHER]}]
    for pairs in (load(rows), PairStream(rows)):
        pair = next(iter(pairs)) if isinstance(pairs, PairStream) else pairs[0]
        assert said(pair) == ("a cat", "a dog")
        assert shown(pair) == ([TRUE.tobytes()], [OTHER.tobytes()])
        assert pair["rejected_image_key"] not in ("", pair["image_key"])
        assert sum(part["type"] == "image" for part in pair["prompt"][0]["content"]) == 1
    # one file as well as a list of one
    single = load([{**rows[0], "rejected_images": OTHER}])[0]
    assert shown(single) == shown(pair)


@pytest.mark.parametrize("layout", ONE_ANSWER)
def test_one_answer_about_two_pictures_is_a_pair(layout: str) -> None:
    rows = [{**ONE_ANSWER[layout], "images": [TRUE], "rejected_images": [OTHER]}]
    assert said(load(rows)[0]) == ("a cat", "a cat")
    for same in (load([{**rows[0], "rejected_images": [TRUE]}]), PairStream([{**rows[0], "rejected_images": [TRUE]}])):
        with pytest.raises(DataError, match="answer are equal, and so are their images"):
            list(same)  # type: ignore[call-overload]


def test_pictures_in_the_turns_of_a_rejected_conversation_are_its_rejected_images() -> None:
    rows = [{"chosen_messages": [v1(TRUE), V1_CAT], "rejected_messages": [v1(OTHER), V1_DOG]}]
    assert shown(load(rows)[0]) == ([TRUE.tobytes()], [OTHER.tobytes()])
    same = load([{"chosen_messages": [v1(TRUE), V1_CAT], "rejected_messages": [v1(TRUE), V1_DOG]}])[0]
    assert "rejected_images" not in same
    both = {"messages": [v1(TRUE), V1_CAT], "rejected_messages": [v1(OTHER), V1_DOG], "rejected_images": [OTHER]}
    with pytest.raises(DataError, match="in the rejected turns and in rejected_images"):
        load([both])[0]


def test_columns_can_name_it() -> None:
    rows = [{"ask": "what?", "good": "a cat", "bad": "a dog", "photo": TRUE, "drawing": OTHER}]
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad", "images": "photo", "rejected_images": "drawing"}
    assert shown(load(rows, columns=columns)[0]) == ([TRUE.tobytes()], [OTHER.tobytes()])


ROW = {"prompt": "what?", "chosen": "a cat", "rejected": "a dog", "images": [TRUE]}


@pytest.mark.parametrize(
    ("bad", "finding", "kind"),
    [
        ({"rejected_images": [OTHER, OTHER]}, r"1 image\(s\) and 2 rejected", "images and rejected images differ"),
        (
            {"images": [], "rejected_images": [OTHER]},
            r"0 image\(s\) and 1 rejected",
            "images and rejected images differ",
        ),
        ({"rejected_images": [encoded(OTHER)[:60]]}, "rejected image: an image .* truncated", "unreadable image"),
        ({"rejected_images": ["gone.png"]}, "rejected image: image 'gone.png'", "image not found"),
        ({"rejected_images": [b""]}, "rejected image: an image", "empty image"),
    ],
)
def test_bad_ones_are_named_and_can_be_left_out(bad: dict[str, Any], finding: str, kind: str, tmp_path: Path) -> None:
    rows = [ROW, {**ROW, **bad}, {**ROW, "rejected_images": [OTHER]}]
    with pytest.raises(DataError, match=f"row 1 of prefs.*{finding}"):
        PairDataset(rows).verify()
    kept = load(rows, on_bad_row="skip", skipped=tmp_path / "skipped.jsonl")
    assert len(kept) == 2
    assert json.loads((tmp_path / "skipped.jsonl").read_text())["defect"] == kind
    assert {defect.kind for defect in check(rows).defects} >= {kind}


def test_questions_with_the_column_are_refused_as_before() -> None:
    with pytest.raises(DataError, match="has rejected_images, which would be lost"):
        load_questions([{"problem": "what?", "solution": "a", "images": [TRUE], "rejected_images": [OTHER]}])[0]


def test_a_picture_rejected_for_itself_is_a_finding() -> None:
    report = check([ROW, {**ROW, "rejected_images": [TRUE]}, {**ROW, "rejected_images": [OTHER]}])
    found = {defect.kind: list(defect.rows) for defect in report.defects}
    assert found["rejected images equal images"] == [1]
    assert report.statistics["pairs_with_rejected_images"] == 2
    # of different pictures they are different pairs
    assert "duplicated pairs" not in found


def test_keys_and_fingerprints_see_it_and_those_of_rows_without_are_as_they_were() -> None:
    pairs = load([ROW, {**ROW, "rejected_images": [OTHER]}, {**ROW, "rejected_images": [picture(20, 20, 3)]}])
    assert len({pairs.content_key(position) for position in range(3)}) == 3
    assert len(set(pairs.image_keys)) == 1
    assert [key != b"" for key in pairs.rejected_image_keys] == [False, True, True]
    assert load([ROW]).content_key(0) == pairs.content_key(0)
    assert "rejected_image_key" not in pairs[0]


def test_it_is_saved_and_read_again(tmp_path: Path) -> None:
    rows = [{**ROW, "rejected_images": [OTHER]}, ROW]
    save(load(rows), tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert shown(again[0]) == ([TRUE.tobytes()], [OTHER.tobytes()])
    assert "rejected_images" not in again[1]
    assert again.fingerprint() == load(rows).fingerprint()


def test_the_picture_is_taken_away_with_the_rejected_one() -> None:
    rows = load([{**ROW, "rejected_images": [OTHER]}, {**ROW, "images": [OTHER]}]).verify()
    for how in ("other", "mean"):
        assert "rejected_images" not in WithoutPicture(rows, how)[0]  # type: ignore[arg-type]


def test_no_picture_is_held_out_that_another_side_shows_as_rejected() -> None:
    """A pair and its mirror image stay on one side, and so does whatever hangs on them."""
    pictures = [picture(12, 12, seed) for seed in range(80)]
    rows = [
        {**ROW, "images": [pictures[one]], "rejected_images": [pictures[other]]}
        for even in range(0, 80, 2)
        for one, other in ((even, even + 1), (even + 1, even))
    ]
    train, held = hold_out(load(rows), 0.1, seed=0)
    assert held is not None
    sides = [
        {image.tobytes() for position in range(len(part)) for image in shown_images(part[position])}
        for part in (train, held)
    ]
    assert len(held) >= 16
    assert not sides[0] & sides[1]


def shown_images(pair: dict[str, Any]) -> list[Image.Image]:
    return [*pair["images"], *pair["rejected_images"]]


def test_pairs_that_all_hang_together_by_their_pictures_are_not_held_out(caplog: pytest.LogCaptureFixture) -> None:
    pictures = [picture(12, 12, seed) for seed in range(40)]
    rows = [
        {**ROW, "images": [pictures[number]], "rejected_images": [pictures[(number + 1) % 40]]} for number in range(40)
    ]
    train, held = hold_out(load(rows), 0.1, seed=0)
    assert held is None and len(train) == 40
    assert "share pictures" in caplog.text and "eval_prefs" in caplog.text
