"""Checkpoints of MLLMs, compared by their towers: taken out, looked at, told from the language model's doing."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pivot_plugin as pivot
from pivot_plugin.cli.app import cli
from pivot_plugin.encoders import load_encoder
from pivot_plugin.errors import DataError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.probes import ProbeTask, linear_probe, subject
from tests.helpers import Tiny, picture

QUESTIONS = [{"image": picture(40, 40, n), "question": "what?", "answer": "x"} for n in range(3)]


def saved(tiny: Tiny, folder: Path) -> Path:
    tiny[0].save_pretrained(folder)
    tiny[1].save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoints(make: Any, tmp_path: Path) -> dict[str, Path]:
    """A base, one whose tower was trained, and one of whom only the language model was."""
    model, processor = make("llava")
    folders = {"base": saved((model, processor), tmp_path / "base")}
    for name in ("tower", "words"):
        other = copy.deepcopy(model)
        adapter = find_adapter(other)
        changed = adapter.tower if name == "tower" else other.get_decoder()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
        folders[name] = saved((other, processor), tmp_path / name)
    return folders


def test_towers_are_compared_and_the_language_model_leaves_no_trace(
    checkpoints: dict[str, Path], labelled: Any, masked: Any, tmp_path: Path
) -> None:
    captions = [{"image": picture(40, 40, n), "caption": f"number {n} is {n % 3}"} for n in range(12)]
    probes = {
        "linear": ProbeTask("linear", labelled(6, shuffled=True), {"regularisation": [1.0]}),
        "segmentation": ProbeTask("segmentation", masked(6), {"epochs": 2}),
        "ravel": ProbeTask("ravel", captions, {"k": 3}),
        "vqa": ProbeTask("vqa", QUESTIONS, {"max_new_tokens": 2}),
    }
    comparison = pivot.compare(checkpoints, probes, extract=tmp_path / "towers", output=tmp_path / "comparison.json")
    assert list(comparison.results["base"]) == ["linear", "segmentation", "ravel", "vqa", "knn"]
    base, tower, words = (comparison.results[name] for name in checkpoints)
    for label in ("linear", "segmentation", "ravel", "knn"):
        # bit for bit the same encoder, the same text model, the same numbers
        assert words[label].scores == base[label].scores, label
    assert any(tower[label].scores != base[label].scores for label in ("linear", "segmentation", "ravel", "knn"))
    assert {"all/mean-colour", "all/other-picture"} <= base["vqa"].scores.keys()
    # each is what the encoder by itself has, which lies in the folder
    folders = sorted((tmp_path / "towers").iterdir())
    assert [folder.name for folder in folders] == ["0-base", "1-tower", "2-words"]
    alone = linear_probe(folders[1], labelled(6, shuffled=True), regularisation=[1.0])
    assert alone.scores == tower["linear"].scores
    assert load_encoder(folders[0]).config.model_type == load_encoder(folders[1]).config.model_type
    assert comparison.tower_changes["tower"].trained and not comparison.tower_changes["words"].trained
    assert "The tower of words was never trained" in comparison.table()
    assert "The weights of the tower of tower are up to" in comparison.table()
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert max(written["tower_changes"]["tower"].values()) > 0 == max(written["tower_changes"]["words"].values())


def test_it_is_one_command(checkpoints: dict[str, Path], labelled: Any, tmp_path: Path) -> None:
    labelled(4).save_to_disk(str(tmp_path / "colours"))
    asked = ["compare", str(checkpoints["base"]), str(checkpoints["tower"]), "--extract"]
    done = CliRunner().invoke(cli, [*asked, "--probe", f"linear={tmp_path / 'colours'}", "--option", "linear.seed=1"])
    assert done.exit_code == 0, done.output
    assert "| linear top1 |" in done.output and "| knn balanced |" in done.output
    assert "The weights of the tower of" in done.output


def test_towers_of_two_kinds_are_compared_by_their_scores_alone(
    make: Any, labelled: Any, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"llava": subject(*make("llava")), "qwen": subject(*make("qwen2_5_vl"))}
    comparison = pivot.compare(models, {"knn": ProbeTask("knn", labelled(6), {"k": 3})}, extract=True)
    assert set(comparison.results) == {"llava", "qwen"}
    assert comparison.tower_changes == {}
    assert "by its scores alone" in caplog.text and "tower is another one" in caplog.text
    assert len(comparison.contrasts()) == 2


def test_an_encoder_among_them_is_taken_as_it_is_and_captions_need_a_language_model(
    checkpoints: dict[str, Path], labelled: Any, tmp_path: Path
) -> None:
    pivot.compare([checkpoints["base"]], {"knn": ProbeTask("knn", labelled(4), {"k": 3})}, extract=tmp_path / "kept")
    encoder = tmp_path / "kept" / next((tmp_path / "kept").iterdir()).name
    comparison = pivot.compare(
        {"encoder": encoder, "again": checkpoints["base"]},
        {"knn": ProbeTask("knn", labelled(4), {"k": 3})},
        extract=True,
    )
    assert not comparison.tower_changes["again"].trained
    with pytest.raises(DataError, match="encoder, the first that is compared, is an encoder by itself"):
        pivot.compare({"encoder": encoder}, {"ravel": [{"image": picture(40, 40, 1), "caption": "x"}]}, extract=True)
