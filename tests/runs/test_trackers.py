"""Trackers of the ecosystem, for real and offline: held-out values, those of probes, and what trains."""

from pathlib import Path
from typing import Any

import pytest

import pivot_plugin as pivot
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


def test_trackio_has_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # it reads this when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    tracked(tmp_path / "run", "trackio", project="pivot-test", trackio_space_id=None)
    kept = b"".join(file.read_bytes() for file in (tmp_path / "trackio").rglob("*") if file.is_file())
    assert b"eval/loss" in kept and b"probe/shades/dark" in kept
