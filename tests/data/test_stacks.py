"""Rows as training stacks keep them, against the normal form written by hand, and the question that is never lost."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from pivot_plugin.data.layout import text_of
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.preferences import (
    PairDataset,
    PairStream,
    QuestionDataset,
    check,
    load,
    load_conversations,
    load_questions,
)
from pivot_plugin.training.batch import ForestCollator
from tests.helpers import Tiny, picture

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def said(role: str, *parts: dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def spoken(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


USER = turn("user", "<image>what?")
ONE = {
    "prompt": [said("user", IMAGE, text("what?"))],
    "chosen": [said("assistant", text("a cat"))],
    "rejected": [said("assistant", text("a dog"))],
}
LONG = ONE | {
    "prompt": [
        said("system", text("be brief")),
        said("user", IMAGE, text("hello")),
        said("assistant", text("hi")),
        said("user", text("what?\nin one word")),
    ]
}
OPENING = [turn("system", "be brief"), turn("user", "<image>hello"), turn("assistant", "hi")]
LAST = turn("user", "what?\nin one word")
V1_USER = {"role": "user", "content": [{"type": "image_url", "value": "0.png"}, {"type": "text", "value": "what?"}]}


def v1_answer(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "value": words}], "loss_weight": 1.0}


SHOWN = {"images": ["0.png"]}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ms-swift, text": ({**SHOWN, "messages": [USER, turn("assistant", "a cat")], "rejected_response": "a dog"}, ONE),
    "ms-swift, turns": (
        {
            **SHOWN,
            "messages": [*OPENING, LAST, turn("assistant", "a cat")],
            "rejected_response": [turn("assistant", "a dog")],
        },
        LONG,
    ),
    "ms-swift, rejected messages": (
        {
            **SHOWN,
            "messages": [*OPENING, LAST, turn("assistant", "a cat")],
            "rejected_messages": [*OPENING, LAST, turn("assistant", "a dog")],
        },
        LONG,
    ),
    "ms-swift, query": (
        {
            **SHOWN,
            "system": "be brief",
            "history": [["<image>hello", "hi"]],
            "query": "what?\nin one word",
            "response": "a cat",
            "rejected_response": "a dog",
        },
        LONG,
    ),
    "LLaMA-Factory sharegpt": (
        {
            **SHOWN,
            "conversations": [spoken("human", "<image>what?")],
            "chosen": spoken("gpt", "a cat"),
            "rejected": spoken("gpt", "a dog"),
        },
        ONE,
    ),
    "LLaMA-Factory sharegpt, several turns": (
        {
            **SHOWN,
            "system": "be brief",
            "conversations": [
                spoken("human", "<image>hello"),
                spoken("gpt", "hi"),
                spoken("human", "what?\nin one word"),
            ],
            "chosen": spoken("gpt", "a cat"),
            "rejected": spoken("gpt", "a dog"),
        },
        LONG,
    ),
    "LLaMA-Factory alpaca": (
        {**SHOWN, "instruction": "<image>what?", "input": "", "chosen": "a cat", "rejected": "a dog"},
        ONE,
    ),
    "LLaMA-Factory alpaca, input and history": (
        {
            **SHOWN,
            "system": "be brief",
            "history": [["hello", "hi"]],
            "instruction": "what?",
            "input": "in one word",
            "chosen": "a cat",
            "rejected": "a dog",
        },
        LONG,
    ),
    "LLaMA-Factory v1": (
        {"chosen_messages": [V1_USER, v1_answer("a cat")], "rejected_messages": [V1_USER, v1_answer("a dog")]},
        ONE,
    ),
}
VERL = {
    "data_source": "geometry3k",
    "prompt": [USER],
    "images": [{"bytes": None, "path": "0.png"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "a cat"},
    "extra_info": {"index": 0},
}
QUESTIONS: dict[str, dict[str, Any]] = {
    "EasyR1": {**SHOWN, "problem": "<image>what?", "answer": "a cat"},
    "VLM-R1, solution": {"image": "0.png", "problem": "what?", "solution": "<answer> a cat </answer>"},
    "VLM-R1, conversations": {
        "image": "0.png",
        "conversations": [spoken("human", "<image>what?"), spoken("gpt", "a cat")],
    },
    "verl": VERL,
}


def as_jsonl(row: dict[str, Any], folder: Path) -> Path:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def as_json(row: dict[str, Any], folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps([row]))
    return folder / "rows.json"


def as_parquet(row: dict[str, Any], folder: Path) -> Path:
    pd.DataFrame([row]).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_arrays(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What pandas gives back: lists as arrays of objects, at every depth."""
    if isinstance(row.get("images"), list):
        row = {**row, "images": [str(folder / "0.png")]}
    elif "image" in row:
        row = {**row, "image": str(folder / "0.png")}
    read = pd.read_parquet(as_parquet(row, folder)).to_dict("records")
    assert any(isinstance(value, np.ndarray) for value in read[0].values()) or "image" in row
    return read


FILES: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "jsonl": as_jsonl,
    "json": as_json,
    "parquet": as_parquet,
}


@pytest.fixture
def shown(tmp_path: Path) -> Image.Image:
    image = picture(40, 30, 1)
    image.save(tmp_path / "0.png")
    return image


def sequences(pair: dict[str, Any], processor: Any) -> list[list[int]]:
    """Tokens of prompt with chosen and of prompt with rejected answer, in the batch that training gets."""
    marker = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    forest = ForestCollator(processor, marker, shared="all")([pair])["forest"].forest
    return [forest.tokens[tree][path].tolist() for tree, path in zip(forest.sequence_tree, forest.paths, strict=True)]


def by_hand(messages: dict[str, Any], side: str, image: Image.Image, processor: Any) -> list[int]:
    """The same by the model's own chat template and processor."""
    prompt = processor.apply_chat_template(messages["prompt"], add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template([*messages["prompt"], *messages[side]], tokenize=False)
    assert whole.startswith(prompt)
    tokens: list[int] = processor(text=[whole], images=[[image]])["input_ids"][0]
    return list(tokens)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_of_a_stack_are_read_as_they_are(layout: str, file: str, shown: Image.Image, tmp_path: Path) -> None:
    row, expected = PAIRS[layout]
    pairs = load(FILES[file](row, tmp_path))
    assert isinstance(pairs, PairDataset)
    pair = pairs.verify()[0]
    assert {name: pair[name] for name in expected} == expected
    assert [image.tobytes() for image in pair["images"]] == [shown.tobytes()]


@pytest.mark.parametrize("layout", PAIRS)
def test_training_sees_the_tokens_of_question_and_answers(
    layout: str, llava: Tiny, shown: Image.Image, tmp_path: Path
) -> None:
    row, expected = PAIRS[layout]
    pairs = load(as_jsonl(row, tmp_path))
    assert isinstance(pairs, PairDataset)
    processor = llava[1]
    assert sequences(pairs[0], processor) == [
        by_hand(expected, side, shown, processor) for side in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("file", [*FILES, "arrays"])
@pytest.mark.parametrize("layout", QUESTIONS)
def test_questions_of_a_stack_are_read_as_they_are(layout: str, file: str, shown: Image.Image, tmp_path: Path) -> None:
    row = QUESTIONS[layout]
    questions = load_questions((FILES | {"arrays": as_arrays})[file](row, tmp_path)).verify()
    question = questions[0]
    assert (question["prompt"], question["answer"]) == (ONE["prompt"], "a cat")
    assert [image.tobytes() for image in question["images"]] == [shown.tobytes()]


MESSAGES = [USER, turn("assistant", "a cat")]
BAD_PAIRS: list[tuple[dict[str, Any], str]] = [
    (
        {"messages": MESSAGES, "rejected_response": "b", "rejected_images": ["1.png", "2.png"]},
        r"has 1 image\(s\) and 2 rejected image\(s\)",
    ),
    ({"messages": MESSAGES, "rejected_response": "b", "videos": ["1.mp4"]}, "has videos, which would"),
    ({"messages": [USER], "rejected_response": "b"}, "messages end with a turn of 'user'"),
    ({"messages": MESSAGES, "rejected_response": None}, "no 'rejected'"),
    ({"messages": MESSAGES, "rejected_messages": [turn("user", "else?"), MESSAGES[1]]}, "no question in common"),
    (
        {"messages": MESSAGES, "rejected_messages": [USER, turn("assistant", "b"), turn("user", "c")]},
        "rejected_messages ask further",
    ),
    ({"messages": "what?", "rejected_response": "b"}, "messages is str"),
    ({"messages": [turn("owl", "hu")], "rejected_response": "b"}, "a turn is by 'owl'"),
    ({"conversations": MESSAGES, "chosen": "a", "rejected": "b"}, "conversations end with a turn of 'assistant'"),
    ({"instruction": "", "input": "", "chosen": "a", "rejected": "b"}, "The question is empty"),
    ({"instruction": "a?", "input": 3, "chosen": "a", "rejected": "b"}, "is a int"),
    (
        {"chosen_messages": [V1_USER, v1_answer("a")], "rejected_messages": [v1_answer("b")]},
        "no question in common",
    ),
]


@pytest.mark.parametrize(("row", "finding"), BAD_PAIRS)
def test_what_a_pair_cannot_hold_is_refused_by_name(row: dict[str, Any], finding: str, shown: Image.Image) -> None:
    with pytest.raises(DataError, match=f"row 0 of prefs.*{finding}") as error:
        PairDataset([{"images": [shown], **row} if "chosen_messages" not in row else row]).verify()
    assert error.value.remedy


ANSWERS = {"chosen": "a cat", "rejected": "a dog"}
LOST: list[dict[str, Any]] = [
    {"query": "what?", **ANSWERS},
    {"ask": [spoken("human", "what?")], **ANSWERS},
    {"prompt": "", "instruction": "what?", **ANSWERS},
    {"prompt": [turn("user", [IMAGE])], "query": "what?", **ANSWERS},
    {
        "query": "what?",
        "chosen": [turn("user", [IMAGE]), turn("assistant", "a")],
        "rejected": [turn("user", [IMAGE]), turn("assistant", "b")],
    },
]


@pytest.mark.parametrize("row", LOST)
def test_a_row_whose_question_cannot_be_found_is_refused(row: dict[str, Any], shown: Image.Image) -> None:
    row = {"images": [shown], **row}
    name = next(column for column in ("query", "ask", "instruction") if column in row)
    for pairs in (PairDataset([row]).verify, lambda: list(load(iter([row])))):
        with pytest.raises(DataError, match=f"row 0 of prefs has no question.*'{name}'") as error:
            pairs()
        assert f"columns={{'prompt': '{name}'}}" in error.value.remedy
    assert [defect.kind for defect in check([row]).defects if defect.severity == "error"] == ["lost question"]


def test_the_column_that_is_named_is_the_question(shown: Image.Image) -> None:
    row = {"images": [shown], "query": "what?", "note": "by hand", **ANSWERS}
    pair = PairDataset([row], columns={"prompt": "query"})[0]
    assert text_of(pair["prompt"]) == "what?"
    question = load_questions([{"images": [shown], "query": "what?", "label": "x"}], columns={"prompt": "query"})[0]
    assert (text_of(question["prompt"]), question["label"]) == ("what?", "x")
    with pytest.raises(SettingsError, match="Did you mean query"):
        load_questions([row], columns={"prompt": "qery"})


def test_a_null_prompt_is_no_implicit_one(shown: Image.Image) -> None:
    row = {"images": [shown], "prompt": None, "chosen": "it is a cat", "rejected": "it is a dog"}
    with pytest.raises(DataError, match="its prompt is null"):
        PairDataset([row]).verify()


@pytest.mark.parametrize("column", ["query", "instruction"])
def test_questions_and_conversations_without_their_question_are_refused(column: str, shown: Image.Image) -> None:
    with pytest.raises(DataError, match=f"has no prompt and no question; it has .*{column}") as error:
        load_questions([{"images": [shown], column: "what?", "answer": "a"}]).verify()
    assert "columns=" in error.value.remedy
    with pytest.raises(DataError, match=f"has no question, and text in '{column}'"):
        load_questions([{"images": [shown], "prompt": " ", column: "what?", "answer": "a"}]).verify()
    for answer in ({"caption": "a cat"}, {"messages": [turn("user", [IMAGE]), turn("assistant", "a cat")]}):
        with pytest.raises(DataError, match=f"has no question, and text in '{column}'"):
            load_conversations([{"images": [shown], column: "what?", **answer}]).verify()


KNOWN_COLUMNS = {
    *("prompt", "question", "chosen", "rejected", "reject", "image", "images", "id", "source", "text", "ranked"),
    *("score_chosen", "score_rejected", "completions", "responses", "candidates", "scores", "ratings"),
    *("instruction", "input", "system", "history", "conversations", "messages"),
}
words = st.text(min_size=1, max_size=12).filter(lambda value: bool(value.strip()) and "<image>" not in value)
question_like = (
    words
    | st.builds(lambda value: [turn("user", value)], words)
    | st.builds(lambda value: [spoken("human", value)], words)
    | st.builds(lambda value: [turn("user", [IMAGE, text(value)])], words)
)
answers = st.tuples(words, words).filter(lambda pair: pair[0] != pair[1])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    column=st.text(min_size=1, max_size=10),
    asked=question_like,
    given_answers=answers,
    as_turns=st.booleans(),
    beside=st.dictionaries(st.sampled_from(["id", "source", "prompt"]), st.just("") | st.none(), max_size=3),
    as_stream=st.booleans(),
)
def test_no_layout_drops_a_column_that_looks_like_the_question(
    column: str,
    asked: Any,
    given_answers: tuple[str, str],
    as_turns: bool,
    beside: dict[str, Any],
    as_stream: bool,
) -> None:
    assume(column not in KNOWN_COLUMNS)
    said_: list[Any] = [
        [turn("user", [IMAGE]), turn("assistant", answer)] if as_turns else answer for answer in given_answers
    ]
    row = {"images": [picture(8, 8, 1)], column: asked, "chosen": said_[0], "rejected": said_[1], **beside}
    if as_turns:
        row.pop("prompt", None)
    with pytest.raises(DataError):
        pairs = load(iter([row]) if as_stream else [row])
        list(pairs) if isinstance(pairs, PairStream) else pairs.verify()


def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    picture(40, 30, 1).save(tmp_path / "pictures" / "0.png")
    (tmp_path / "data").mkdir()
    return tmp_path / "pictures"


def test_images_of_pairs_and_questions_are_looked_up_in_their_folder_and_then_beside_the_data(tmp_path: Path) -> None:
    pictures = elsewhere(tmp_path)
    picture(20, 10, 2).save(tmp_path / "data" / "1.png")
    picture(20, 10, 2).save(tmp_path / "data" / "0.png")
    rows = [{"prompt": "?", **ANSWERS, "image": f"{number}.png"} for number in range(3)]
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"question": "?", "answer": "a", "image": row["image"]} for row in rows]
    (tmp_path / "data" / "asked.json").write_text(json.dumps(asked))
    pairs = load(tmp_path / "data" / "rows.jsonl", image_folder=pictures)
    questions = load_questions(tmp_path / "data" / "asked.json", image_folder=str(pictures))
    for found in (pairs, questions):
        assert isinstance(found, PairDataset | QuestionDataset)
        assert [found[number]["images"][0].size for number in range(2)] == [(40, 30), (20, 10)]
        with pytest.raises(DataError) as error:
            found[2]
        assert str(pictures / "2.png") in error.value.finding
        assert str(tmp_path / "data" / "2.png") in error.value.finding
    with pytest.raises(SettingsError, match="image_folder is given for pairs that are loaded already"):
        load(pairs, image_folder=pictures)
    with pytest.raises(DataError, match=r"image_folder .* is no folder"):
        load(rows, image_folder=tmp_path / "nowhere")


def test_rows_of_an_archive_do_not_leave_the_image_folder(tmp_path: Path) -> None:
    pictures = elsewhere(tmp_path)
    picture(20, 10, 2).save(tmp_path / "secret.png")
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        lines = [json.dumps({"prompt": "?", **ANSWERS, "image": name}) for name in ("0.png", "../secret.png")]
        archive.writestr("pairs.jsonl", "\n".join(lines))
    pairs = load(tmp_path / "pairs.zip", image_folder=pictures)
    assert isinstance(pairs, PairDataset)
    assert pairs[0]["images"][0].size == (40, 30)
    with pytest.raises(DataError, match="lies outside of"):
        pairs[1]
