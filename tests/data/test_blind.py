"""Rows without their pictures."""

import numpy as np
import pytest

from pivot_plugin.data.blind import WithoutPicture
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.preferences import load_questions
from tests.helpers import picture

SHARED = picture(60, 60, 1)
ROWS = [
    {"images": [SHARED], "question": "what?"},
    {"images": [picture(120, 50, 2), picture(40, 80, 3)], "question": "<image> a <image>?"},
    {"images": [SHARED], "question": "where?"},
    {"question": "hello"},
    {"images": [picture(64, 64, 5)], "question": "shape?"},
]


@pytest.mark.parametrize("how", ["other", "mean"])
def test_pictures_keep_their_sizes_and_lose_what_they_show(how: str) -> None:
    rows = load_questions(ROWS)
    blind = WithoutPicture(rows, how)  # type: ignore[arg-type]
    assert len(blind) == len(rows)
    shown = {image.resize((8, 8)).tobytes() for row in ROWS for image in row.get("images", [])}
    for position in range(len(rows)):
        before, after = rows[position], blind[position]
        assert before["prompt"] == after["prompt"]
        assert [image.size for image in before["images"]] == [image.size for image in after["images"]]
        for image, replaced in zip(before["images"], after["images"], strict=True):
            assert image.tobytes() != replaced.tobytes()
            pixels = np.asarray(replaced).reshape(-1, 3)
            if how == "mean":
                assert len(np.unique(pixels, axis=0)) == 1
                assert np.abs(pixels[0] - np.asarray(image).reshape(-1, 3).mean(axis=0)).max() <= 0.5
            else:
                assert len(np.unique(pixels, axis=0)) > 1
    assert shown


def test_nobody_is_shown_the_picture_of_a_row_with_the_same_one() -> None:
    rows = load_questions([{"images": [SHARED], "question": f"{n}?"} for n in range(6)] + [ROWS[4]])
    blind = WithoutPicture(rows, "other")
    for position in range(6):
        assert blind[position]["images"][0].tobytes() == rows[6]["images"][0].resize((60, 60)).tobytes()


def test_what_cannot_be_replaced_is_said() -> None:
    same = load_questions([{"images": [SHARED], "question": f"{n}?"} for n in range(3)])
    with pytest.raises(DataError, match="no two different pictures"):
        WithoutPicture(same, "other")
    with pytest.raises(SettingsError, match="replaced by 'black'"):
        WithoutPicture(same, "black")  # type: ignore[arg-type]
