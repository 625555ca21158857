"""Edited pictures of rows, against numpy on the pixels."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pivot_plugin.data import edits, images
from pivot_plugin.data.edited_rows import write_rows
from pivot_plugin.data.images import ImageAccess
from pivot_plugin.data.questions import QuestionDataset
from pivot_plugin.data.sources import open_source
from pivot_plugin.data.split import hold_out
from pivot_plugin.errors import DataError
from tests.helpers import picture
from tests.helpers.fields import field, written

ACCESS = ImageAccess()


def pixels(*steps: dict[str, Any], base: Image.Image | None = None) -> np.ndarray:
    return np.asarray(ACCESS.open(edits.edited(base or picture(12, 12, 1), *steps)))


WHOLE = np.asarray(picture(12, 12, 1))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (edits.turn(90), np.rot90(WHOLE, -1)),
        (edits.turn(180), np.rot90(WHOLE, 2)),
        (edits.turn(270), np.rot90(WHOLE)),
        (edits.mirror("left-right"), WHOLE[:, ::-1]),
        (edits.mirror("upside-down"), WHOLE[::-1]),
        (edits.view((0, 0, 1, 1), (12, 12)), WHOLE),
        (edits.view((0, 0, 0.5, 0.5), (6, 6)), WHOLE[:6, :6]),
        (edits.tiles(1, 2, [1, 0]), np.concatenate([WHOLE[:, 6:], WHOLE[:, :6]], axis=1)),
        (edits.light(0.5), np.rint(WHOLE / 2)),
    ],
)
def test_an_edit_is_what_it_says(step: dict[str, Any], expected: np.ndarray) -> None:
    np.testing.assert_allclose(pixels(step), expected, atol=1)


def test_what_is_pasted_has_the_colours_of_its_place_where_they_are_matched() -> None:
    base, other = field(64, 1), field(64, 2)
    box = (0.25, 0.25, 0.75, 0.75)
    plain = pixels(edits.paste(other, box), base=base)[16:48, 16:48].reshape(-1, 3).astype(float)
    matched = pixels(edits.paste(other, box, matched=True), base=base)
    place = np.asarray(base)[16:48, 16:48].reshape(-1, 3).astype(float)
    inside = matched[16:48, 16:48].reshape(-1, 3).astype(float)
    # values beyond black and white are cut off
    np.testing.assert_allclose(inside.mean(0), place.mean(0), atol=2)
    np.testing.assert_allclose(inside.std(0), place.std(0), atol=2)
    assert np.abs(plain.mean(0) - place.mean(0)).max() > 4
    outside = np.ones((64, 64), dtype=bool)
    outside[16:48, 16:48] = False
    assert np.array_equal(matched[outside], np.asarray(base)[outside])


def test_fill_noise_blank_and_blur_do_what_they_say() -> None:
    filled = pixels(edits.fill((0, 0, 0.5, 1)))
    assert np.abs(filled[:, :6] - WHOLE.mean((0, 1))).max() < 1
    assert np.array_equal(filled[:, 6:], WHOLE[:, 6:])
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    noisy = pixels(edits.noise(0.1, 3), base=grey).astype(float)
    assert noisy.std() == pytest.approx(25.5, rel=0.05)
    assert np.array_equal(noisy, pixels(edits.noise(0.1, 3), base=grey))
    assert pixels(edits.blank((7, 5))).shape == (5, 7, 3)
    assert pixels(edits.blur(0.2)).std() < WHOLE.std() / 2


def test_colours_are_as_coarse_along_both_axes() -> None:
    uneven = np.asarray(field(64, 5)).copy()
    uneven[:, 1::2] = uneven[:, ::2]
    made = pixels(edits.even_colours(), base=Image.fromarray(uneven)).astype(float)
    colour = made[..., 0] - made[..., 2]
    along, across = (np.abs(np.diff(colour, axis=axis)).mean() for axis in (0, 1))
    assert along == pytest.approx(across, rel=0.1)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"edits": [{"edit": "vew"}]}, "no edit 'vew'.*Did you mean view"),
        ({"edits": 7}, "no edit None"),
        ({"edits": [{"edit": "view", "box": [0, 0, 1, 1], "size": [10**6, 10**6]}]}, "1000000 x 1000000 pixels"),
        ({"edits": [{"edit": "view", "box": [0, 0, 2, 1], "size": [4, 4]}]}, "is no part of the picture"),
        ({"edits": [{"edit": "tiles", "rows": 2, "columns": 2, "order": [0, 0, 1, 2]}]}, "each of 4 tiles once"),
        ({"edits": [{"edit": "turn", "degrees": 45}]}, r"edit 0 \(turn\)"),
        ({"edits": [{"edit": "turn", "degrees": 90}] * 300}, "more than 200 edits"),
    ],
)
def test_edits_of_strangers_are_refused_by_name(broken: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        ACCESS.open({"image": picture(12, 12, 1), **broken}, "row 3")


def test_what_is_pasted_lies_in_the_folder_too(tmp_path: Path) -> None:
    written(tmp_path / "inside", 1)
    written(tmp_path / "outside", 1)
    confined = ImageAccess(tmp_path / "inside", confined=True)
    stranger = edits.edited("000.png", edits.paste({"path": "../outside/000.png"}, (0, 0, 0.5, 0.5)))
    with pytest.raises(DataError, match="lies outside"):
        confined.open(stranger)


def test_pictures_made_of_one_decode_it_once_and_none_changes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, 1) / "000.png"
    decoded: list[object] = []
    # of other tests
    monkeypatch.setattr(images, "_bases", OrderedDict())
    before = ImageAccess._shown
    monkeypatch.setattr(ImageAccess, "_shown", lambda self, *given: decoded.append(given[1]) or before(self, *given))
    first = ACCESS.open(edits.edited(path, edits.turn(0)))
    first.paste((0, 0, 0), (0, 0, 64, 64))
    second = ACCESS.open(edits.edited(path, edits.turn(180)))
    assert [source for source in decoded if source == {"path": str(path)}] == [{"path": str(path)}]
    assert second.tobytes() == Image.open(path).convert("RGB").rotate(180).tobytes()


def test_edited_rows_come_back_from_disk_and_no_picture_is_stored(tmp_path: Path) -> None:
    photos = written(tmp_path / "photos", 3)
    sources = [str(photos / f"{number:03}.png") for number in range(3)]
    rows = [
        {
            "prompt": "?",
            "answer": str(number),
            "images": [edits.edited(sources[number], edits.turn(90), edits.paste(sources[number - 1], (0, 0, 0.5, 1)))],
        }
        for number in range(3)
    ]
    (tmp_path / "out").mkdir()
    write_rows(rows, tmp_path / "out" / "rows.jsonl", tmp_path / "out", ACCESS, 3)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["rows.jsonl"]
    assert str(tmp_path) not in (tmp_path / "out" / "rows.jsonl").read_text()
    back = QuestionDataset(open_source(tmp_path / "out"))
    for number, row in enumerate(rows):
        assert back[number]["images"][0].tobytes() == ACCESS.open(row["images"][0]).tobytes()


def test_pictures_that_are_no_files_are_written_once(tmp_path: Path) -> None:
    image = picture(20, 20, 1)
    rows = [{"prompt": "?", "images": [edits.edited(image, edits.turn(degrees))]} for degrees in (90, 180, 270)]
    write_rows(rows, tmp_path / "rows.jsonl", tmp_path, ACCESS, 3)
    assert len(list((tmp_path / "pictures").iterdir())) == 1
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert ImageAccess(tmp_path).open(lines[1]["images"][0]).tobytes() == image.rotate(180).tobytes()


def test_no_picture_is_on_both_sides_of_a_split_whatever_was_made_of_it() -> None:
    images = [field(24, seed) for seed in range(20)]
    rows = [
        {"prompt": "?", "images": [edits.edited(images[number % 20], edits.turn(90 * (number // 20)))]}
        for number in range(80)
    ]
    train, held = hold_out(QuestionDataset(rows), 0.1, 0)
    assert held is not None
    assert len(set(held.image_keys.tolist())) == len(held) == 20
    sides = [set(side.picture_keys.tolist()) for side in (train, held)]
    assert len(sides[1]) == 5 and not sides[0] & sides[1]
