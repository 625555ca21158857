"""A run that begins with a folder of pictures: roll-outs or own answers, recorded, resumed, and shown in the report."""

import json
from pathlib import Path
from typing import Any

import pytest

import pivot_plugin as pivot
from pivot_plugin.data.images import ImageAccess
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.generation.engines import Sampling
from pivot_plugin.preferences import Making, load_questions
from pivot_plugin.report import write_report
from tests.helpers import Tiny
from tests.helpers.fields import written

pytestmark = pytest.mark.training
COUNT = 12


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return written(tmp_path / "photos", 8, 40)


def told(questions: list[dict[str, Any]], sampling: Sampling, seed: int) -> list[list[str]]:
    """An engine that knows the answer of every second question, and how a jigsaw is answered."""
    return [[question["answer"], question["wrong_answers"][0]] for question in questions]


def test_a_folder_is_enough_for_roll_outs(llava: Tiny, photos: Path, fast: dict[str, Any]) -> None:
    model, processor = llava
    options = fast | {"max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2}
    options |= {"max_completion_length": 4, "eval_fraction": 0.25, "saliency": 0}
    result = pivot.optimize(
        model,
        photos,
        processor=processor,
        make={"rotation": 1, "flip": 2},
        difficulty={"flip": 0.2},
        count=COUNT,
        objective="grpo",
        **options,
    )
    record = json.loads((result.output_dir / "run.json").read_text())["settings"]
    assert record["make"] == {
        "makers": {"rotation": 1, "flip": 2},
        "difficulty": {"rotation": 0.5, "flip": 0.2},
        "count": COUNT,
        "seed": 0,
    }
    assert record["rewards"] == ["by_rule"]
    assert "rewards/by_rule" in result.metrics["after"]
    sheet = load_questions(result.output_dir / "made-questions.jsonl")
    assert {"before", "after", "answer", "maker"} <= set(sheet.plain(0))
    assert not list(result.output_dir.rglob("*.png"))
    page = write_report(result.output_dir / "report.html", [result.output_dir]).read_text()
    assert "Questions made of pictures" in page
    assert page.count("Picture 1 of a question by") == len(sheet)


def test_own_answers_become_pairs_whose_pictures_are_made_again(
    llava: Tiny, photos: Path, fast: dict[str, Any]
) -> None:
    model, processor = llava
    options: dict[str, Any] = fast | {"max_steps": 2, "eval_fraction": 0, "samples": 2, "engine": told, "lora": 4}
    options |= {"save_strategy": "steps", "save_steps": 1}
    options |= {"make": "jigsaw", "count": COUNT, "difficulty": 0.0}
    result = pivot.optimize(model, photos, processor=processor, **options)
    assert result.answers[0].paired == COUNT
    kept = result.output_dir / "own-answers" / "pairs"
    assert [file.name for file in kept.iterdir()] == ["pairs.jsonl"]
    pairs = load_questions(kept / "pairs.jsonl")
    expected = pivot.preferences.make(photos, "jigsaw", count=COUNT, difficulty=0.0)
    assert pairs.access.key(pairs.plain(3)["images"][0]) == ImageAccess().key(expected.plain(3)["images"][0])

    with pytest.raises(SettingsError, match=r"make\.count=12, now it is 13"):
        pivot.optimize(model, photos, processor=processor, **options | {"count": 13, "resume": True})
    again = pivot.optimize(model, photos, processor=processor, **options | {"resume": True})
    assert again.history == json.loads((result.output_dir / "run.json").read_text())["history"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"make": "jigsw"}, SettingsError, "no maker 'jigsw'"),
        ({"make": "jigsaw", "difficulty": 2}, SettingsError, "difficulty is 2"),
        ({"make": "jigsaw", "count": 0}, SettingsError, "count is 0"),
        ({"make": {"jigsaw": -1}}, SettingsError, "share -1"),
        ({"make": Making("jigsaw"), "count": 3}, SettingsError, "count is given beside a Making"),
        ({"count": 3}, SettingsError, "count is given, and nothing is made"),
        ({"make": "jigsaw", "prefs": "nowhere.jsonl"}, DataError, "no such file or folder"),
    ],
)
def test_what_cannot_be_made_is_said_before_training(
    llava: Tiny, photos: Path, fast: dict[str, Any], options: dict[str, Any], error: type[Exception], said: str
) -> None:
    model, processor = llava
    with pytest.raises(error, match=said):
        pivot.optimize(model, processor=processor, **fast | {"prefs": photos} | options)
