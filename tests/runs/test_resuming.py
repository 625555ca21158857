"""Cut at any step and gone on with, a run of any kind ends with the same weights; one that has ended stays as it is."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import pivot_plugin as pivot
from pivot_plugin.errors import SettingsError
from pivot_plugin.testing import build
from pivot_plugin.training.checkpoints import check_checkpoint
from pivot_plugin.training.tower import TowerTraining
from tests.helpers.kills import COMMON, KINDS, begin, left


class Cut(TrainerCallback):
    """Stops a run before a step, as a kill does; counts the steps that are taken."""

    def __init__(self) -> None:
        self.before: int | None = None
        self.taken: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.before:
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.taken.append(state.global_step)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Cut:
    """Is part of every trainer."""
    callback, watch = Cut(), TowerTraining._watch_training

    def watched(self: TowerTraining) -> None:
        watch(self)
        self.add_callback(callback)

    monkeypatch.setattr(TowerTraining, "_watch_training", watched)
    return callback


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Of every file when it was written, and a hash."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.training
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_ends_with_the_weights_of_an_undisturbed_one(
    kind: str, cut: Cut, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = begin(kind, tmp_path / "straight", resume=False)
    last = cut.taken[-1]
    expected = left(tmp_path / "straight", kind)
    # early, and late: beyond the first pass, and after the last look that the early stop has counted
    for before in (3, last - 1):
        folder = tmp_path / f"cut-{before}"
        cut.before = before
        with pytest.raises(KeyboardInterrupt):
            begin(kind, folder, resume=False)
        cut.before, cut.taken = None, []
        begin(kind, folder, resume=True)
        assert cut.taken[-1] == last
        found = left(folder, kind)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensor.equal(found[name]), (name, before)

    # a run that has ended
    before_again, cut.taken = contents(tmp_path / "straight"), []
    with caplog.at_level(logging.INFO, "pivot_plugin"):
        again = begin(kind, tmp_path / "straight", resume=True)
    assert "has finished. Nothing is trained, and the folder stays as it is." in caplog.text
    assert cut.taken == []
    assert contents(tmp_path / "straight") == before_again
    for name, tensor in straight.model.state_dict().items():
        assert tensor.equal(again.model.state_dict()[name]), name
    assert again.metrics == straight.metrics

    # a run that was killed while it wrote what it leaves
    record = json.loads((tmp_path / "straight" / "run.json").read_bytes())
    (tmp_path / "straight" / "run.json").write_text(json.dumps({"finished": False, "settings": record["settings"]}))
    begin(kind, tmp_path / "straight", resume=True)
    assert cut.taken == [] or kind == "roll-outs used again"
    for name, tensor in left(tmp_path / "straight", kind).items():
        assert tensor.equal(expected[name]), name


@pytest.mark.training
def test_files_of_a_run_that_are_damaged_or_missing_are_named(cut: Cut, tmp_path: Path) -> None:
    kind, folder = "weights", tmp_path / "run"
    cut.before = 3
    with pytest.raises(KeyboardInterrupt):
        begin(kind, folder, resume=False)
    cut.before = None
    checkpoint = folder / "checkpoint-2"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"):
        whole = (checkpoint / name).read_bytes()
        for broken in (None, b"", whole[: len(whole) // 2], b"x" * 1000):
            (checkpoint / name).unlink()
            if broken is not None:
                (checkpoint / name).write_bytes(broken)
            with pytest.raises(SettingsError, match=rf"(?s){name.split('.')[0]}|safetensors.*Delete .*checkpoint-2"):
                check_checkpoint(checkpoint)
            (checkpoint / name).write_bytes(whole) if broken is not None else (checkpoint / name).touch()
            (checkpoint / name).write_bytes(whole)
    check_checkpoint(checkpoint)

    (checkpoint / "optimizer.pt").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"optimizer.pt cannot be read.*Delete .*checkpoint-2"):
        begin(kind, folder, resume=True)
    for content in ("", "[]", "null", "{}", '{"settings": 3}', '{"settings": {}, "finished": "x"}'):
        (folder / "run.json").write_text(content)
        with pytest.raises(SettingsError, match=r"run.json' (cannot be read|is not what a run writes)"):
            begin(kind, folder, resume=True)
    (folder / "run.json").unlink()
    with pytest.raises(SettingsError, match=r"holds checkpoint-2 and no run.json"):
        begin(kind, folder, resume=True)


@pytest.mark.training
@pytest.mark.parametrize(
    ("kind", "train"),
    [("epochs", "encoder"), ("weights", "encoder+projector"), ("instruction", "projector+language_model")],
)
def test_a_run_that_has_ended_without_checkpoints_gives_its_result_again(
    kind: str, train: str, cut: Cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is taken from the folder that it left."""
    rows, options = KINDS[kind]
    monkeypatch.setitem(KINDS, kind, (rows, {**options, "save_strategy": "no", "eval_fraction": 0, "train": train}))
    first = begin(kind, tmp_path / "run", resume=False)
    before, taken = contents(tmp_path / "run"), list(cut.taken)
    assert taken and not list((tmp_path / "run").glob("checkpoint-*"))
    again = begin(kind, tmp_path / "run", resume=True)
    assert cut.taken == taken and contents(tmp_path / "run") == before
    for name, tensor in first.model.state_dict().items():
        assert tensor.equal(again.model.state_dict()[name]), name
    assert (again.metrics, again.history, again.trained) == (first.metrics, first.history, first.trained)
    assert getattr(again, "weight_change", None) == getattr(first, "weight_change", None)


@pytest.mark.training
def test_a_run_that_has_ended_and_kept_nothing_of_a_language_model_says_so(cut: Cut, tmp_path: Path) -> None:
    rows, options = KINDS["weights"]
    options = {**COMMON, **options, "save_strategy": "no", "train": "all", "output_dir": tmp_path / "run"}
    pivot.optimize(*build("llava")[:1], rows(), processor=build("llava")[1], **options)
    with pytest.raises(SettingsError, match=r"has finished, and kept no checkpoint .* language model"):
        pivot.optimize(*build("llava")[:1], rows(), processor=build("llava")[1], resume=True, **options)
