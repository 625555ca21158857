"""The folder of a run: who may use it, and what is said of an earlier run there."""

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
