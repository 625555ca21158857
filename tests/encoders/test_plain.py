"""What strangers write into an encoder's folder, hashes and all: named, before anything is built of it."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import pivot_plugin as pivot
from pivot_plugin.errors import EncoderError
from tests.helpers.encoders import rehash


def refused(folder: Path, words: str) -> None:
    begun = time.monotonic()
    with pytest.raises(EncoderError, match=words) as caught:
        pivot.load_encoder(folder, with_processor=True)
    assert caught.value.remedy and time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("config.json", "num_hidden_layers", 10**9),
        ("config.json", "num_attention_heads", 0),
        ("config.json", "patch_size", -14),
        ("config.json", "hidden_size", True),
        ("config.json", "layer_norm_eps", 1e9),
        ("config.json", "attention_dropout", 2.0),
        ("config.json", "anything", 10**300),
        ("config.json", "num_labels", 10**9),
        ("preprocessor_config.json", "rescale_factor", 0),
        ("preprocessor_config.json", "image_std", [0.5, 0.0, 0.5]),
        ("preprocessor_config.json", "image_mean", [1e9, 0.5, 0.5]),
        ("preprocessor_config.json", "crop_size", {"height": 0, "width": 56}),
        ("preprocessor_config.json", "do_rescale", "no"),
        ("preprocessor_config.json", "resample", 99),
    ],
)
def test_a_value_that_no_tower_has_is_named(saved: Path, file: str, name: str, value: Any) -> None:
    (saved / file).write_text(json.dumps({**json.loads((saved / file).read_text()), name: value}))
    rehash(saved)
    refused(saved, f"{re.escape(file)} has {name}=.* which cannot be: .* is expected")


def test_a_model_larger_than_its_weights_is_not_built(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "image_size": 1 << 20, "patch_size": 1}))
    rehash(saved)
    refused(saved, r"describes [\d,]+ weights and [\d,]+ numbers in tables, its files hold")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attn_implementation": "somebody/kernel"}, "would run code .*somebody/kernel"),
        ({"_attn_implementation": {"": "somebody/kernel"}}, "would run code .*somebody/kernel"),
        ({"vision_config": {"auto_map": {"AutoModel": "x.X"}}}, "would run code .*x.X"),
        ({"transformers_weights": "other.safetensors"}, "weights read from 'other.safetensors'"),
        ({"to_dict": 3}, "'to_dict', which is no setting"),
    ],
)
def test_a_configuration_that_does_more_than_describe_is_refused(saved: Path, settings: Any, words: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **settings}))
    rehash(saved)
    refused(saved, words)


@pytest.mark.parametrize("target", ["../outside.safetensors", "/tmp/outside.safetensors", "sub/model.safetensors", "."])
def test_an_index_that_points_elsewhere_is_not_followed(saved: Path, target: str) -> None:
    weights = load_file(saved / "model.safetensors")
    (saved / "sub").mkdir()
    for place in (saved.parent / "outside.safetensors", saved / "sub" / "model.safetensors"):
        save_file(weights, place, {"format": "pt"})
    (saved / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, target)}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    (saved / "sub").rename(saved.parent / "aside")
    rehash(saved)
    (saved.parent / "aside").rename(saved / "sub")
    refused(saved, "points at .* which is no weight file in its folder")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors", "pivot.json"])
@pytest.mark.parametrize("record", [True, False])
def test_links_devices_and_pipes_are_refused_at_once(saved: Path, tmp_path: Path, name: str, record: bool) -> None:
    if not record and name != "pivot.json":
        (saved / "pivot.json").unlink()
    (saved / name).rename(tmp_path / name)
    for target in ("/dev/zero", str(tmp_path / name), "nowhere"):
        (saved / name).symlink_to(target)
        refused(saved, f"{re.escape(name)} in .* is a link to")
        (saved / name).unlink()
    os.mkfifo(saved / name)
    refused(saved, f"{re.escape(name)} in .* is no file")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_settings_changed_after_saving_are_named(saved: Path, name: str) -> None:
    (saved / name).write_text((saved / name).read_text() + "\n")
    refused(saved, f"{re.escape(name)} in .* has changed since it was saved")


def test_a_file_that_the_record_does_not_list_is_refused(saved: Path) -> None:
    (saved / "processor_config.json").write_text("{}")
    refused(saved, r"processor_config\.json in .* has no hash in pivot\.json")
