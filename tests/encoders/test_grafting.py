"""Encoders into other MLLMs: as they are, through a new projector, or with the first layer of the old one."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import pivot_plugin as pivot
from pivot_plugin.encoders import save_encoder
from pivot_plugin.errors import EncoderError, SettingsError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.probes import features, subject
from tests.helpers import picture, row
from tests.helpers.encoders import plain

SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZE = {"height": 84, "width": 84}
ENCODERS = {
    "clip": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=84, patch_size=14)),
        lambda: CLIPImageProcessor(size={"shortest_edge": 84}, crop_size=SIZE),
    ),
    "siglip": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=84, patch_size=14, vision_use_head=False)),
        lambda: SiglipImageProcessor(size=SIZE),
    ),
    "dinov2-registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=84, patch_size=14)),
        lambda: ViTImageProcessor(size=SIZE),
    ),
    "vit": (lambda: ViTModel(ViTConfig(**SMALL, image_size=84, patch_size=14)), lambda: ViTImageProcessor(size=SIZE)),
}


def moved(tiny: Any) -> Any:
    """A copy of a model with another tower."""
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        for parameter in find_adapter(model).tower.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_a_drop_in_graft_gives_the_model_the_encoder_came_from(family: str, tiny: Any, tmp_path: Path) -> None:
    source = moved(tiny)
    folder = save_encoder(find_adapter(source), tiny[1], tmp_path / "encoder", {})
    grafted = pivot.graft(tiny[0], pivot.load_encoder(folder))
    for name, tensor in source.state_dict().items():
        assert torch.equal(grafted.state_dict()[name], tensor), name
    assert grafted.config.pivot_encoder == {"name": "encoder", "revision": None}


@pytest.mark.training
@pytest.mark.parametrize("kind", list(ENCODERS))
def test_any_vision_transformer_goes_into_a_llava_through_a_new_projector(
    kind: str, llava: Any, tmp_path: Path
) -> None:
    model, processor = llava
    make, make_processor = ENCODERS[kind]
    torch.manual_seed(0)
    encoder = make().eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    images = make_processor()
    pivot.graft(model, encoder, "new", processor=processor, image_processor=images, feature_layer=-2)
    adapter = find_adapter(model)
    assert type(adapter.tower) is type(encoder)
    for name, tensor in adapter.tower.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    # it reads the hidden state that was asked for, on the true grid
    inputs = images(images=[picture(84, 84, 1)], return_tensors="pt")
    with torch.no_grad():
        expected = encoder(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, -36:]
    found = features(subject(model, processor), [picture(84, 84, 1)], cache=False)
    assert found.grids.tolist() == [[6, 6]]
    torch.testing.assert_close(found.patches(0), expected[0])
    # an ordinary MLLM that transformers loads alone, and that we can train
    model.save_pretrained(tmp_path / "mllm")
    processor.save_pretrained(tmp_path / "mllm")
    assert plain(tmp_path / "mllm").startswith("(1, ")
    pairs = [row(f"{n}?", "yes", "no!", picture(60, 60, n)) for n in range(4)]
    options = {"max_steps": 1, "use_cpu": True, "eval_fraction": 0, "save_strategy": "no", "disable_tqdm": True}
    result = pivot.optimize(model, pairs, processor=processor, output_dir=tmp_path / "run", **options)
    assert result.trained["encoder"][0] > 0


def test_a_new_projector_is_the_same_for_the_same_seed(make: Any) -> None:
    weights = []
    for seed in (1, 1, 2):
        model, processor = make("llava")
        make_encoder, make_processor = ENCODERS["siglip"]
        torch.manual_seed(7)
        encoder = make_encoder()
        torch.manual_seed(seed + 100)
        pivot.graft(model, encoder, "new", processor=processor, image_processor=make_processor(), seed=seed)
        weights.append(model.model.multi_modal_projector.linear_2.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].std() == pytest.approx(0.02, rel=0.1)


def test_the_first_layer_of_the_old_projector_is_reused_and_frozen(make: Any, tmp_path: Path) -> None:
    """The paper's "1+1" (table H)."""
    source, processor = make("llava")
    folder = save_encoder(find_adapter(source), processor, tmp_path / "encoder", {})
    target, other = make("llava")
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(0.01)
    pivot.graft(target, pivot.load_encoder(folder), "first-layer", processor=other)
    ours, theirs = target.model.multi_modal_projector, source.model.multi_modal_projector
    assert torch.equal(ours.linear_1.weight, theirs.linear_1.weight)
    assert torch.equal(ours.linear_1.bias, theirs.linear_1.bias)
    assert not ours.linear_1.weight.requires_grad and not ours.linear_1.bias.requires_grad
    assert not torch.equal(ours.linear_2.weight, theirs.linear_2.weight)
    assert ours.linear_2.weight.requires_grad
    assert target.config.vision_feature_layer == -2
    target.save_pretrained(tmp_path / "mllm")
    other.save_pretrained(tmp_path / "mllm")
    plain(tmp_path / "mllm")


def test_a_tiled_model_takes_an_encoder_of_its_tile_size(make: Any, tmp_path: Path) -> None:
    for family in ("llava_next", "llava_onevision"):
        model, processor = make(family)
        side = find_adapter(model).tower.config.image_size
        vision = SiglipVisionConfig(**SMALL, image_size=side, patch_size=14, vision_use_head=False)
        images = SiglipImageProcessor(size={"height": side, "width": side}, image_mean=[0.1] * 3)
        pivot.graft(model, SiglipVisionModel(vision), "new", processor=processor, image_processor=images)
        assert list(processor.image_processor.image_mean) == [0.1] * 3
        model.save_pretrained(tmp_path / family)
        processor.save_pretrained(tmp_path / family)
        plain(tmp_path / family)
        wrong = SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=84, patch_size=14, vision_use_head=False))
        with pytest.raises(EncoderError, match=r"takes images of 84 px, the tiles of this .* have"):
            pivot.graft(model, wrong, "new", processor=processor, image_processor=SiglipImageProcessor(size=SIZE))


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_pair_that_does_not_fit_is_refused_with_every_mismatch(make: Any) -> None:
    model, _ = make("llava")
    before = state(model)
    config = find_adapter(model).tower.config
    larger = type(config).from_dict(
        {**config.to_dict(), "image_size": 84, "intermediate_size": 96, "num_hidden_layers": 2}
    )
    encoder = CLIPVisionModel(larger)
    encoder.config.vision_feature_layer = -1
    with pytest.raises(EncoderError) as caught:
        pivot.graft(model, encoder)
    for words in (
        "image_size is 84 in the encoder and 56",
        "num_hidden_layers is 2 in the encoder and 3",
        "trained to be read at layer -1, the model reads -2",
        "Only the model's tower has the tensor 'encoder.layers.2",
        "has shape (96,) in the encoder and (64,)",
    ):
        assert words in caught.value.finding, words
    assert "and" in caught.value.finding and "more" in caught.value.finding
    assert 'projector="new"' in caught.value.remedy
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_path_in_place_of_an_encoder_is_refused(llava: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"encoder is a str, .*load_encoder"):
        pivot.graft(llava[0], str(tmp_path))


def test_an_encoder_of_another_family_is_refused(make: Any) -> None:
    for source, target in (("qwen2_5_vl", "llava"), ("llava", "qwen2_5_vl"), ("internvl", "qwen3_vl")):
        model, processor = make(target)
        before = state(model)
        encoder = find_adapter(make(source)[0]).extract()
        with pytest.raises(EncoderError, match=r"The encoder is a .*, this .* has a"):
            pivot.graft(model, encoder)
        with pytest.raises(
            EncoderError, match=r"takes no tower of another class|cannot be read as LLaVA reads"
        ) as caught:
            pivot.graft(model, encoder, "new", processor=processor, image_processor=make(source)[1].image_processor)
        assert caught.value.remedy
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_a_new_projector_lacks_is_named(make: Any, tmp_path: Path) -> None:
    model, processor = make("llava")
    encoder = find_adapter(model).extract()
    with pytest.raises(SettingsError, match="projector is 'mlp'"):
        pivot.graft(model, encoder, "mlp")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="no processor is given"):
        pivot.graft(model, encoder, "new")
    with pytest.raises(SettingsError, match="No image processor is known"):
        pivot.graft(model, encoder, "new", processor=processor)
    with pytest.raises(EncoderError, match="no projector to take the first layer of"):
        pivot.graft(model, encoder, "first-layer", processor=processor)
    foreign, foreign_processor = make("qwen2_5_vl")
    folder = save_encoder(find_adapter(foreign), foreign_processor, tmp_path / "encoder", {})
    with pytest.raises(EncoderError, match="has no first layer that another projector could begin with"):
        pivot.graft(model, pivot.load_encoder(folder), "first-layer", processor=processor)


def test_the_command_writes_an_mllm_that_transformers_loads(make: Any, tmp_path: Path) -> None:
    from tests.helpers.processes import pivot as command

    model, processor = make("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    source = moved((model, processor))
    folder = save_encoder(find_adapter(source), processor, tmp_path / "encoder", {})
    run = command("graft", tmp_path / "model", folder, "-o", tmp_path / "out", "--json", folder=tmp_path)
    assert run.returncode == 0, run.stderr[-1500:]
    made = json.loads(run.stdout)
    assert (made["model"], made["projector"], made["parameters"]) == (
        str(tmp_path / "out"),
        "keep",
        model.num_parameters(),
    )
    plain(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pivot_encoder"]["name"] == "encoder"
    again = command("graft", tmp_path / "model", folder, "-o", tmp_path / "out", folder=tmp_path)
    assert again.returncode == 1 and "is not empty" in again.stderr
    verified = command("verify", folder, folder=tmp_path)
    assert verified.returncode == 0 and "features: ok" in verified.stdout
    (folder / "model.safetensors").write_bytes(b"x")
    assert command("verify", folder, "--json", folder=tmp_path).returncode == 1
    dry = command("push", tmp_path / "encoder", "me/eyes", "--dry-run", folder=tmp_path)
    assert dry.returncode == 1 and "has changed since it was saved" in dry.stderr


def test_pictures_of_any_size_still_work_after_a_graft(llava: Any) -> None:
    model, processor = llava
    make, make_processor = ENCODERS["siglip"]
    pivot.graft(model, make(), "new", processor=processor, image_processor=make_processor())
    for size in ((20, 300), (84, 84)):
        inputs = processor(images=[Image.new("RGB", size)], text=f"{processor.image_token} ?", return_tensors="pt")
        assert torch.isfinite(model(**inputs).logits).all()
