"""Pairs on disk and on the Hub come back as they were."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from pivot_plugin.data import storage
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.preferences import PairDataset, load, save
from tests.helpers import hub_server, picture, row
from tests.helpers.hub_client import Client
from tests.helpers.hub_server import Fault, Hub

PUSH = "from pivot_plugin.preferences import push; answer = push('{folder}', 'tester/pairs')"


def test_saved_pairs_are_loaded_unchanged(rows: Any, tmp_path: Path) -> None:
    rows[0] |= {"source": "mine", "score_chosen": 2.0, "score_rejected": 0.5, "id": "first"}
    picture(33, 21, 7).save(tmp_path / "photo.jpg")
    rows.append(row("a file?", "yes", "no") | {"images": [str(tmp_path / "photo.jpg")]})
    pairs = PairDataset(rows)
    report = save(pairs, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert isinstance(again, PairDataset)
    assert report.rows == len(again) == len(pairs)
    for position in range(len(pairs)):
        first, second = pairs[position], again[position]
        assert [image.tobytes() for image in first.pop("images")] == [image.tobytes() for image in second.pop("images")]
        # a PIL image has no file; its key is that of its pixels until it is saved
        first.pop("image_key"), second.pop("image_key")
        if position:
            assert (first.pop("id"), second.pop("id")) == (pairs.plain(position)["id"], pairs.plain(position)["id"])
        assert first == second


def test_image_files_are_kept_as_they_are(tmp_path: Path) -> None:
    picture(33, 21, 7).save(tmp_path / "photo.jpg", quality=50)
    save(PairDataset([row("?", "a", "b") | {"images": [str(tmp_path / "photo.jpg")]}]), tmp_path / "saved")
    table = datasets.Dataset.from_parquet(str(tmp_path / "saved" / "data" / "train-00000.parquet"))
    encoded = table.cast_column("images", datasets.List(datasets.Image(decode=False)))[0]["images"][0]["bytes"]
    assert encoded == (tmp_path / "photo.jpg").read_bytes()


def test_datasets_and_trl_read_the_folder(rows: Any, tmp_path: Path) -> None:
    """The folder is an ordinary data set: `load_dataset` gives rows that TRL's own collator takes."""
    save(PairDataset(rows), tmp_path / "saved")
    loaded = datasets.load_dataset(str(tmp_path / "saved"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == len(rows)
    assert loaded[2]["images"][1].size == (48, 100)
    assert loaded[0]["chosen"][0]["role"] == "assistant"


def test_large_sets_are_split_into_files(rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SHARD_ROWS", 3)
    save(PairDataset(rows), tmp_path / "saved")
    assert [file.name for file in sorted((tmp_path / "saved" / "data").iterdir())] == [
        f"train-{number:05d}.parquet" for number in range(3)
    ]
    again = load(tmp_path / "saved")
    assert isinstance(again, PairDataset)
    assert len(again) == 8


def test_the_card_says_how_the_pairs_were_built_and_what_is_wrong_with_them(rows: Any, tmp_path: Path) -> None:
    rows[0]["source"] = "rank by accuracy, best-worst"
    save(PairDataset([*rows, rows[0]]), tmp_path / "saved", "Sampled from a model.")
    card = (tmp_path / "saved" / "README.md").read_text()
    for text in (
        "Sampled from a model.",
        "| rank by accuracy, best-worst | 2 |",
        "duplicated pairs",
        "path: data/train-*",
    ):
        assert text in card


def test_a_folder_with_something_else_is_left_alone(rows: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingsError, match="holds something else"):
        save(PairDataset(rows), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_saving_again_replaces_and_a_failure_leaves_what_was_there(rows: Any, tmp_path: Path) -> None:
    save(PairDataset(rows), tmp_path / "saved")
    save(PairDataset(rows[:2]), tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert isinstance(again, PairDataset)
    assert len(again) == 2
    with pytest.raises(DataError, match="row 1"):
        save(PairDataset([rows[0], row("?", "", "b")]), tmp_path / "saved")
    assert len(load(tmp_path / "saved")) == 2  # type: ignore[arg-type]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.slow
def test_pairs_go_to_the_hub_in_one_commit(hub: Hub, client: Client, rows: Any, tmp_path: Path) -> None:
    save(PairDataset(rows), tmp_path / "saved")
    for _ in range(2):
        run = client(PUSH.format(folder=tmp_path / "saved"))
        assert "datasets/tester/pairs/commit" in run["answer"], run
    # the commit that made the repository, and one: what is published already is recognised
    assert len(hub.repos["datasets/tester/pairs"].commits) == 2
    files = hub.files("datasets/tester/pairs")
    assert {name for name in files if not name.startswith(".")} == {"README.md", "data/train-00000.parquet"}
    assert files["data/train-00000.parquet"] == (tmp_path / "saved" / "data" / "train-00000.parquet").read_bytes()


@pytest.mark.slow
def test_a_hub_that_refuses_is_said(hub: Hub, client: Client, rows: Any, tmp_path: Path) -> None:
    save(PairDataset(rows), tmp_path / "saved")
    push = PUSH.format(folder=tmp_path / "saved")
    hub.faults.append(Fault("commit", "status", 403))
    assert "The pairs could not be put on the Hub as 'tester/pairs'" in client(push)["finding"]
    stranger = f"import os; right = os.environ['HF_TOKEN']; os.environ['HF_TOKEN'] = 'hf_wrong'\ntry:\n    {push}\n"
    refused = client(f"{stranger}finally:\n    os.environ['HF_TOKEN'] = right")
    assert "The pairs could not be put on the Hub as 'tester/pairs'" in refused["finding"]
    assert len(hub.repos["datasets/tester/pairs"].commits) == 1
    with pytest.raises(DataError, match="holds no saved pairs"):
        storage.push(tmp_path, "tester/pairs")


PAIRS_ACTIONS = [
    (kind, action, status, times)
    for kind in ("create", "info", "paths", "preupload", "batch", "put", "commit")
    for action, status in (("drop", 0), ("lose", 0), ("truncate", 0), ("status", 403), ("status", 503))
    for times in (1, 30)
]


@pytest.mark.slow
def test_what_is_said_of_pairs_after_a_fault_is_so(hub: Hub, client: Client, rows: Any, tmp_path: Path) -> None:
    save(PairDataset(rows), tmp_path / "saved")
    (tmp_path / "saved" / ".env").write_text("HF_TOKEN=x")
    push, key = PUSH.format(folder=tmp_path / "saved"), "datasets/tester/pairs"
    client("import time; time.slept, time.sleep = time.sleep, lambda seconds: None")
    try:
        for kind, action, status, times in PAIRS_ACTIONS:
            hub.repos.clear()
            hub.uploaded.clear()
            hub.faults[:] = [Fault(kind, action, status, {"Retry-After": "0"}, times)]
            found = client(push)
            hub.faults.clear()
            there = key in hub.repos and "README.md" in hub.files(key)
            if "answer" in found:
                assert there
            else:
                assert found["error"] == "PublishError" and found["remedy"], found
                assert not there or "not known" in found["finding"], (kind, action, status, found)
            assert "answer" in client(push)
            assert len(hub.repos[key].commits) == 2
            assert set(hub.files(key)) == {".gitattributes", "README.md", "data/train-00000.parquet"}
    finally:
        client("import time; time.sleep = time.slept")


@pytest.mark.slow
def test_pairs_do_not_overwrite_what_is_not_ours(hub: Hub, client: Client, rows: Any, tmp_path: Path) -> None:
    save(PairDataset(rows), tmp_path / "saved")
    push, key = PUSH.format(folder=tmp_path / "saved"), "datasets/tester/pairs"
    theirs = {".gitattributes": b"", "README.md": b"mine", "data/train-00000.parquet": b"years of work"}
    hub.repos[key] = hub_server.Repo()
    hub.repos[key].add("main", theirs, "somebody's")
    assert "holds something else already" in client(push)["finding"] and hub.files(key) == theirs
    assert "answer" in client(push.replace("')", "', exist_ok=True)"))
    (tmp_path / "saved" / "data" / "train-00000.parquet").rename(tmp_path / "elsewhere.parquet")
    (tmp_path / "saved" / "data" / "train-00000.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    assert client(push)["error"] == "DataError"
