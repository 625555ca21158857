"""The built-in makers: the right answer is right by the pixels, each answer comes as often, and difficulty is felt."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pivot_plugin.generation.makers import Making, make, makers
from pivot_plugin.generation.makers.comparing import _panel
from pivot_plugin.generation.makers.geometry import FLIPS, PLACES, grid_of
from pivot_plugin.preferences import QuestionDataset
from tests.helpers.fields import field

PICTURES = [field(100, seed) for seed in range(8)]
OF_PICTURES = ("rotation", "flip", "jigsaw", "locate", "order", "same_or_different", "odd_one_out")


def made(maker: str, count: int, difficulty: float = 0.5, **options: Any) -> QuestionDataset:
    questions = make(PICTURES, maker, count=count, difficulty=difficulty, **options)
    assert isinstance(questions, QuestionDataset)
    return questions


def shown(questions: QuestionDataset, position: int) -> tuple[list[np.ndarray], str]:
    row = questions.plain(position)
    images = [questions.access.open(source) for source in row["images"]]
    return [np.asarray(image, dtype=float) for image in images], row["answer"]


def alike(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of two pictures, brightness and contrast aside."""
    a, b = ((image - image.mean()) / image.std() for image in (first, second))
    return float((a * b).mean())


def test_each_is_there_with_its_source() -> None:
    assert set(makers()) >= {*OF_PICTURES, "planted_error"}
    assert all(re.search(r"arXiv \d{4}\.\d{5}", maker.source) for maker in makers().values() if maker.questions)


def test_rotation_undone_by_its_answer_is_a_part_of_the_picture_as_it_was() -> None:
    questions = made("rotation", 8)
    for position in range(8):
        (image,), answer = shown(questions, position)
        upright = np.rot90(image, int(answer) // 90)
        spec = questions.plain(position)["images"][0]
        box = next(step["box"] for step in spec["edits"] if step["edit"] == "view")
        for _ in range(int(answer) // 90):
            # where the part lay before the picture was turned
            box = [box[1], 1 - box[2], box[3], 1 - box[0]]
        part = spec["image"].resize(image.shape[1::-1], box=tuple(side * 100 for side in box))
        scores = {turns: alike(np.rot90(upright, turns), np.asarray(part, dtype=float)) for turns in range(4)}
        assert max(scores, key=scores.__getitem__) == 0, scores


def test_flip_is_the_mirroring_under_which_the_views_agree() -> None:
    questions = made("flip", 9, difficulty=0.0)
    for position in range(9):
        (first, second), answer = shown(questions, position)
        mirrored = {"unchanged": second, "mirrored": second[:, ::-1], "upside down": second[::-1]}
        assert set(mirrored) == set(FLIPS)
        assert max(mirrored, key=lambda name: alike(first, mirrored[name])) == answer


def test_a_jigsaw_laid_by_its_answer_is_the_picture() -> None:
    questions = made("jigsaw", 6)
    rows, columns = grid_of(0.5)
    for position in range(6):
        (image,), answer = shown(questions, position)
        side = image.shape[0] // rows
        tiles = [
            image[r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(rows) for c in range(columns)
        ]
        order = [int(number) - 1 for number in answer.split(", ")]
        laid = np.concatenate(
            [np.concatenate([tiles[order[r * columns + c]] for c in range(columns)], axis=1) for r in range(rows)]
        )
        spec = questions.plain(position)["images"][0]
        whole = spec["image"].resize(image.shape[1::-1], box=tuple(100 * side for side in spec["edits"][0]["box"]))
        assert alike(laid, np.asarray(whole, dtype=float)) > 0.7


@pytest.mark.parametrize("difficulty", [0.0, 0.9])
def test_locate_names_the_part_that_the_detail_is_of(difficulty: float) -> None:
    questions = made("locate", 9, difficulty)
    for position in range(9):
        (whole, detail), answer = shown(questions, position)
        spec = questions.plain(position)["images"]
        (left, top, right, bottom), outer = spec[1]["edits"][0]["box"], spec[0]["edits"][0]["box"]
        middle = [(a + b) / 2 for a, b in ((left, right), (top, bottom))]
        across = 2 if difficulty < 0.5 else 3
        column, row = (
            int((m - low) / (high - low) * across) for m, low, high in zip(middle, outer[:2], outer[2:], strict=True)
        )
        assert PLACES[across][row * across + column] == answer
        # and the pixels there are those of the detail
        scale = whole.shape[0]
        box = [
            (value - low) / (high - low) * scale
            for value, low, high in zip((left, top, right, bottom), outer[:2] * 2, outer[2:] * 2, strict=True)
        ]
        part = Image.fromarray(whole.astype(np.uint8)).resize(detail.shape[1::-1], box=tuple(box))
        assert alike(np.asarray(part, dtype=float), detail) > 0.9


def test_order_asks_for_the_panel_that_has_most_or_least() -> None:
    questions = made("order", 24, difficulty=0.2)
    kinds = Counter()
    for position in range(24):
        (sheet,), answer = shown(questions, position)
        side = sheet.shape[0]
        panels = []
        for number in range(4):
            left, top, right, bottom = (round(value * side) for value in _panel(number))
            panels.append(sheet[top:bottom, left:right])
        text = str(questions.plain(position)["prompt"])
        if "dark" in text or "bright" in text or "light" in text:
            kind, values = "light", [panel.mean() for panel in panels]
            most = "brightest" in text or "the least" in text
        elif "noise" in text or "clean" in text:
            kind, values = "noise", [np.abs(np.diff(panel, axis=1)).mean() for panel in panels]
            most = "furthest" in text or "most noise" in text
        else:
            kind, values = "size", [(np.abs(panel - 127).max(axis=2) > 4).mean() for panel in panels]
            most = "largest" in text
        assert int(answer) - 1 == (np.argmax(values) if most else np.argmin(values)), (text, values)
        kinds[kind] += 1
    assert set(kinds) == {"light", "noise", "size"}


def patches(source: dict[str, Any]) -> str:
    return str(next(step["picture"] for step in source["edits"] if step["edit"] == "paste")["edits"])


def test_same_and_odd_are_told_by_one_patch_and_every_view_has_one() -> None:
    for position in range(12):
        row = made("same_or_different", 12).plain(position)
        assert (patches(row["images"][0]) == patches(row["images"][1])) == (row["answer"] == "same")
        row = made("odd_one_out", 12).plain(position)
        of_views = [patches(image) for image in row["images"]]
        assert len(of_views) == 4
        assert of_views.count(of_views[int(row["answer"]) - 1]) == 1


def test_hard_patches_are_smaller_and_more_alike() -> None:
    def difference(difficulty: float) -> tuple[float, float]:
        rows = [made("same_or_different", 16, difficulty).plain(position) for position in range(16)]
        steps = [next(s for s in row["images"][0]["edits"] if s["edit"] == "paste") for row in rows]
        pairs = [[shown_patch(image) for image in row["images"]] for row in rows if row["answer"] == "different"]
        return (
            float(np.mean([step["box"][2] - step["box"][0] for step in steps])),
            float(np.mean([alike(*pair) for pair in pairs])),
        )

    def shown_patch(image: dict[str, Any]) -> np.ndarray:
        source = next(step["picture"] for step in image["edits"] if step["edit"] == "paste")
        edits = [{**step, "size": [16, 16]} for step in source["edits"]]
        opened = made("rotation", 1).access.open({**source, "edits": edits})
        return np.asarray(opened, dtype=float)

    (easy_size, easy_alike), (hard_size, hard_alike) = difference(0.0), difference(1.0)
    assert easy_size > hard_size + 0.15
    assert easy_alike < hard_alike


@pytest.mark.parametrize("maker", OF_PICTURES)
def test_answers_come_equally_often_and_wording_changes(maker: str) -> None:
    questions = made(maker, 48, difficulty=0.4 if maker == "locate" else 0.5)
    rows = [questions.plain(position) for position in range(48)]
    often = Counter(row["answer"] for row in rows)
    assert max(often.values()) == min(often.values())
    assert len({str(row["prompt"]) for row in rows}) >= 3
    assert all(row["answer"] not in row["wrong_answers"] for row in rows)
    assert len({row["id"] for row in rows}) == 48


def test_shares_are_kept_to_the_question() -> None:
    making = Making({"rotation": 1, "flip": 3}, count=8)
    names = [make(PICTURES, making).plain(position)["maker"] for position in range(8)]
    assert Counter(names) == {"rotation": 2, "flip": 6}
