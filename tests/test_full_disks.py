"""Where a disk is full: an error of ours names the path and what to do, and nothing half written is taken for whole."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import pivot_plugin as pivot
from pivot_plugin import preferences, probes
from pivot_plugin.data.skipped import SkippedRows
from pivot_plugin.encoders import export, extract
from pivot_plugin.errors import DataError, PivotError
from pivot_plugin.files import Lines, whole_folder
from pivot_plugin.testing import build
from pivot_plugin.training.reference import KEY, ReferenceCache
from tests.helpers import Tiny, picture, row
from tests.helpers.full_disk import full_disk
from tests.helpers.kills import begin, left

IMAGES = [picture(60, 60, number) for number in range(3)]
PAIRS = [row(f"{number}?", f"it is {number}", "no", image) for number, image in enumerate(IMAGES)]
QUESTIONS = [{"prompt": f"{number}?", "image": image} for number, image in enumerate(IMAGES)]
FITS = 1000
Writing = Callable[[Tiny, Path], object]


def archive(place: Path) -> Path:
    IMAGES[0].resize((200, 200)).save(place / "0.bmp")
    line = {"image": "0.bmp", "question": "a?", "chosen": "b", "rejected": "c"}
    with zipfile.ZipFile(place / "rows.zip", "w") as made:
        made.write(place / "0.bmp", "0.bmp")
        made.writestr("rows.jsonl", json.dumps(line))
    return place / "rows.zip"


def skip(tiny: Tiny, target: Path) -> None:
    with SkippedRows("rows", target, 100) as skipped:
        for number in range(20):
            skipped.add(number, DataError(f"row {number} is bad" + " indeed" * 10, "Mend it."))


# what is written, under which name, and the bytes that still fit
WRITINGS: dict[str, tuple[Writing, str, int]] = {
    "an encoder": (lambda tiny, target: extract(tiny[0], target, processor=tiny[1]), "encoder", FITS),
    "an encoder's weights": (
        lambda tiny, target: extract(tiny[0], target, processor=tiny[1]),
        "encoder",
        20 * FITS,
    ),
    "pairs": (lambda tiny, target: preferences.save(preferences.load(PAIRS), target), "pairs", FITS),
    "pairs' first byte": (lambda tiny, target: preferences.save(preferences.load(PAIRS), target), "pairs", 0),
    "features": (
        lambda tiny, target: probes.features(probes.subject(*tiny), IMAGES, cache=target),
        "features",
        FITS,
    ),
    "a reference": (lambda tiny, target: ReferenceCache(target, {"a": "b" * 2000}), "references", FITS),
    "references": (
        lambda tiny, target: ReferenceCache(target, {}).add(
            np.array([f"{n:032d}".encode() for n in range(2000)], dtype=KEY), np.zeros((2000, 2), dtype=np.float32)
        ),
        "references",
        FITS,
    ),
    "candidates": (
        lambda tiny, target: preferences.sample(
            tiny[0], QUESTIONS, processor=tiny[1], n=2, max_new_tokens=2, output_dir=target
        ),
        "candidates",
        100,
    ),
    "skipped rows": (skip, "skipped.jsonl", FITS),
}


@pytest.mark.parametrize("what", WRITINGS)
def test_what_finds_no_room_is_said_with_its_path_and_mends_itself(what: str, llava: Tiny, tmp_path: Path) -> None:
    write, name, fits = WRITINGS[what]
    target = tmp_path / "place" / name
    with full_disk(fits), pytest.raises(PivotError) as refusal:
        write(llava, target)
    assert str(target) in refusal.value.finding and "File too large" in refusal.value.finding
    assert "room" in refusal.value.remedy or "another" in refusal.value.remedy
    # nothing of it, or whole files alone
    for path in target.rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".jsonl"), path
        assert not path.name.startswith("."), path
    assert not target.exists() or what not in ("an encoder", "an encoder's weights", "pairs", "pairs' first byte")
    write(llava, target)


def test_an_archive_that_finds_no_room_is_unpacked_by_the_next_call(tmp_path: Path) -> None:
    path = archive(tmp_path)
    with full_disk(10 * FITS), pytest.raises(PivotError, match=r"archives.*cannot be written.*Make room"):
        preferences.load(path)
    assert preferences.load(path)[0]["images"][0].size == (200, 200)


@pytest.mark.training
def test_a_run_that_finds_no_room_goes_on_from_its_last_whole_checkpoint(tmp_path: Path) -> None:
    begin("weights", tmp_path / "straight", resume=False)
    expected = left(tmp_path / "straight", "weights")
    whole = sum(file.stat().st_size for file in (tmp_path / "straight" / "checkpoint-4").glob("model.safetensors"))
    for fits, said in ((0, r"run.json' cannot be written"), (2000, "no checkpoint was whole"), (whole - 1, "no check")):
        with full_disk(fits), pytest.raises(PivotError, match=f"(?s)cannot be written.*Make room|{said}") as refusal:
            begin("weights", tmp_path / "run", resume=True)
        assert str(tmp_path / "run") in refusal.value.finding
    begin("weights", tmp_path / "run", resume=True)
    for name, tensor in left(tmp_path / "run", "weights").items():
        assert tensor.equal(expected[name]), name

    # what a finished run writes beside: the whole model, a report, another form
    result = begin("weights", tmp_path / "run", resume=True)
    for write, name in (
        (lambda target: result.save_model(target), "model"),
        (lambda target: result.save(target), "saved"),
        (lambda target: result.report(target), "report.html"),
        (lambda target: export(tmp_path / "run" / "encoder", "timm", target), "timm"),
    ):
        with full_disk(20 * FITS), pytest.raises(PivotError, match=rf"{name}' cannot be written: .*File too large"):
            write(tmp_path / name)
        assert not (tmp_path / name).exists()
        write(tmp_path / name)


@pytest.mark.training
def test_a_trained_model_that_finds_no_room_is_written_by_the_next_call(tmp_path: Path) -> None:
    rows = [{"caption": f"it is {number}", "image": image} for number, image in enumerate(IMAGES)]
    options: Any = {"output_dir": tmp_path / "run", "max_steps": 1, "use_cpu": True, "save_strategy": "no"}
    model, processor = build("llava")
    with full_disk(5 * FITS), pytest.raises(PivotError, match=r"model' cannot be written"):
        pivot.align(model, rows, processor=processor, **options)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "log.jsonl"}
    pivot.align(model, rows, processor=processor, resume=True, **options)
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")


def test_of_a_file_that_grows_whole_lines_stay(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "lines")
    with full_disk(50), pytest.raises(PivotError, match=r"lines' cannot be written: File too large"):
        for _ in range(10):
            lines.add(b"a line of 20 bytes.\n")
    # closing writes nothing more, and fails no more
    lines.close()
    assert (tmp_path / "lines").read_bytes() == (b"a line of 20 bytes.\n" * 3)[:50]


def test_what_was_read_meanwhile_is_not_taken_for_what_is_written(tmp_path: Path) -> None:
    forbidden = PermissionError(13, "Permission denied", str(tmp_path / "elsewhere" / "read.png"))
    with pytest.raises(PermissionError) as refusal, whole_folder(tmp_path / "place" / "folder"):
        raise forbidden
    assert refusal.value is forbidden
