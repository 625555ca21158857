"""What processes must have alike before they train, and what is said where they do not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.errors import DataError, PeerError, SettingsError
from pivot_plugin.runs import alike
from pivot_plugin.runs.alike import check_code, check_folder, check_model, check_rows
from pivot_plugin.training.processes import Processes
from tests.helpers import picture, row
from tests.helpers.breaking import in_each

PAIRS = [row(f"number {n}?", f"it is {n}", "no", picture(40, 50, n // 2)) for n in range(6)]


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    settings = [{"learning_rate": 1e-4, "lora": 4}, {"learning_rate": 1e-5, "lora": 4}]
    same, differs = in_each(2, lambda processes: check_code(processes, tmp_path, settings[processes.rank]))
    assert same is None
    assert isinstance(differs, SettingsError)
    assert "has settings.learning_rate=1e-05, process 0 has 0.0001" in str(differs)


def test_code_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = [{"torch": "2.14.1"}, {"torch": "2.13.0"}]

    def check(processes: Processes) -> None:
        processes.compare("code", {"versions": versions[processes.rank]})

    assert "versions.torch='2.13.0', process 0 has '2.14.1'" in str(in_each(2, check)[1])
    hashed = alike._sources()
    assert alike._sources() == hashed
    (tmp_path / "more.py").write_text("")
    monkeypatch.setattr("pivot_plugin.__path__", [*__import__("pivot_plugin").__path__, str(tmp_path)])
    alike._sources.cache_clear()
    assert alike._sources() != hashed
    alike._sources.cache_clear()


def test_a_folder_that_only_some_processes_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "SECONDS_TO_SEE_A_FILE", 0.3)
    folders = [tmp_path / "shared", tmp_path / "shared", tmp_path / "local"]
    for folder in folders:
        folder.mkdir(exist_ok=True)

    def check(processes: Processes) -> None:
        with processes.together():
            check_folder(processes, folders[processes.rank])

    first, second, third = in_each(3, check)
    assert isinstance(third, SettingsError) and "local' is not that of process 0" in str(third)
    for other in (first, second):
        assert isinstance(other, PeerError) and "local' is not that of process 0" in str(other)
    assert not list(folders[0].iterdir())
    assert in_each(3, lambda processes: check_folder(processes, folders[0])) == [None] * 3
    assert not list(folders[0].iterdir())


def test_models_that_differ_are_named(llava: Any) -> None:
    models = [llava[0], copy.deepcopy(llava[0])]
    assert in_each(2, lambda processes: check_model(processes, models[processes.rank])) == [None, None]
    with torch.no_grad():
        models[1].get_input_embeddings().weight.mul_(2)
    _, differs = in_each(2, lambda processes: check_model(processes, models[processes.rank]))
    assert isinstance(differs, SettingsError) and "model.weights=" in str(differs)


def test_rows_that_differ_are_named() -> None:
    data = [PairDataset(PAIRS), PairDataset([*PAIRS[:5], {**PAIRS[5], "chosen": "it is another"}])]
    assert in_each(2, lambda processes: check_rows(processes, data[0], data[1])) == [None, None]
    _, differs = in_each(2, lambda processes: check_rows(processes, data[processes.rank], None))
    assert isinstance(differs, SettingsError) and "data.content=" in str(differs)
    _, differs = in_each(2, lambda processes: check_rows(processes, data[0], data[processes.rank]))
    assert isinstance(differs, SettingsError) and "held_out.content=" in str(differs)
    shorter = PairDataset(PAIRS[:5])
    _, differs = in_each(2, lambda processes: check_rows(processes, [data[0], shorter][processes.rank], None))
    assert isinstance(differs, SettingsError) and "data.rows=5, process 0 has 6" in str(differs)


def test_fewer_rows_than_processes_are_refused() -> None:
    found = in_each(8, lambda processes: check_rows(processes, PairDataset(PAIRS), None))
    assert all(isinstance(error, DataError) for error in found)
    assert "has 6 rows to train on, fewer than the 8 processes" in str(found[0])
    assert in_each(6, lambda processes: check_rows(processes, PairDataset(PAIRS), None)) == [None] * 6
