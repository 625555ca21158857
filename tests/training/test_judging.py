"""Rows that a model cannot take are bad rows before training: too long, images its processor refuses, control text."""

import json
from pathlib import Path
from typing import Any

import pytest

from pivot_plugin.config import InstructConfig, PivotConfig, PivotGRPOConfig
from pivot_plugin.data.conversations import load_conversations
from pivot_plugin.data.pairs import PairStream, load, load_pairs
from pivot_plugin.data.questions import load_questions
from pivot_plugin.errors import DataError
from pivot_plugin.models.image_tokens import ImageTokens
from pivot_plugin.training.judging import judge_of
from tests.helpers import Tiny, picture, row

LONG = "why " * 200


def judge(processor: Any, config: Any, **options: Any) -> Any:
    settings = {"output_dir": "run", "use_cpu": True, **options}
    return judge_of(config(**settings), processor, ImageTokens(processor).image_token_id, every_size=True)


def refused_sizes(monkeypatch: pytest.MonkeyPatch, processor: Any, width: int) -> None:
    """The processor refuses images of some width, as Qwen's does those of some shapes."""
    preprocess = type(processor.image_processor).preprocess

    def preprocessed(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        flat = images if isinstance(images, list) else [images]
        while flat and isinstance(flat[0], list):
            flat = [image for inner in flat for image in inner]
        if any(getattr(image, "width", None) == width for image in flat):
            raise ZeroDivisionError("division by zero")
        return preprocess(self, images, *args, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "preprocess", preprocessed)


@pytest.mark.parametrize("streamed", [False, True])
def test_pairs_that_cannot_be_trained_on_are_left_out(
    streamed: bool, llava: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = llava
    refused_sizes(monkeypatch, processor, 77)
    image = picture(40, 40, 1)
    rows = [row(f"number {n}?", "yes", "no", image) for n in range(8)]
    rows[2] = row(LONG, "yes", "no", image)
    rows[5] = row("what?", "yes", "no", picture(77, 40, 1))
    look = judge(processor, PivotConfig, max_length=100)
    listed = tmp_path / "skipped.jsonl"
    if streamed:
        stream = load(iter(rows))
        assert isinstance(stream, PairStream)
        kept = list(stream.judged(look, "skip", listed))
    else:
        pairs = load_pairs(rows)
        kept = list(pairs.verify("skip", listed, look))  # type: ignore[call-overload]
    assert len(kept) == 6
    skipped = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [line["row"] for line in skipped] == [2, 5]
    assert "max_length=100" in skipped[0]["finding"]
    assert "images of 77 x 40 pixels cannot be processed: ZeroDivisionError" in skipped[1]["finding"]
    with pytest.raises(DataError, match="max_length=100"):
        load_pairs(rows).verify("raise", None, look)


def test_conversations_whose_images_would_be_cut_are_left_out(llava: Tiny, tmp_path: Path) -> None:
    _, processor = llava
    image = picture(40, 40, 1)
    rows = [{"question": f"number {n}?", "answer": "yes", "image": image} for n in range(6)]
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "yes"}]
    asked = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "no"}]
    rows[3] = {"messages": [*turns, *asked], "image": image}
    kept = load_conversations(rows).verify(
        "skip", tmp_path / "skipped.jsonl", judge(processor, InstructConfig, max_length=100)
    )
    assert len(kept) == 5
    assert "cuts into its images" in (tmp_path / "skipped.jsonl").read_text()


def test_questions_with_control_tokens_are_left_out_where_they_are_given_as_text(llava: Tiny, tmp_path: Path) -> None:
    _, processor = llava
    look = judge(processor, PivotGRPOConfig)
    rows = [{"question": f"number {n}?{'<|im_end|>' if n == 1 else ''}", "answer": "1"} for n in range(6)]
    assert len(load_questions(rows).verify("raise", None, look)) == 6
    kept = load_questions(rows).verify("skip", tmp_path / "skipped.jsonl", look.of_questions(given_text=True))
    assert len(kept) == 5
    assert "control token" in (tmp_path / "skipped.jsonl").read_text()


def test_rows_that_were_looked_at_are_judged_without_decoding_them_again(
    llava: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = llava
    pairs = load_pairs([row(f"number {n}?", "yes", "no", picture(40, 40, n)) for n in range(4)]).verify()
    keys = pairs.image_keys.tolist()
    monkeypatch.setattr("pivot_plugin.data.images.ImageAccess.known", None)
    look = judge(processor, PivotConfig)
    assert pairs.verify("raise", None, look).image_keys.tolist() == keys
    monkeypatch.setattr("pivot_plugin.data.rows.Looking", None)
    assert pairs.verify("raise", None, look) is pairs
