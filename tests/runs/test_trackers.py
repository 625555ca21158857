"""Trackers of the ecosystem, for real and offline: held-out values, those of probes, and what trains."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import TrainerCallback

import pivot_plugin as pivot
from pivot_plugin.report import saliency_sheet
from pivot_plugin.runs.trackers import SALIENCY_SHEET, WHAT_TRAINS, show_picture, show_text, takes_pictures
from pivot_plugin.testing import build
from tests.helpers import picture, row

pytestmark = pytest.mark.training

PAIRS = [row(f"{n}?", f"yes {n}", f"no! {n}", picture(20, 20, n)) for n in range(16)]


def shades(who: Any) -> dict[str, float]:
    return {"dark": 0.25}


def tracked(folder: Path, tracker: str, **more: Any) -> pivot.PivotResult:
    model, processor = build("llava")
    return pivot.optimize(
        model,
        PAIRS[4:],
        processor=processor,
        eval_prefs=PAIRS[:4],
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
        report_to=[tracker],
        probes={"shades": shades},
        display="none",
        **more,
    )


def test_tensorboard_has_held_out_and_probe_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    result = tracked(tmp_path / "run", "tensorboard")
    scalars: dict[str, list[float]] = {}
    for file in sorted((tmp_path / "board").rglob("events.*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            scalars.setdefault(name, []).extend(event.value for event in events.Scalars(name))
    looks = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert scalars["eval/loss"] == pytest.approx(looks, abs=1e-6)
    probed = [value for name, values in scalars.items() if "probe/shades/dark" in name for value in values]
    assert probed == [0.25, 0.25]


def test_tensorboard_is_shown_what_trains_and_where_the_loss_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    result = tracked(tmp_path / "run", "tensorboard", saliency=2)
    texts, pictures = [], []
    for file in sorted((tmp_path / "board").rglob("events.*")):
        events = EventAccumulator(str(file)).Reload()
        name = f"{WHAT_TRAINS}/text_summary"
        if name in events.Tags()["tensors"]:
            texts += [event.tensor_proto.string_val[0].decode() for event in events.Tensors(name)]
        if SALIENCY_SHEET in events.Tags()["images"]:
            pictures += events.Images(SALIENCY_SHEET)
    (table,), (shown,) = texts, pictures
    trained, there = result.trained["encoder"]
    assert f"{trained:,} of " in table and f"{there:,} parameters train: model.vision_tower" in table
    expected = saliency_sheet(result.probes)
    assert expected is not None and shown.step == 2
    logged = Image.open(io.BytesIO(shown.encoded_image_string))
    assert np.array_equal(np.asarray(logged.convert("RGB")), np.asarray(expected))


class _Recorder:
    """Of the interface that wandb and trackio share, as transformers' callbacks hold it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def Table(self, columns: list[str], data: list[list[str]]) -> tuple[str, Any]:
        return "table", data

    def Image(self, value: Any) -> tuple[str, Any]:
        return "image", np.asarray(value)

    def Markdown(self, text: str) -> tuple[str, str]:
        return "markdown", text


@pytest.mark.parametrize(
    ("kind", "attribute", "text"),
    [
        ("WandbCallback", "_wandb", ("table", [["a"], ["b"]])),
        ("TrackioCallback", "_trackio", ("markdown", "```\na\nb\n```")),
    ],
)
def test_other_trackers_are_told_in_their_own_words(kind: str, attribute: str, text: Any) -> None:
    tracker, other = _Recorder(), TrainerCallback()
    callback = type(kind, (TrainerCallback,), {attribute: tracker})()
    show_text([other, callback], WHAT_TRAINS, "a\nb", 0)
    show_picture([other, callback], SALIENCY_SHEET, Image.new("RGB", (3, 2), "red"), 7)
    assert takes_pictures([callback]) and not takes_pictures([other])
    said, shown = tracker.logged
    assert said == {WHAT_TRAINS: text, "train/global_step": 0}
    assert shown["train/global_step"] == 7 and shown[SALIENCY_SHEET][1].tolist() == [[[255, 0, 0]] * 3] * 2


def test_a_tracker_that_fails_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    callback = type("TensorBoardCallback", (TrainerCallback,), {"tb_writer": object()})()
    show_text([callback], WHAT_TRAINS, "a", 0)
    assert "TensorBoardCallback did not take 'pivot/what trains': AttributeError" in caplog.text


def test_trackio_has_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # it reads this when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    tracked(tmp_path / "run", "trackio", project="pivot-test", trackio_space_id=None)
    kept = b"".join(file.read_bytes() for file in (tmp_path / "trackio").rglob("*") if file.is_file())
    assert b"eval/loss" in kept and b"probe/shades/dark" in kept
