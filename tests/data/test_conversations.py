"""Conversations in the layouts people have, in one normal form."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image

from pivot_plugin.errors import DataError
from pivot_plugin.preferences import load_conversations
from tests.helpers import picture

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": words} for speaker, words in said]


def as_png() -> bytes:
    buffer = io.BytesIO()
    picture(20, 20, 1).save(buffer, "PNG")
    return buffer.getvalue()


ASKED = [{"role": "user", "content": [IMAGE, text("what?")]}, {"role": "assistant", "content": [text("a cat")]}]
LAYOUTS: dict[str, dict[str, Any]] = {
    "llava": {"conversations": turns(("human", "<image>\nwhat?"), ("gpt", "a cat"))},
    "llava, image behind": {"conversations": turns(("human", "what?\n<image>"), ("gpt", "a cat"))},
    "llava, no marker": {"conversations": turns(("human", "what?"), ("gpt", "a cat"))},
    "messages": {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]},
    "question and answer": {"question": "what?", "answer": "a cat"},
    "prompt and completion": {"prompt": "what?", "completion": [{"role": "assistant", "content": "a cat"}]},
    "leading answer, trailing question": {
        "conversations": turns(("gpt", "hello"), ("human", "what?"), ("gpt", "a cat"), ("human", "and?"))
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_known_layout_becomes_messages_with_the_image_in_front(layout: str) -> None:
    found = load_conversations([{"image": picture(20, 20, 1), **LAYOUTS[layout]}])[0]
    assert found["messages"] == ASKED
    assert len(found["images"]) == 1


@pytest.mark.parametrize("column", ["caption", "text"])
def test_a_caption_is_an_answer_to_the_image_alone(column: str) -> None:
    found = load_conversations([{"image": picture(20, 20, 1), column: "a cat"}])[0]
    assert found["messages"] == [{"role": "user", "content": [IMAGE]}, ASKED[1]]


def test_system_turns_stay_and_several_images_stay_where_they_are_shown() -> None:
    said = turns(("system", "be brief"), ("human", "first <image> then <image> ?"), ("gpt", "same"))
    found = load_conversations([{"images": [picture(9, 9, 1), picture(9, 9, 2)], "conversations": said}])[0]
    assert [message["role"] for message in found["messages"]] == ["system", "user", "assistant"]
    assert [part["type"] for part in found["messages"][1]["content"]] == ["text", "image", "text", "image", "text"]


@pytest.mark.parametrize("image", [None, ""])
def test_a_row_without_image_is_a_text_only_conversation(image: object) -> None:
    found = load_conversations([{"image": image, "conversations": turns(("human", "hi"), ("gpt", "yo"))}])[0]
    assert found["images"] == []
    assert found["messages"][0]["content"] == [text("hi")]


def test_llava_json_with_images_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "images" / "00453").mkdir(parents=True)
    (tmp_path / "images" / "00453" / "1.png").write_bytes(as_png())
    rows = [{"id": "00453", "image": "00453/1.png", **LAYOUTS["llava"]}]
    (tmp_path / "blip.json").write_text(json.dumps(rows))
    found = load_conversations(tmp_path / "blip.json", image_folder=tmp_path / "images").verify()
    assert found[0]["images"][0].size == (20, 20)
    assert found[0]["id"] == "00453"


def test_parquet_with_image_bytes_in_a_folder_per_subset(tmp_path: Path) -> None:
    for name in ("ai2d", "chartqa"):
        rows = [{"image": {"bytes": as_png(), "path": None}, **LAYOUTS["llava"]}, {"image": None, **LAYOUTS["llava"]}]
        rows[1] = {"image": None, "conversations": turns(("human", "hi"), ("gpt", "yo"))}
        (tmp_path / "onevision" / name).mkdir(parents=True)
        table = Dataset.from_list(rows).cast_column("image", Image())
        table.to_parquet(tmp_path / "onevision" / name / "train.parquet")
    found = load_conversations(tmp_path / "onevision").verify()
    assert len(found) == 4
    assert [len(found[n]["images"]) for n in range(4)] == [1, 0, 1, 0]


BAD = [
    ({"picture": 1}, "is no conversation; it has the columns picture"),
    ({"conversations": turns(("human", "hi"))}, "has no answer"),
    ({"conversations": turns(("human", "hi"), ("gpt", " "))}, "has no answer"),
    ({"conversations": turns(("owl", "hi"))}, "a turn is by 'owl'"),
    ({"conversations": "hi"}, "conversations is str"),
    ({"conversations": turns(("human", "<image>"), ("gpt", "yo"))}, "0 image(s) and 1 image marker(s)"),
    ({"image": picture(9, 9, 1), "conversations": turns(("human", "a"), ("gpt", "b <image>"))}, "an answer holds"),
]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_a_row_that_cannot_be_used_is_named_with_what_is_wrong(row: dict[str, Any], said: str) -> None:
    good = {"conversations": turns(("human", "hi"), ("gpt", "yo"))}
    with pytest.raises(DataError) as error:
        load_conversations([good, row]).verify()
    assert "row 1 of conversations" in str(error.value)
    assert said in str(error.value)


def test_bad_rows_can_be_left_out_and_are_listed(tmp_path: Path) -> None:
    good = {"conversations": turns(("human", "hi"), ("gpt", "yo"))}
    found = load_conversations([good, {"a": 1}, good]).verify("skip", tmp_path / "skipped.jsonl")
    assert len(found) == 2
    assert json.loads((tmp_path / "skipped.jsonl").read_text())["row"] == 1
