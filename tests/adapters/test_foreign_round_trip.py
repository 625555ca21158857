"""From a checkpoint of another repository to a better one in the same form, in Python and on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import pivot_plugin as pivot
from pivot_plugin.cli.app import cli
from pivot_plugin.encoders import export
from pivot_plugin.errors import EncoderError, ModelError, SettingsError
from pivot_plugin.models.loading import load_model
from tests.helpers import picture
from tests.helpers.foreign import internvl_made, llava_made, tensors

TARGETS = {"LLaVA-NeXT": "llava-next", "InternVL": "internvl"}


def made(kind: str, tmp_path: Path) -> Path:
    if kind == "InternVL":
        return internvl_made(tmp_path, "InternLM2, normed queries, layer -2")[1]
    return llava_made(tmp_path, "qwen, tiles with a limit")[1]


def command(*words: str | Path) -> Result:
    run = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
    assert run.exit_code == 0, run.output
    return run


def stored_pairs(folder: Path) -> Path:
    """Pairs in LLaVA-NeXT's and PIVOT's layout, their images beside them."""
    folder.mkdir()
    rows = []
    for number in range(6):
        picture(40, 40, number).save(folder / f"{number}.png")
        rows.append(
            {"image": f"{number}.png", "prompt": "<image>\nwhat?", "chosen": f"it is {number}", "rejected": "no"}
        )
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder / "pairs.json"


SHORT = [word for name in ("max_steps=2", "use_cpu=true", "disable_tqdm=true") for word in ("--set", name)]


def is_tower(name: str) -> bool:
    return name.startswith(("model.vision_tower.", "vision_model."))


@pytest.mark.training
@pytest.mark.parametrize("kind", TARGETS)
def test_the_command_line_gives_the_checkpoint_back_with_a_better_encoder(kind: str, tmp_path: Path) -> None:
    folder = made(kind, tmp_path)
    pairs = stored_pairs(tmp_path / "pairs")
    command("optimize", folder, pairs, "-o", tmp_path / "run", "--lora", "4", *SHORT, "--set", "learning_rate=5e-3")
    better = tmp_path / "better"
    command("export", tmp_path / "run" / "encoder", "--for", TARGETS[kind], "--like", folder, "-o", better)
    before, after = tensors(folder), tensors(better)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(map(is_tower, changed))
    encoder = pivot.extract_encoder(better).state_dict()
    expected = pivot.load_encoder(tmp_path / "run" / "encoder").state_dict()
    assert encoder.keys() == expected.keys()
    assert all(torch.equal(encoder[name], expected[name]) for name in expected)


@pytest.mark.training
@pytest.mark.parametrize("kind", TARGETS)
def test_a_whole_trained_model_goes_back(kind: str, tmp_path: Path) -> None:
    folder = made(kind, tmp_path)
    pairs = stored_pairs(tmp_path / "pairs")
    options = ["--train", "all", "--lora", "none", "--set", "learning_rate=1e-3", "--save-model"]
    command("optimize", folder, pairs, "-o", tmp_path / "run", *options, *SHORT)
    better = tmp_path / "better"
    run = command("export", tmp_path / "run" / "model", "--for", TARGETS[kind], "--like", folder, "-o", better)
    assert "all weights replaced" in run.output
    before, after = tensors(folder), tensors(better)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("layers.0" in name and not is_tower(name) for name in changed)
    assert any("mm_projector" in name or "mlp1" in name for name in changed)
    # read again it is the model that was trained
    trained, again = (load_model(place)[0].state_dict() for place in (tmp_path / "run" / "model", better))
    assert trained.keys() == again.keys()
    assert all(torch.equal(trained[name], again[name]) for name in trained)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_result_saves_its_model_in_both_forms(kind: str, tmp_path: Path, rows: Any, fast: Any) -> None:
    folder = made(kind, tmp_path)
    result = pivot.optimize(str(folder), rows, **fast | {"max_steps": 1})
    plain, back = result.save_model(tmp_path / "plain"), result.save_model(tmp_path / "back", like=folder)
    assert tensors(back).keys() == tensors(folder).keys()
    for place in (plain, back):
        again, _ = load_model(place)
        expected = result.model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(SettingsError, match="is not empty"):
        result.save_model(plain)


class TestRefusals:
    """What cannot go back is refused before anything is written."""

    def test_another_encoder(self, tmp_path: Path) -> None:
        _, llava = llava_made(tmp_path / "llava", "llama, CLIP")
        _, internvl = internvl_made(tmp_path / "internvl", "Qwen2")
        with pytest.raises(EncoderError, match="InternVLVisionModel"):
            export(pivot.extract_encoder(internvl), "llava-next", tmp_path / "out", like=llava)
        assert not (tmp_path / "out").exists()

    def test_another_repository(self, tmp_path: Path) -> None:
        _, internvl = internvl_made(tmp_path, "Qwen2")
        with pytest.raises(ModelError, match=r"is a checkpoint of InternVLChatModel .* to be written for llava-next"):
            export(internvl, "llava-next", tmp_path / "out", like=internvl)

    def test_an_mllm_that_was_read_from_another_checkpoint(self, tmp_path: Path) -> None:
        _, flat = llava_made(tmp_path / "flat", "qwen, own SigLIP")
        _, tiled = llava_made(tmp_path / "tiled", "qwen, tiles with a limit")
        with pytest.raises(ModelError, match=r"is read as a LlavaOnevision.*this is a LlavaForConditionalGeneration"):
            export(flat, "llava-next", tmp_path / "out", like=tiled)

    def test_a_checkpoint_of_transformers(self, llava: Any, tmp_path: Path) -> None:
        model, processor = llava
        model.save_pretrained(tmp_path / "llava")
        processor.save_pretrained(tmp_path / "llava")
        with pytest.raises(ModelError, match=r"no checkpoint of a repository whose form is known.*save_pretrained"):
            export(model, "llava-next", tmp_path / "out", like=tmp_path / "llava")

    def test_a_target_without_mllms(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="timm has no MLLMs of its own form"):
            export(tmp_path, "timm", tmp_path / "out", like=tmp_path)
