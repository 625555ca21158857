"""Data sets that are made of pictures: from what people bring, lazily, the same every time; and what cannot be made."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image, IterableDataset

from pivot_plugin.data.images import ImageAccess
from pivot_plugin.errors import DataError, PivotError, PluginError, SettingsError
from pivot_plugin.generation.makers import (
    Draw,
    Maker,
    Making,
    Question,
    Unsuitable,
    lookup,
    make,
    pictures_of,
    write_made,
)
from pivot_plugin.preferences import PairDataset, QuestionDataset, load, load_questions
from tests.helpers import picture
from tests.helpers.fields import field, stored, written


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return written(tmp_path / "photos", 6)


def sources(photos: Path) -> dict[str, Any]:
    files = sorted(photos.glob("*.png"))
    as_bytes = [file.read_bytes() for file in files]
    return {
        "folder": photos,
        "text": str(photos),
        "paths": [str(file) for file in files],
        "bytes": as_bytes,
        "rows": [{"image": str(file), "other": 1} for file in files],
        "table": Dataset.from_list([{"image": {"bytes": one, "path": None}} for one in as_bytes]).cast_column(
            "image", Image()
        ),
        "stream": IterableDataset.from_generator(lambda: ({"image": str(file)} for file in files)),
        "generator": ({"images": [str(file)]} for file in files),
    }


KINDS = ("folder", "text", "paths", "bytes", "rows", "table", "stream", "generator")


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_holds_the_pictures_the_same_is_made_of_them(photos: Path, kind: str) -> None:
    expected = make(photos, "same_or_different", count=4)
    questions = make(sources(photos)[kind], "same_or_different", count=4)
    for position in (0, 3):
        ours, theirs = questions[position], expected[position]
        assert [image.tobytes() for image in ours["images"]] == [image.tobytes() for image in theirs["images"]]
        assert (ours["answer"], ours["prompt"]) == (theirs["answer"], theirs["prompt"])


def test_one_file_and_a_folder_of_folders(photos: Path, tmp_path: Path) -> None:
    assert len(pictures_of(str(photos / "000.png"))) == 1
    (photos / "below").mkdir()
    field(64, 9).save(photos / "below" / "9.JPG", "JPEG")
    (photos / "notes.txt").write_text("of nobody")
    (photos / ".hidden").mkdir()
    assert len(pictures_of(photos)) == 7


def test_an_image_folder_of_hugging_face_is_read_with_its_captions(photos: Path) -> None:
    lines = [{"file_name": f"{number:03}.png", "text": f"a {word} dog"} for number, word in enumerate(("red", "blue"))]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = pictures_of(photos, captions=True)
    assert [one.captions for one in found] == [("a red dog",), ("a blue dog",)]
    assert found[0].open().size == (64, 64)


def test_the_same_seed_makes_the_same_and_another_makes_another(photos: Path) -> None:
    first, again, other = (make(photos, "jigsaw", count=8, seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    # a question is the same however many are made
    assert make(photos, "jigsaw", count=20, seed=3).plain(5)["images"] == first.plain(5)["images"]


def test_nothing_is_opened_before_it_is_read_and_nothing_is_stored(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = make(photos, "rotation", count=500)
    opened: list[object] = []
    before = ImageAccess.open
    monkeypatch.setattr(
        ImageAccess, "open", lambda self, source, where="image": opened.append(source) or before(self, source, where)
    )
    row = questions.plain(7)
    # for a look whether it is suitable, a picture itself is opened; none is rendered
    assert set(map(type, opened)) == {str}
    assert all(set(image) == {"path", "edits"} for image in row["images"])
    assert json.loads(json.dumps(row)) == row
    assert questions[7]["images"][0].size == (48, 48)
    assert len(pickle.dumps(questions)) < 100_000


def test_pairs_are_the_right_answer_against_the_nearest_wrong_one(photos: Path) -> None:
    questions, pairs = (make(photos, "order", count=6, form=form) for form in ("questions", "pairs"))
    assert isinstance(pairs, PairDataset)
    for position in range(6):
        question, pair = questions.plain(position), pairs.plain(position)
        assert pair["chosen"][0]["content"][0]["text"] == question["answer"]
        assert pair["rejected"][0]["content"][0]["text"] == question["wrong_answers"][0]
        assert pair["source"] == "maker order"


def test_what_is_made_goes_to_disk_and_comes_back(photos: Path, tmp_path: Path) -> None:
    making = Making({"jigsaw": 1, "same_or_different": 1}, count=6)
    questions = make(photos, making)
    file = write_made(questions, making, tmp_path / "out")
    assert sorted(one.name for one in file.parent.iterdir()) == ["made.json", "questions.jsonl"]
    back = load_questions(tmp_path / "out")
    assert back.fingerprint() == questions.fingerprint()
    assert [back.plain(at)["rule"] for at in range(6)] == [questions.plain(at)["rule"] for at in range(6)]
    pairs = make(photos, making, form="pairs")
    assert isinstance(pairs, PairDataset)
    write_made(pairs, making, tmp_path / "pairs")
    again = load(tmp_path / "pairs")
    assert isinstance(again, PairDataset)
    assert again.fingerprint() == pairs.fingerprint()
    write_made(questions, making, tmp_path / "out")
    with pytest.raises(SettingsError, match="holds something else"):
        write_made(questions, making, photos)


def test_pictures_that_cannot_be_read_or_are_too_small_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    data = [*stored(4, 64), b"no picture", picture(30, 8, 1)]
    with caplog.at_level(logging.WARNING):
        questions = make(data, "rotation", count=8)
    assert "1 of 6 pictures of pictures cannot be read" in caplog.text
    assert "rotation: 4 of 5 pictures of pictures are used; left out: 1 smaller than 16 pixels a side" in caplog.text
    assert len(questions.verify()) == 8


BAD: dict[str, tuple[Any, dict[str, Any], type[PivotError], str]] = {
    "unknown": (None, {"maker": "jigsw"}, SettingsError, "no maker 'jigsw'.*Did you mean jigsaw"),
    "hard": (None, {"difficulty": 1.5}, SettingsError, "difficulty is 1.5, and the maker 'jigsaw' makes 0 to 1"),
    "nan": (None, {"difficulty": float("nan")}, SettingsError, "difficulty is nan"),
    "word": (None, {"difficulty": "hard"}, SettingsError, "difficulty is 'hard'"),
    "other": (None, {"difficulty": {"flip": 0.5}}, SettingsError, "difficulty is given for 'flip'"),
    "none": (None, {"count": 0}, SettingsError, "count is 0"),
    "half": (None, {"count": 1.5}, SettingsError, "count is 1.5"),
    "negative": (None, {"maker": {"jigsaw": 1, "flip": -1}}, SettingsError, "'flip' has the share -1"),
    "zero": (None, {"maker": {"jigsaw": 0, "flip": 0}}, SettingsError, "Every maker has the share 0"),
    "no maker": (None, {"maker": []}, SettingsError, "No maker is given"),
    "maker": (None, {"maker": 3}, SettingsError, "The makers are 3"),
    "makers": (None, {"maker": [3]}, SettingsError, r"The makers are \[3\]"),
    "seed": (None, {"seed": "x"}, SettingsError, "seed is 'x'"),
    "option": (None, {"colour": "red"}, SettingsError, "no option 'colour'"),
    "split": (None, {"split": "train"}, SettingsError, "split='train' is given for files"),
    "no picture": ([], {}, DataError, "pictures holds no picture"),
    "form": (None, {"form": "triples"}, SettingsError, "form is 'triples'"),
    "one": ([field(64, 1)], {"maker": "same_or_different"}, DataError, "needs 2 different pictures .* has 1 that"),
    "small": ([field(20, 1)], {}, DataError, "has 0 that it can use, of 1. 1 smaller than 32 pixels"),
    "flat": ([field(64, 1).resize((1, 1)).resize((64, 64))], {}, DataError, "none is suitable: tiles look alike"),
    "rows": ([{"caption": "x"}], {}, DataError, "row 0 of pictures has no picture; it has caption"),
    "broken": ([b"x", b"y"], {}, DataError, "None of the 2 pictures .* can be read; the first"),
    "number": (7, {}, DataError, "pictures is a int"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_made_is_refused_by_name(photos: Path, case: str) -> None:
    source, options, error, said = BAD[case]
    with pytest.raises(error, match=said):
        make(photos if source is None else source, **{"maker": "jigsaw", "count": 4, **options})


def test_a_folder_without_pictures_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "read.me").write_text("no")
    with pytest.raises(DataError, match=r"empty' holds no picture.*Pictures end in .jpg"):
        make(tmp_path / "empty", "jigsaw")
    with pytest.raises(DataError, match="no such file or folder"):
        make(tmp_path / "absent.jsonl", "jigsaw")


def of_a_plugin(monkeypatch: pytest.MonkeyPatch, maker: object) -> None:
    monkeypatch.setattr(lookup, "BUILT_IN", {**lookup.BUILT_IN, "mine": maker})


def test_a_maker_of_a_plugin_may_pass_by_pictures_and_what_it_does_wrong_is_said(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def picky(draw: Draw) -> Question:
        if draw.picture.index % 2:
            raise Unsuitable("odd")
        return Question([draw.picture.source], "?", draw.balanced(["a", "b"]), ["c"])

    of_a_plugin(monkeypatch, Maker("mine", "ours", picky))
    rows = [make(photos, "mine", count=12).plain(position) for position in range(12)]
    assert {Path(row["images"][0]).stem for row in rows} <= {"000", "002", "004"}

    def right_is_wrong(draw: Draw) -> Question:
        return Question([draw.picture.source], "?", "a", ["a"])

    def broken(draw: Draw) -> Question:
        raise ZeroDivisionError("oh")

    for function, said in ((right_is_wrong, "gave the answer 'a'"), (broken, "The maker 'mine' failed on picture")):
        of_a_plugin(monkeypatch, Maker("mine", "ours", function))
        with pytest.raises(DataError, match=said):
            make(photos, "mine", count=2)
    of_a_plugin(monkeypatch, Maker("mine", "ours", rejected=lambda draw: draw.picture.source))
    with pytest.raises(SettingsError, match="makes rejected pictures, and questions are wanted"):
        make(photos, "mine")
    of_a_plugin(monkeypatch, len)
    with pytest.raises(PluginError, match="builtin_function_or_method as the maker 'mine'"):
        make(photos, "mine")


def test_of_a_long_stream_so_much_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("pivot_plugin.generation.makers.sources.STREAMED", 3)
    images = ({"image": field(40, seed)} for seed in range(10))
    assert len(pictures_of(images)) == 3
    assert "its first 3 rows are kept" in caplog.text


def test_one_question_a_picture_and_at_least_a_thousand(photos: Path) -> None:
    questions = make(photos, "rotation")
    assert isinstance(questions, QuestionDataset)
    assert len(questions) == 1000
