"""The folder of a run: who may use it, and what is said of an earlier run there."""

import os
import socket
from pathlib import Path

import pytest

from pivot_plugin.errors import SettingsError
from pivot_plugin.runs.folder import claim, write_record


def test_a_new_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    claim(tmp_path / "a" / "b", {}, resume=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_run_goes_on_with_the_settings_it_had(tmp_path: Path) -> None:
    settings = {"lora": {"r": 4, "target_modules": ["q", "v"]}, "learning_rates": {"encoder": 1e-4}, "path": Path("x")}
    write_record(tmp_path, {"finished": False, "settings": settings})
    (tmp_path / "checkpoint-1").mkdir()
    claim(tmp_path, settings, resume=True)
    with pytest.raises(SettingsError, match="holds an earlier run"):
        claim(tmp_path, settings, resume=False)


def test_the_setting_that_differs_is_named_in_full(tmp_path: Path) -> None:
    write_record(tmp_path, {"settings": {"seed": 1, "lora": {"r": 4, "bias": "none"}}})
    with pytest.raises(SettingsError, match=r"had lora\.r=4, now it is 8"):
        claim(tmp_path, {"seed": 1, "lora": {"r": 8, "bias": "none"}}, resume=True)
    with pytest.raises(SettingsError, match=r"had beta=None, now it is 0\.1"):
        claim(tmp_path, {"seed": 1, "lora": {"r": 4, "bias": "none"}, "beta": 0.1}, resume=True)


def test_a_record_that_cannot_be_read_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"settings": {"seed"')
    with pytest.raises(SettingsError, match=r"run\.json' cannot be read"):
        claim(tmp_path, {"seed": 1}, resume=True)


def test_a_start_that_came_to_nothing_does_not_hold_the_folder(tmp_path: Path) -> None:
    dead = {"pid": 2**22 + 12345, "host": socket.gethostname()}
    write_record(tmp_path, {"finished": False, "settings": {"seed": 1}, "process": dead})
    claim(tmp_path, {"seed": 2}, resume=False)
    for left in ("checkpoint-3", "own-answers", "round-1", "encoder"):
        (tmp_path / left).mkdir()
        with pytest.raises(SettingsError, match="holds an earlier run"):
            claim(tmp_path, {"seed": 2}, resume=False)
        (tmp_path / left).rmdir()
    for process in ({"pid": os.getppid(), "host": socket.gethostname()}, {"pid": 1, "host": "another machine"}):
        write_record(tmp_path, {"finished": False, "settings": {"seed": 1}, "process": process})
        with pytest.raises(SettingsError, match=f"goes on, in process {process['pid']}"):
            claim(tmp_path, {"seed": 2}, resume=False)
    write_record(tmp_path, {"finished": True, "settings": {"seed": 1}})
    with pytest.raises(SettingsError, match="holds an earlier run"):
        claim(tmp_path, {"seed": 2}, resume=False)


def test_memory_may_change_where_the_effective_batch_stays(tmp_path: Path) -> None:
    write_record(tmp_path, {"finished": False, "settings": {"seed": 1, "per_device_train_batch_size": 8}})
    lighter = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    claim(tmp_path, {"seed": 1, **lighter, "report_to": "none"}, resume=True)
    # eight is what TRL has where nothing is said
    claim(tmp_path, {"seed": 1}, resume=True)
    with pytest.raises(SettingsError, match="had per_device_train_batch_size=8, now it is 4"):
        claim(tmp_path, {"seed": 1, "per_device_train_batch_size": 4}, resume=True)
    with pytest.raises(SettingsError, match="had seed=1"):
        claim(tmp_path, {"seed": 2, **lighter}, resume=True)
