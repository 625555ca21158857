"""Names and settings of a saved folder: what every release reads, byte for byte what was saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration

from pivot_plugin.encoders.compatibility import renaming, rewrite_for_every_release, save_model, with_both_rotary_forms
from pivot_plugin.errors import EncoderError

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def clip() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=28, patch_size=14)).eval()


@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["one-file", "many-files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_has_its_old_names_and_its_own_bytes(size: str, dtype: torch.dtype, tmp_path: Path) -> None:
    encoder = clip().to(dtype)
    save_model(encoder, tmp_path, max_shard_size=size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (size != "5GB")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = {f"vision_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    again = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in encoder.state_dict().items())


def test_settling_twice_changes_nothing(llava: Any, tmp_path: Path) -> None:
    save_model(llava[0], tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    rewrite_for_every_release(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_mllm_keeps_all_but_the_names_of_its_tower(llava: Any, tmp_path: Path) -> None:
    model, _ = llava
    model.save_pretrained(tmp_path / "plain")
    save_model(model, tmp_path / "rewritten")
    plain, rewritten = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "rewritten"))
    moved = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in plain}
    assert set(moved.values()) == rewritten.keys()
    assert all(torch.equal(plain[old], rewritten[new]) for old, new in moved.items())
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "rewritten")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_names_that_are_no_tower_s_stay() -> None:
    rename = renaming({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}})
    assert rename is not None
    assert rename("model.vision_tower.head.probe") == "model.vision_tower.vision_model.head.probe"
    for name in (
        "vision_tower.vision_model.head.probe",
        "language_model.model.embeddings.weight",
        "encoder.layers.0.weight",
        "vision_tower.other.weight",
    ):
        assert rename(name) == name
    assert renaming({"model_type": "qwen2_5_vl", "vision_config": {"model_type": "qwen2_5_vl_vision"}}) is None
    assert renaming({"model_type": "internvl_vision"}) is None


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2]},
            },
        ),
        (
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": None},
        ),
        (
            {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
            },
        ),
    ],
    ids=["plain", "mrope", "linear", "partial", "gemma3"],
)
def test_rotary_settings_are_written_in_both_forms(rope: dict[str, Any], old: dict[str, Any]) -> None:
    text = {"model_type": "llama", "rope_parameters": rope}
    vision = {"model_type": "qwen2_5_vl_vision", "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}
    config = {"model_type": "llava", "text_config": text, "vision_config": vision}
    rewritten = with_both_rotary_forms(config)
    assert rewritten["text_config"] == {**text, **old}
    assert rewritten["vision_config"] == vision
    assert rewritten["text_config"]["rope_parameters"] == rope


def test_this_release_reads_both_forms_as_the_one_it_wrote(family: str, tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny
    model.config.get_text_config().rope_parameters["rope_theta"] = 12_345.0
    save_model(model, tmp_path)
    again = AutoConfig.from_pretrained(tmp_path).get_text_config().rope_parameters
    # what the old form repeats may stand there too
    expected = model.config.get_text_config().rope_parameters
    assert {name: again[name] for name in expected} == expected
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["rope_theta"] == 12_345.0


def test_half_a_weight_file_is_refused(tmp_path: Path) -> None:
    encoder = clip()
    encoder.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in (4, 100, len(whole) - 8):
        file.write_bytes(whole[:length])
        with pytest.raises(EncoderError, match=r"cut off|no whole safetensors"):
            rewrite_for_every_release(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(EncoderError, match=r"no config\.json"):
        rewrite_for_every_release(tmp_path)
