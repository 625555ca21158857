"""What a run leaves to be published: encoder or LoRA, complete provenance, a card, and nothing of this machine."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file

import pivot_plugin as pivot
from pivot_plugin.encoders import extract, save_encoder
from pivot_plugin.encoders.card import licence_of
from pivot_plugin.errors import EncoderError, ModelError, SettingsError
from pivot_plugin.hooks import hookimpl, manager
from pivot_plugin.models.find import find_adapter
from tests.helpers import picture, row
from tests.helpers.processes import python

pytestmark = pytest.mark.training

PAIRS = [row(f"{n}?", f"yes {n}", f"no! {n}", picture(60, 60, n)) for n in range(12)]
PEFT_ALONE = """
import sys
sys.modules["pivot_plugin"] = None
import torch
from peft import PeftModel
from transformers import AutoModel
encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(sys.argv[1]), sys.argv[2]).merge_and_unload()
torch.save(encoder.state_dict(), sys.argv[3])
"""


@pytest.fixture
def run(llava: Any, fast: Any) -> Any:
    """A finished run, and the tower before it."""
    before = find_adapter(llava[0]).extract()
    result = pivot.optimize(llava[0], PAIRS[4:], processor=llava[1], eval_prefs=PAIRS[:4], **fast)
    return result, before


def test_the_lora_alone_gives_the_trained_encoder(family: str, tiny: Any, fast: Any, tmp_path: Path) -> None:
    model, processor = tiny
    base = find_adapter(model).extract()
    result = pivot.optimize(model, PAIRS, processor=processor, eval_fraction=0, **fast)
    folder = result.save(tmp_path / "lora", "lora")
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "pivot.json", "README.md")
    }
    merged = PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload()
    trained = find_adapter(model).tower.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-5, atol=1e-6)
    assert any((tensor != base.state_dict()[name]).any() for name, tensor in trained.items())
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")
    with pytest.raises(EncoderError, match=r"holds the LoRA of an encoder.*pivot extract"):
        pivot.load_encoder(folder)
    # by itself it has hashes, and no features
    checks = pivot.verify(folder).checks
    assert [(check.name, check.passed) for check in checks] == [("files", True), ("features", None)]
    assert "adapter_model.safetensors" in checks[0].detail and "pivot extract" in checks[1].detail
    settings = (folder / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").unlink()
    (check,) = pivot.verify(folder).checks
    assert not check.passed and "has no adapter_config.json" in check.detail
    (folder / "adapter_config.json").write_bytes(settings)
    weights = bytearray((folder / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (check,) = pivot.verify(folder).checks
    assert not check.passed and "adapter_model.safetensors" in check.detail


def test_the_lora_goes_onto_the_weights_it_was_trained_on_and_onto_no_others(run: Any, tmp_path: Path) -> None:
    result, before = run
    folder = result.save(tmp_path / "lora", "lora")
    settings = json.loads((folder / "adapter_config.json").read_text())
    for precision in (torch.float32, torch.bfloat16):
        base = tmp_path / str(precision)
        result.processor.image_processor.save_pretrained(base)
        before.to(precision).save_pretrained(base)
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
        taken = extract(folder, tmp_path / f"merged-{precision}")
        close = 1e-6 if precision is torch.float32 else 2e-2
        for name, tensor in taken.encoder.state_dict().items():
            torch.testing.assert_close(tensor.float(), result.encoder.state_dict()[name], rtol=close, atol=close)
        before.to(torch.float32)
    # one weight of one layer that the LoRA is on
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))
    weights[name][0, 0] += 0.1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"is not one of .*the weights it was trained on are others, by the hash"):
        extract(folder, tmp_path / "other")


def test_the_lora_loads_without_this_package(run: Any, tmp_path: Path) -> None:
    result, before = run
    before.save_pretrained(tmp_path / "base")
    folder = result.save(tmp_path / "lora", "lora")
    done = python(PEFT_ALONE, tmp_path / "base", folder, tmp_path / "merged.pt", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    trained = result.encoder.state_dict()
    for name, tensor in torch.load(tmp_path / "merged.pt").items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-5, atol=1e-6)


def test_a_run_without_lora_has_none_to_save(llava: Any, fast: Any, tmp_path: Path) -> None:
    options = fast | {"learning_rate": 1e-5, "lora": None}
    result = pivot.optimize(llava[0], PAIRS, processor=llava[1], eval_fraction=0, **options)
    with pytest.raises(EncoderError, match="trained the weights themselves"):
        result.save(tmp_path / "lora", "lora")
    with pytest.raises(SettingsError, match="weights is 'all'"):
        result.save(tmp_path / "lora", "all")
    assert not (tmp_path / "lora").exists()


def test_the_record_says_where_everything_comes_from(run: Any) -> None:
    result, _ = run
    record = json.loads((result.output_dir / "encoder" / "pivot.json").read_text())
    assert record["encoder_class"] == "CLIPVisionModel" and record["mllm_class"] == "LlavaForConditionalGeneration"
    assert record["feature_layer"] == -2 and record["blocks"] == 3
    assert record["tower_path"] == "model.vision_tower"
    assert "model.vision_tower.encoder.layers.2" in record["unread"]
    assert record["data"]["rows"] == 8 and len(record["data"]["fingerprint"]) == 64
    assert record["settings"]["objective"] == "dpo"
    assert set(record["metrics"]) == {"before", "after"}
    assert set(record["probes"]["saliency"]["dpo/concentration"]) == {"before", "after"}
    assert {"torch", "transformers", "trl", "peft", "pivot_plugin"} <= set(record["versions"])
    assert record["projector_first_layer"] == "model.multi_modal_projector.linear_1"
    assert record["license"] == "other"


def test_nothing_of_this_machine_is_published(llava: Any, fast: Any, tmp_path: Path) -> None:
    options = fast | {"reference_cache": str(tmp_path / "private" / "cache"), "logging_dir": None}
    options.pop("logging_dir")
    options |= {"hub_token": "hf_AbCdEf0123456789AbCd", "run_name": "secret-project of alice", "project": "alice"}
    options |= {"model_init_kwargs": None, "beta": 0.2}
    llava[0].name_or_path = str(tmp_path / "secret-project" / "model")
    result = pivot.optimize(llava[0], PAIRS[4:], processor=llava[1], eval_prefs=PAIRS[:4], **options)
    result.save(tmp_path / "lora", "lora")
    for folder in (result.output_dir / "encoder", tmp_path / "lora"):
        for path in folder.iterdir():
            content = path.read_bytes()
            for place in (str(tmp_path), str(Path.home()), "secret-project", "hf_AbCdEf", "alice"):
                assert place.encode() not in content, (path.name, place)
    record = json.loads((result.output_dir / "encoder" / "pivot.json").read_text())
    assert record["base"]["mllm"] == "model"
    assert record["settings"]["beta"] == 0.2 and "hub_token" not in record["settings"]
    assert set(pivot.publish(result.output_dir / "encoder", "me/eyes", dry_run=True).files) == {
        path.name for path in (result.output_dir / "encoder").iterdir()
    }


def test_the_card_shows_maps_scores_and_plugins_sections(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result, _ = run

    class Good:
        @hookimpl
        def pivot_card_sections(self, result: Any) -> str:
            return f"## Hardware\n\nTrained in {result.family}'s garage."

    class Bad:
        @hookimpl
        def pivot_card_sections(self) -> str:
            raise RuntimeError("no section today")

    plugins = [Good(), Bad()]
    for number, plugin in enumerate(plugins):
        manager().register(plugin, f"test-card-{number}")
    try:
        with caplog.at_level(logging.WARNING):
            folder = result.save(tmp_path / "encoder", licence="mit", picture=True)
    finally:
        for plugin in plugins:
            manager().unregister(plugin)
    card = ModelCard.load(folder / "README.md")
    assert "llava's garage" in card.text
    assert "no section today" in caplog.text
    assert card.data.license == "mit"
    assert "preference_accuracy" in card.text and "`saliency`" in card.text
    assert "(saliency.png)" in card.text
    with Image.open(folder / "saliency.png") as sheet:
        # four pairs, five pictures each
        assert sheet.size[0] == 5 * 168 + 4 * 6
    # they are pictures of the user's data: in what is published only where that was asked for
    for without in (result.save(tmp_path / "other"), result.output_dir / "encoder"):
        assert not (without / "saliency.png").exists()
    assert not (without / "saliency.png").exists()
    assert "saliency.png" not in (without / "README.md").read_text()


def test_large_weights_are_sharded_and_every_shard_has_its_hash(run: Any, tmp_path: Path) -> None:
    result, _ = run
    folder = result.save(tmp_path / "encoder", max_shard_size="60KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and (folder / "model.safetensors.index.json").exists()
    record = json.loads((folder / "pivot.json").read_text())
    assert set(shards) <= set(record["sha256"])
    encoder = pivot.load_encoder(folder)
    for name, tensor in result.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)
    (folder / shards[1]).write_bytes((folder / shards[0]).read_bytes())
    with pytest.raises(EncoderError, match=f"{shards[1]}.*has changed"):
        pivot.load_encoder(folder)


def test_what_strangers_wrote_cannot_break_the_card(llava: Any, tmp_path: Path) -> None:
    record = {
        "base": {"mllm": "<script>alert(1)</script>\n---\nlicense: mit"},
        "data": {"name": "[click](javascript:alert(1)) `x`", "rows": 3},
        "settings": {"a|b": "`</code><img src=x onerror=alert(1)>"},
    }
    folder = save_encoder(find_adapter(llava[0]), llava[1], tmp_path / "encoder", record)
    card = ModelCard.load(folder / "README.md")
    assert "<script" not in card.text and "<img" not in card.text and "</code>" not in card.text
    assert card.data.license == "other" and card.data.base_model is None
    assert "`[click](javascript:alert(1)) 'x'`" in card.text


def test_the_licence_is_that_of_the_base(tmp_path: Path) -> None:
    assert licence_of("") is None
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n# Base")
    assert licence_of(str(tmp_path)) == "gemma"
    assert licence_of("somebody/absent") is None


def test_push_to_hub_saves_and_publishes(run: Any) -> None:
    result, _ = run
    found = result.push_to_hub("me/eyes", dry_run=True)
    assert {"config.json", "model.safetensors", "pivot.json", "README.md"} <= set(found.files)
    lora = result.push_to_hub("me/eyes-lora", weights="lora", dry_run=True)
    assert "adapter_model.safetensors" in lora.files
