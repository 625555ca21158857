"""The encoder's folder: plain transformers files, checked on loading, replaced as a whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPVisionModel, ViTConfig, ViTForImageClassification, ViTModel

import pivot_plugin as pivot
from pivot_plugin.encoders import save_encoder
from pivot_plugin.errors import EncoderError
from pivot_plugin.models.find import find_adapter
from tests.helpers.processes import python

WITHOUT_US = """
import sys
sys.modules["pivot_plugin"] = None
import torch
from transformers import AutoImageProcessor, AutoModel
from safetensors.torch import load_file
encoder, loading = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
for name, tensor in load_file(sys.argv[1] + "/model.safetensors").items():
    assert torch.equal(encoder.state_dict()[name.removeprefix("vision_model.")], tensor), name
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
from PIL import Image
inputs = processor(images=[Image.new("RGB", (80, 60), "red")], return_tensors="pt")
grid = {"grid_thw": inputs.pop("image_grid_thw")} if "image_grid_thw" in inputs else {}
pixels = inputs["pixel_values"]
with torch.no_grad():
    print(tuple(encoder(pixels, **grid).last_hidden_state.shape))
"""


def save(tiny: Any, folder: Path) -> Path:
    return save_encoder(find_adapter(tiny[0]), tiny[1], folder, {"note": "test"})


def test_the_folder_loads_without_this_package(family: str, tiny: Any, tmp_path: Path) -> None:
    folder = save(tiny, tmp_path / "encoder")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "projector.safetensors",
        "pivot.json",
        "README.md",
    }
    if type(find_adapter(tiny[0]).tower.config) not in AutoModel._model_mapping:
        # transformers has no AutoModel for the tower of Qwen2-VL, and before 5.23 none for that of Qwen2.5-VL
        newest = version.parse(transformers.__version__) >= version.parse("5.23")
        assert family in (("qwen2_vl",) if newest else ("qwen2_vl", "qwen2_5_vl"))
        pytest.skip("transformers has no AutoModel for this tower; load_encoder finds its class by name")
    run = python(WITHOUT_US, folder, folder=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]


def test_our_loader_gives_the_tower_bit_by_bit(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny
    adapter = find_adapter(model)
    encoder = pivot.load_encoder(save(tiny, tmp_path / "encoder"))
    assert type(encoder) is type(adapter.tower)
    for name, tensor in adapter.tower.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    assert not encoder.training


def test_provenance_and_projector_are_recorded(llava: Any, tmp_path: Path) -> None:
    folder = save(llava, tmp_path / "encoder")
    record = json.loads((folder / "pivot.json").read_text())
    assert record["family"] == "llava"
    assert record["feature_layer"] == -2
    assert "model.vision_tower.encoder.layers.2" in record["unread"]
    # of everything but the record itself and the card, whose words people change
    assert record["sha256"].keys() == {path.name for path in folder.iterdir()} - {"pivot.json", "README.md"}
    assert record["sha256"].keys() >= {"config.json", "preprocessor_config.json", "model.safetensors"}
    projector = load_file(folder / "projector.safetensors")
    assert torch.equal(
        projector["model.multi_modal_projector.linear_1.weight"], llava[0].model.multi_modal_projector.linear_1.weight
    )


def test_a_second_save_replaces_the_first_as_a_whole(llava: Any, tmp_path: Path) -> None:
    folder = save(llava, tmp_path / "encoder")
    (folder / "stale.txt").touch()
    with torch.no_grad():
        llava[0].model.vision_tower.encoder.layers[0].mlp.fc1.weight += 1
    save(llava, folder)
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["encoder"]


def test_a_failed_save_leaves_the_old_folder(llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(llava, tmp_path / "encoder")
    before = (folder / "pivot.json").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pivot_plugin.encoders.store.save_file", full)
    with pytest.raises(EncoderError, match="No space left"):
        save(llava, folder)
    assert (folder / "pivot.json").read_bytes() == before
    assert pivot.load_encoder(folder) is not None
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["encoder"]


def test_an_encoder_that_cannot_be_read_by_itself_is_saved_without_signature(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wants_more(self: Any, pixel_values: Any, depth: Any, **kwargs: Any) -> None: ...

    monkeypatch.setattr(CLIPVisionModel, "forward", wants_more)
    folder = save(llava, tmp_path / "encoder")
    assert json.loads((folder / "pivot.json").read_text())["signature"] is None
    assert "CLIPVisionModel cannot be read by itself" in caplog.text
    monkeypatch.undo()
    assert pivot.load_encoder(folder) is not None
    assert [check.passed for check in pivot.verify(folder).checks] == [True, True, None]


def refuse(folder: Path | str, message: str) -> None:
    with pytest.raises(EncoderError, match=message) as caught:
        pivot.load_encoder(folder)
    assert caught.value.remedy


def test_a_folder_of_something_else_is_not_overwritten(llava: Any, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    with pytest.raises(EncoderError, match="not empty"):
        save(llava, tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_changed_weights_are_named(llava: Any, tmp_path: Path) -> None:
    folder = save(llava, tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    refuse(folder, "model.safetensors.*has changed since it was saved")


def test_a_missing_file_is_named(llava: Any, tmp_path: Path) -> None:
    folder = save(llava, tmp_path / "encoder")
    (folder / "projector.safetensors").unlink()
    refuse(folder, "projector.safetensors is missing")


def test_a_broken_record_is_named(llava: Any, tmp_path: Path) -> None:
    folder = save(llava, tmp_path / "encoder")
    for text, message in (("{", "is not JSON"), ("[]", "no provenance record"), ('{"sha256": 3}', "no provenance")):
        (folder / "pivot.json").write_text(text)
        refuse(folder, message)


def test_weights_that_do_not_fill_the_encoder_are_refused(llava: Any, tmp_path: Path) -> None:
    folder = save(llava, tmp_path / "encoder")
    (folder / "pivot.json").unlink()
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[3]
    save_file({n: t for n, t in weights.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    refuse(folder, f"1 tensors are missing.*{name.removeprefix('vision_model.')}")


def test_weights_left_over_are_counted_and_refused(llava: Any, tmp_path: Path) -> None:
    folder = save(llava, tmp_path / "encoder")
    (folder / "pivot.json").unlink()
    file = folder / "model.safetensors"
    more = {"extra.weight": torch.zeros(2), "extra.bias": torch.zeros(2)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    refuse(folder, r"more than a CLIPVisionModel: 2 tensors are left over, the first 'extra\.bias'")


def test_a_head_of_others_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**small, image_size=28, patch_size=14))
    encoder = {name.removeprefix("vit."): tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    # as the checkpoints of classifiers that have a pooler beside their head
    pooler = {f"vit.{n}": t for n, t in ViTModel(model.config).state_dict().items() if n.startswith("pooler")}
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | pooler, file, {"format": "pt"})
    with caplog.at_level("WARNING"):
        loaded = pivot.load_encoder(tmp_path)
    assert "2 tensors are left over, the first 'classifier.bias'" in caplog.text
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in encoder.items() if name in state)


def test_half_a_download_is_refused(llava: Any, tmp_path: Path) -> None:
    folder = save_encoder(find_adapter(llava[0]), llava[1], tmp_path / "encoder", {}, max_shard_size="40KB")
    (folder / "pivot.json").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[: len(whole) // 2])
    refuse(folder, "is cut off: it has")
    shards[0].unlink()
    refuse(folder, f"{shards[0].name} is missing in .* lists it")


def test_no_folder_and_no_repository(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "no such repository")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "holds no encoder|config.json")


def test_a_hash_record_cannot_point_outside_the_folder(llava: Any, tmp_path: Path) -> None:
    folder = save(llava, tmp_path / "encoder")
    record = json.loads((folder / "pivot.json").read_text())
    record["sha256"] = {"../../etc/passwd": "0"}
    (folder / "pivot.json").write_text(json.dumps(record))
    refuse(folder, "is missing")
    assert Path("/etc/passwd").exists()
