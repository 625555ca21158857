"""The tower of any MLLM, an adapter's too, and how far it is from where it began."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import pivot_plugin as pivot
from pivot_plugin.encoders import extract, save_lora
from pivot_plugin.encoders.compatibility import save_model
from pivot_plugin.encoders.extraction import tower_change
from pivot_plugin.encoders.record import read_provenance
from pivot_plugin.errors import EncoderError, ModelError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import load_model
from tests.helpers.foreign import internvl_made


def saved(tiny: Any, folder: Path) -> Path:
    model, processor = tiny
    save_model(model, folder)
    processor.save_pretrained(folder)
    return folder


def with_lora(model: Any, targets: Any, **settings: Any) -> PeftModel:
    """A PEFT model whose matrices are all drawn, so that each of them changes the weights."""
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, **settings))
    drawn = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.1)
    return wrapped


def tower_weights(model: Any) -> dict[str, torch.Tensor]:
    return find_adapter(model).tower.state_dict()


def merged_by_hand(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The tower's weights plus B A alpha / r, out of the adapter's file."""
    adapter = find_adapter(model)
    weights, tensors = dict(adapter.tower.state_dict()), load_file(folder / "adapter_model.safetensors")
    for name, first in tensors.items():
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name.endswith(".lora_A.weight") and path.startswith(f"{adapter.tower_path}."):
            inner = f"{path.removeprefix(f'{adapter.tower_path}.')}.weight"
            second = tensors[name.replace("lora_A", "lora_B")]
            weights[inner] = weights[inner] + second @ first * 2
    return weights


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-6


@pytest.fixture
def base(tiny: Any, tmp_path: Path) -> Path:
    """Folder of every family's MLLM in turn."""
    return saved(tiny, tmp_path / "base")


@pytest.fixture
def llava_base(llava: Any, tmp_path: Path) -> Path:
    return saved(llava, tmp_path / "base")


def adapter_folder(model: Any, base: Path, folder: Path, **settings: Any) -> Path:
    """A LoRA on tower and language model, as PEFT saves it."""
    targets = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    wrapped = with_lora(copy.deepcopy(model), targets, **settings)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return folder


def test_a_tower_comes_out_of_a_folder_by_name(base: Path, tiny: Any, tmp_path: Path) -> None:
    assert_equal(pivot.extract_encoder(base).state_dict(), tower_weights(tiny[0]))
    taken = extract(base, tmp_path / "encoder")
    again = pivot.load_encoder(taken.folder)
    assert_equal(again.state_dict(), tower_weights(tiny[0]))
    assert pivot.verify(taken.folder).passed
    record = json.loads((taken.folder / "pivot.json").read_text())
    assert record["base"] == {"mllm": "base"}


def test_the_licence_of_a_folder_is_read_there_and_the_hub_is_not_asked_for_its_name(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = llava
    for part in (model, processor):
        part.save_pretrained(tmp_path / "private-project")
    (tmp_path / "private-project" / "README.md").write_text("---\nlicense: mit\n---\n")
    asked = []
    original = ModelCard.load

    def watched(source: Any, *args: Any, **options: Any) -> Any:
        asked.append(source)
        return original(source, *args, **options)

    monkeypatch.setattr(ModelCard, "load", watched)
    extract(tmp_path / "private-project", tmp_path / "encoder")
    assert asked == [tmp_path / "private-project" / "README.md"]
    assert read_provenance(tmp_path / "encoder")["license"] == "mit"


def test_an_adapter_is_merged_first(base: Path, tiny: Any, tmp_path: Path) -> None:
    folder = adapter_folder(tiny[0], base, tmp_path / "lora")
    expected = merged_by_hand(tiny[0], folder)
    assert_equal(extract(folder, tmp_path / "encoder").encoder.state_dict(), expected)


def test_a_peft_model_is_merged_in_a_copy(tiny: Any, tmp_path: Path) -> None:
    model, processor = tiny
    targets = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    wrapped = with_lora(copy.deepcopy(model), targets)
    wrapped.save_pretrained(tmp_path / "lora")
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    taken = extract(wrapped, tmp_path / "encoder", processor=processor)
    assert_equal(taken.encoder.state_dict(), merged_by_hand(model, tmp_path / "lora"))
    assert_equal(dict(wrapped.state_dict()), before)
    assert all(parameter.requires_grad for parameter in taken.encoder.parameters())


def test_modules_that_were_trained_whole_are_taken(llava: Any, tmp_path: Path) -> None:
    model, _ = llava
    wrapped = with_lora(copy.deepcopy(model), ["q_proj"], modules_to_save=["pre_layrnorm"])
    tower = find_adapter(wrapped.get_base_model()).tower
    with torch.no_grad():
        tower.pre_layrnorm.modules_to_save["default"].weight.add_(1.0)
    found = pivot.extract_encoder(wrapped).state_dict()
    assert torch.equal(found["pre_layrnorm.weight"], tower_weights(model)["pre_layrnorm.weight"] + 1.0)


def renamed(folder: Path, *pairs: tuple[str, str]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for old, new in pairs:
        assert any(old in name for name in tensors), old
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("llava", [("model.model.vision_tower.", "model.model.vision_tower.vision_model.")]),
        (
            "llava",
            [
                ("model.model.vision_tower.", "model.vision_tower.vision_model."),
                ("model.model.language_model.", "model.language_model.model."),
                ("model.model.multi_modal_projector", "model.multi_modal_projector"),
            ],
        ),
        (
            "qwen2_5_vl",
            [
                ("model.model.visual.", "model.visual."),
                ("model.model.language_model.", "model.model."),
            ],
        ),
    ],
    ids=["transformers-4.57", "transformers-4.50-llava", "transformers-4.50-qwen"],
)
def test_adapters_of_older_releases_find_their_places(name: str, pairs: Any, make: Any, tmp_path: Path) -> None:
    model, processor = make(name)
    base = saved((model, processor), tmp_path / "base")
    folder = adapter_folder(model, base, tmp_path / "lora")
    expected = merged_by_hand(model, folder)
    renamed(folder, *pairs)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = r"^(?!.*lm_head).*\.(q_proj|qkv|fc1)$"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert_equal(pivot.extract_encoder(folder).state_dict(), expected)


def test_a_whole_model_is_merged_for_everything_that_loads_one(llava_base: Path, llava: Any, tmp_path: Path) -> None:
    folder = adapter_folder(llava[0], llava_base, tmp_path / "lora")
    merged, processor = load_model(folder)
    assert not any("lora" in name for name, _ in merged.named_modules())
    expected = PeftModel.from_pretrained(copy.deepcopy(llava[0]), folder).merge_and_unload()
    assert_equal(dict(merged.state_dict()), dict(expected.state_dict()))
    assert type(processor) is type(llava[1])
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.training
def test_a_lora_on_a_model_that_was_trained_further_is_refused_on_its_name(
    llava_base: Path, rows: Any, tmp_path: Path
) -> None:
    model, processor = load_model(llava_base)
    settings = {"lora": 2, "max_steps": 1, "eval_fraction": 0, "warmup_steps": 0, "learning_rate": 0.05}
    first = pivot.optimize(model, rows, processor=processor, output_dir=tmp_path / "first", **settings)
    with pytest.raises(ModelError, match=r"folder of a run, .* It left its encoder in '.*encoder'"):
        extract(tmp_path / "first", tmp_path / "one")
    with pytest.raises(EncoderError, match=r"folder of a run, .* Its encoder is in '.*encoder'"):
        pivot.load_encoder(tmp_path / "first")
    extract(tmp_path / "first" / "checkpoint-1", tmp_path / "one")
    assert_equal(pivot.load_encoder(tmp_path / "one").state_dict(), first.encoder.state_dict())
    pivot.optimize(model, rows, processor=processor, output_dir=tmp_path / "second", **settings)
    with pytest.raises(ModelError, match=r"weights it was trained on are others.*earlier round or run"):
        extract(tmp_path / "second" / "checkpoint-1", tmp_path / "two")


def test_our_lora_of_an_encoder_is_merged_into_its_base(llava: Any, tmp_path: Path) -> None:
    model, _ = llava
    encoder = extract(saved(llava, tmp_path / "base"), tmp_path / "before").folder
    adapter = find_adapter(model)
    wrapped = with_lora(copy.deepcopy(model), adapter.lora_targets())
    weights = {name.replace(".default", ""): p for name, p in wrapped.named_parameters() if "lora_" in name}
    folder = save_lora(adapter, wrapped.peft_config["default"], weights, tmp_path / "lora", {})
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(encoder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    taken = extract(folder, tmp_path / "after", base=encoder)
    expected = tower_weights(wrapped.merge_and_unload())
    assert_equal(taken.encoder.state_dict(), expected)
    assert taken.change is not None
    assert taken.change.trained
    assert pivot.load_encoder(taken.folder).config.vision_feature_layer == -2


def test_our_lora_is_refused_by_a_class_that_calls_its_modules_otherwise(llava: Any, tmp_path: Path) -> None:
    model, _ = llava
    adapter = find_adapter(model)
    wrapped = with_lora(copy.deepcopy(model), adapter.lora_targets())
    weights = {name.replace(".default", ""): p for name, p in wrapped.named_parameters() if "lora_" in name}
    folder = save_lora(adapter, wrapped.peft_config["default"], weights, tmp_path / "lora", {})
    merged = PeftModel.from_pretrained(pivot.extract_encoder(model), folder).merge_and_unload()
    assert_equal(dict(merged.state_dict()), tower_weights(wrapped.merge_and_unload()))
    # as transformers 4 nests it
    nested = torch.nn.Module()
    nested.vision_model = pivot.extract_encoder(model)
    with pytest.raises(ValueError, match="not found in the base model"):
        PeftModel.from_pretrained(nested, folder)


def edit(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_an_adapter_without_its_base_is_refused(llava_base: Path, llava: Any, tmp_path: Path) -> None:
    folder = adapter_folder(llava[0], llava_base, tmp_path / "lora")
    edit(folder, base_model_name_or_path=None)
    with pytest.raises(ModelError, match="names no base"):
        extract(folder, tmp_path / "encoder")
    edit(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"base .* cannot be had: .*gone"):
        extract(folder, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_an_adapter_on_a_quantised_base_is_refused(llava_base: Path, llava: Any, tmp_path: Path) -> None:
    folder = adapter_folder(llava[0], llava_base, tmp_path / "lora")
    config = json.loads((llava_base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (llava_base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised \(bitsandbytes\)"):
        extract(folder, tmp_path / "encoder")


def test_a_tower_in_whole_numbers_is_refused(llava: Any) -> None:
    model, _ = llava
    layer = find_adapter(model).tower.encoder.layers[0].mlp.fc1
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        pivot.extract_encoder(model)


def test_an_adapter_of_another_base_is_refused(llava: Any, make: Any, tmp_path: Path) -> None:
    model, processor = llava
    folder = adapter_folder(model, saved(llava, tmp_path / "base"), tmp_path / "lora")
    # the base changed after the adapter was trained: its language model is narrower now
    config = copy.deepcopy(model.config)
    config.text_config.intermediate_size = 48
    saved((type(model)(config), processor), tmp_path / "changed")
    edit(folder, base_model_name_or_path=str(tmp_path / "changed"))
    with pytest.raises(ModelError, match=r"not one of .*changed.* as it is now: .*64 numbers, the base has 48.* and 3"):
        extract(folder, tmp_path / "encoder")
    # another family: its modules are called otherwise
    saved(make("qwen2_vl"), tmp_path / "qwen")
    edit(folder, base_model_name_or_path=str(tmp_path / "qwen"), auto_mapping=None)
    with pytest.raises(ModelError, match="which this Qwen2VLForConditionalGeneration has not"):
        extract(folder, tmp_path / "encoder")
    edit(folder, auto_mapping={"base_model_class": "LlavaForConditionalGeneration", "parent_library": "x"})
    with pytest.raises(ModelError, match="trained on a LlavaForConditionalGeneration, this is a Qwen2VL"):
        extract(folder, tmp_path / "encoder")


def test_half_an_adapter_is_refused(llava_base: Path, llava: Any, tmp_path: Path) -> None:
    folder = adapter_folder(llava[0], llava_base, tmp_path / "lora")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors are missing"):
        extract(folder, tmp_path / "encoder")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        extract(folder, tmp_path / "encoder")


def test_the_change_from_the_base_is_told_block_by_block(llava: Any, tmp_path: Path) -> None:
    model, _ = llava
    base = saved(llava, tmp_path / "base")
    trained = copy.deepcopy(model)
    weight = find_adapter(trained).tower.encoder.layers[1].mlp.fc1.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    change = extract(saved((trained, llava[1]), tmp_path / "trained"), tmp_path / "encoder", base=base).change
    assert change is not None
    block = find_adapter(model).tower.encoder.layers[1]
    length = sum(p.detach().square().sum().item() for p in block.parameters()) ** 0.5
    assert change.parts["encoder.layers.1"] == pytest.approx(0.5 * before.norm().item() / length, rel=1e-5)
    assert change.parts["encoder.layers.0"] == change.parts["embeddings and norms"] == 0.0
    record = json.loads((tmp_path / "encoder" / "pivot.json").read_text())
    assert record["compared_with"] == "base"
    assert record["change"] == dict(change.parts)


def test_a_tower_that_was_never_trained_is_called_so(llava: Any, tmp_path: Path) -> None:
    base = saved(llava, tmp_path / "base")
    encoder = extract(base, tmp_path / "before").folder
    trained = copy.deepcopy(llava[0])
    with torch.no_grad():
        trained.get_output_embeddings().weight.add_(1.0)
    folder = saved((trained.to(torch.bfloat16), llava[1]), tmp_path / "trained")
    # half the digits are no training, and the base may be the encoder itself
    for number, source in enumerate((base, encoder)):
        change = extract(folder, tmp_path / f"encoder-{number}", base=source).change
        assert change is not None
        assert not change.trained
        assert "was never trained" in str(change)


def test_a_base_of_another_size_is_refused(llava: Any, make: Any, tmp_path: Path) -> None:
    saved(make("internvl"), tmp_path / "base")
    with pytest.raises(EncoderError, match="base's tower is another one: a InternVLVisionModel"):
        extract(saved(llava, tmp_path / "model"), tmp_path / "encoder", base=tmp_path / "base")
    assert not (tmp_path / "encoder").exists()
    one = pivot.extract_encoder(llava[0])
    two = type(one)(copy.deepcopy(one.config).__class__(**{**one.config.to_dict(), "image_size": 70}))
    with pytest.raises(EncoderError, match=r"1 tensors of another name or size, the first 'embeddings.position"):
        tower_change(one, two)


def test_half_a_download_and_missing_tensors_are_refused(llava: Any, tmp_path: Path) -> None:
    model, processor = llava
    model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    processor.save_pretrained(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    next(iter(sorted((tmp_path / "parts").glob("*.safetensors")))).unlink()
    with pytest.raises(
        ModelError, match=r"half downloaded .*1 of the \d+ files .* are missing, the first model-00001-"
    ):
        extract(tmp_path / "parts", tmp_path / "encoder")
    file = saved(llava, tmp_path / "cut") / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"half downloaded .*model\.safetensors is cut short"):
        extract(tmp_path / "cut", tmp_path / "encoder")
    file.write_bytes(whole)
    tensors = load_file(file)
    absent = [name for name in tensors if "vision_tower" in name and "layers.1" in name]
    save_file({name: tensor for name, tensor in tensors.items() if name not in absent}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{len(absent)} tensors are missing .*first 'model.vision_tower"):
        extract(tmp_path / "cut", tmp_path / "encoder")
    save_file(tensors | {"another.weight": torch.zeros(2)}, file, {"format": "pt"})
    assert_equal(pivot.extract_encoder(tmp_path / "cut").state_dict(), tower_weights(model))


def test_tensors_left_over_are_told(llava: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = saved(llava, tmp_path / "model") / "model.safetensors"
    save_file(load_file(file) | {"another.weight": torch.zeros(2)}, file, {"format": "pt"})
    with caplog.at_level("WARNING"):
        load_model(tmp_path / "model")
    assert "1 tensors are left over, the first 'another.weight'" in caplog.text


def test_a_base_with_more_blocks_is_compared_where_both_have_weights(llava: Any, tmp_path: Path) -> None:
    base = pivot.extract_encoder(llava[0])
    settings = base.config.to_dict() | {"num_hidden_layers": base.config.num_hidden_layers - 1}
    shorter = type(base)(type(base.config)(**settings))
    shorter.load_state_dict(base.state_dict(), strict=False)
    change = tower_change(shorter, base)
    assert not change.trained
    assert change.left_out == sum("layers.2." in name for name in base.state_dict()) > 0
    assert f"{change.left_out} tensors of the base are not in this tower" in str(change)
    with torch.no_grad():
        shorter.encoder.layers[0].mlp.fc1.weight.mul_(1.5)
    changed = [name for name, amount in tower_change(shorter, base).parts.items() if amount]
    assert changed == ["encoder.layers.0"]
    # but what the base lacks is no part of it
    with pytest.raises(EncoderError, match=r"tower is another one: .* \d+ tensors of another name or size"):
        tower_change(base, shorter)


def test_a_checkpoint_without_weights_is_refused(llava_base: Path) -> None:
    (llava_base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"half downloaded .*it has a config\.json and no weights"):
        load_model(llava_base)


def test_nobody_is_asked_whether_a_bases_code_may_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llava: Any, llava_base: Path
) -> None:
    questions: list[str] = []

    def ask(prompt: str = "") -> str:
        questions.append(prompt)
        return "n"

    monkeypatch.setattr("builtins.input", ask)
    mark, remote = tmp_path / "ran", tmp_path / "remote"
    remote.mkdir()
    (remote / "m.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: ...\n")
    settings = {"model_type": "x", "architectures": ["X"], "auto_map": {"AutoConfig": "m.C", "AutoModel": "m.C"}}
    (remote / "config.json").write_text(json.dumps(settings))
    folder = adapter_folder(llava[0], llava_base, tmp_path / "lora")
    edit(folder, base_model_name_or_path=str(remote))
    with pytest.raises(ModelError, match=r"auto_map\), which is not run"):
        load_model(folder)
    with pytest.raises(ModelError, match=r"auto_map\), which is not run"):
        extract(llava_base, tmp_path / "encoder", base=remote)
    assert not questions
    assert not mark.exists()


def test_an_adapter_by_another_repositorys_names_is_to_be_merged_there(tmp_path: Path) -> None:
    _, base = internvl_made(tmp_path, "Qwen2")
    folder = tmp_path / "lora"
    folder.mkdir()
    path = "base_model.model.vision_model.encoder.layers.0.attn.qkv"
    weights = {f"{path}.lora_A.weight": torch.ones(2, 24), f"{path}.lora_B.weight": torch.ones(72, 2)}
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["qkv"], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"attn.qkv', which this InternVL\w+ has not\. .*merge it there, by the repos"):
        load_model(folder)


def test_a_package_that_a_checkpoint_needs_is_named(llava_base: Path) -> None:
    settings = json.loads((llava_base / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (llava_base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"bitsandbytes.*of a quantised model, give the one before quantisation"):
        load_model(llava_base)


def test_the_card_says_that_the_encoder_was_taken_out_and_claims_no_training(llava_base: Path, tmp_path: Path) -> None:
    with_base = (extract(llava_base, tmp_path / "one", base=llava_base).folder / "README.md").read_text()
    alone = (extract(llava_base, tmp_path / "two").folder / "README.md").read_text()
    for text in (with_base, alone):
        assert "`, taken out with pivot_plugin" in text.replace("`)", "`").replace("(`", "`")
        for claim in (
            "made better",
            "after preference",
            "was trained through",
            "## Training",
            "\n- trl",
            "## Citation",
        ):
            assert claim not in text
        assert "\n## Limits\n\nHow the model was trained is not known here" in text
        assert "\n\n\n\n" not in text
    assert "Nothing: the encoder was taken out as it is." in alone
    assert "| `encoder.layers.0` | 0 |" in with_base
