"""What is written is whole, whoever else writes; what was made with other settings is named."""

import os
import stat
import threading
from pathlib import Path

import pytest

from pivot_plugin.errors import SettingsError
from pivot_plugin.files import same_settings, whole_folder, write_whole


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_from_text_bytes_or_a_function(tmp_path: Path) -> None:
    for content in ("ä", "ä".encode(), lambda path: path.write_text("ä", encoding="utf-8")):
        write_whole(tmp_path / "new" / "file", content)
        assert (tmp_path / "new" / "file").read_text(encoding="utf-8") == "ä"
    assert names_in(tmp_path / "new") == ["file"]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "file", fails)
    assert (tmp_path / "file").read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_others_may_read_what_is_written_as_the_umask_says(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", "text")
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_two_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    texts = [letter * 100_000 for letter in "ab"]

    def write(text: str) -> None:
        for _ in range(50):
            write_whole(tmp_path / "file", text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "file").exists():
            assert (tmp_path / "file").read_text() in texts
    for thread in threads:
        thread.join()
    assert names_in(tmp_path) == ["file"]


def test_a_folder_takes_the_place_of_an_old_one_as_a_whole(tmp_path: Path) -> None:
    for number in range(2):
        with whole_folder(tmp_path / "folder") as aside:
            (aside / f"file-{number}").touch()
        assert names_in(tmp_path / "folder") == [f"file-{number}"]
    assert names_in(tmp_path) == ["folder"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "folder") as aside:
        (aside / "new").touch()
        raise ZeroDivisionError
    assert names_in(tmp_path / "folder") == ["old"]
    assert names_in(tmp_path) == ["folder"]


def test_the_first_setting_that_differs_is_named_in_dots(tmp_path: Path) -> None:
    was = {"a": 1, "b": {"c": [1, 2], "d": "x"}}
    same_settings(was, {"a": 1, "b": {"c": (1, 2), "d": "x"}}, "The run", "Delete it.")
    with pytest.raises(SettingsError, match=r"The run had b.d='x', now it is None. Delete it."):
        same_settings(was, {"a": 1, "b": {"c": [1, 2]}}, "The run", "Delete it.")
    with pytest.raises(SettingsError, match=r"had e=None, now it is 3"):
        same_settings(was, was | {"e": 3}, "The run", "Delete it.")
