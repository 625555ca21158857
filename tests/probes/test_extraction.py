"""Features: frozen, on their grid, the same in batches as alone, and kept by content."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Qwen2Config,
    Qwen2Model,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTImageProcessor,
)

import pivot_plugin as pivot
from pivot_plugin.encoders import save_encoder
from pivot_plugin.errors import DataError, ModelError, SettingsError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.probes import features, subject
from pivot_plugin.probes.extraction import CHUNK
from tests.helpers import picture

SIZES = ((60, 60), (120, 50), (48, 100), (64, 64), (90, 70))
IMAGES = [picture(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


def values(found: Any) -> list[torch.Tensor]:
    return [found.patches(index) for index in range(len(found))]


def test_batches_workers_and_forms_of_images_change_nothing(tiny: Any) -> None:
    who = subject(*tiny)
    alone = values(features(who, IMAGES, batch_size=1, workers=0, cache=False))
    encoded = []
    for image in IMAGES:
        written = io.BytesIO()
        image.save(written, "PNG")
        encoded.append(written.getvalue())
    together = features(who, encoded, batch_size=2, workers=2, cache=False)
    for one, other in zip(alone, values(together), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (together.grids.prod(axis=1) == [len(value) for value in alone]).all()
    rows = datasets.Dataset.from_dict({"image": IMAGES}, features=datasets.Features({"image": datasets.Image()}))
    for one, other in zip(alone, values(features(who, rows["image"], cache=False)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_features_are_what_the_adapter_reads_from_the_tower(tiny: Any) -> None:
    model, processor = tiny
    adapter = find_adapter(model)
    inputs = dict(adapter.image_processor(processor)(images=[IMAGES[0]], return_tensors="pt"))
    with torch.no_grad():
        expected = adapter.patch_features(inputs)[0]
    found = features(model, [IMAGES[0]], processor=processor, cache=False)
    torch.testing.assert_close(found.patches(0), expected.values)
    assert tuple(found.grids[0]) == expected.grid
    pooled = features(model, [IMAGES[0]], processor=processor, cache=False, pool="mean")
    np.testing.assert_allclose(pooled.pooled()[0], expected.values.mean(dim=0).numpy(), rtol=1e-5, atol=1e-6)


def test_projected_features_are_what_the_language_model_gets(family: str, tiny: Any) -> None:
    model, processor = tiny
    adapter = find_adapter(model)
    whole = adapter.image_processor(processor)
    inputs = dict(whole(images=[IMAGES[0]], return_tensors="pt"))
    found = features(model, [IMAGES[0]], processor=processor, projected=True, cache=False)
    if family in ("llava_next", "llava_onevision"):
        # its own processor cuts tiles; the view of the whole comes first
        cut = processor.image_processor(images=[IMAGES[0]], return_tensors="pt")
        inputs = {"pixel_values": cut["pixel_values"], "image_sizes": cut["image_sizes"]}
    with torch.no_grad():
        tokens = model.base_model.get_image_features(**inputs).pooler_output
    tokens = tokens if torch.is_tensor(tokens) else torch.cat(list(tokens))
    tokens = tokens.flatten(0, -2)[: len(found.patches(0))]
    torch.testing.assert_close(found.patches(0), tokens, rtol=1e-4, atol=1e-5)
    assert found.grids[0].prod() == len(tokens)


def test_an_encoder_by_itself_gives_the_features_of_the_tower_in_its_mllm(tiny: Any, tmp_path: Path) -> None:
    """Layer and order of patches are honoured after a round trip through the encoder's folder."""
    model, processor = tiny
    folder = save_encoder(find_adapter(model), processor, tmp_path / "encoder", {})
    inside = features(model, IMAGES, processor=processor, cache=False)
    outside = features(folder, IMAGES, cache=False)
    for one, other in zip(values(inside), values(outside), strict=True):
        torch.testing.assert_close(one, other)
    assert (inside.grids == outside.grids).all()


def test_features_are_kept_by_content(llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = llava
    first = features(model, IMAGES, processor=processor, cache=tmp_path)
    kept = list(tmp_path.iterdir())
    calls = []
    hook = model.get_encoder(modality="image").register_forward_hook(lambda *args: calls.append(1))
    again = features(model, IMAGES, processor=processor, cache=tmp_path)
    assert not calls
    assert list(tmp_path.iterdir()) == kept
    for one, other in zip(values(first), values(again), strict=True):
        assert torch.equal(one, other)
    features(model, IMAGES[::-1], processor=processor, cache=tmp_path)
    assert len(calls) == 1
    with torch.no_grad():
        next(model.get_encoder(modality="image").parameters()).add_(1)
    features(model, IMAGES, processor=processor, cache=tmp_path)
    assert len(calls) == 2
    hook.remove()


def test_an_interrupted_extraction_goes_on_with_the_missing_chunks(llava: Any, tmp_path: Path) -> None:
    model, processor = llava
    images = [picture(60, 60, seed) for seed in range(CHUNK + 3)]
    whole = features(model, images, processor=processor, cache=False, pool="mean").pooled()

    class Interrupted(Exception):
        pass

    seen = []

    def stop(*args: Any) -> None:
        seen.append(1)
        if len(seen) > CHUNK // 32:
            raise Interrupted

    hook = model.get_encoder(modality="image").register_forward_hook(stop)
    with pytest.raises(Interrupted):
        features(model, images, processor=processor, cache=tmp_path, pool="mean", workers=0)
    hook.remove()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    seen.clear()
    hook = model.get_encoder(modality="image").register_forward_hook(lambda *args: seen.append(1))
    resumed = features(model, images, processor=processor, cache=tmp_path, pool="mean", workers=0)
    hook.remove()
    assert len(seen) == 1
    np.testing.assert_allclose(resumed.pooled(), whole, rtol=1e-4, atol=1e-5)


def test_extraction_leaves_the_model_as_it_was(llava: Any) -> None:
    model, processor = llava
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    features(model, IMAGES[:2], processor=processor, cache=False)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_encoders_that_never_saw_a_language_model_have_grids() -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = {"height": 56, "width": 56}
    dino = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**small, image_size=56, patch_size=14)).eval()
    found = features(dino, IMAGES[:2], processor=ViTImageProcessor(size=size), cache=False)
    # a class token and four registers are no patches
    assert found.grids.tolist() == [[4, 4], [4, 4]]
    convolutional = ResNetModel(ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1])).eval()
    found = features(convolutional, IMAGES[:2], processor=ViTImageProcessor(size=size), cache=False)
    assert found.grids.tolist() == [[7, 7], [7, 7]]
    assert found.width == 32


def test_of_a_dual_encoder_the_half_that_sees_is_read(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    dual = SiglipModel(SiglipConfig(text_config=small, vision_config={**small, "image_size": 56, "patch_size": 14}))
    dual.eval().save_pretrained(tmp_path / "dual")
    processor = SiglipImageProcessor(size={"height": 56, "width": 56})
    processor.save_pretrained(tmp_path / "dual")
    loaded = features(dual, IMAGES[:2], processor=processor, cache=False)
    from_folder = features(tmp_path / "dual", IMAGES[:2], cache=False)
    pixels = processor(images=IMAGES[:2], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = dual.vision_model(pixels).last_hidden_state
    for found in (loaded, from_folder):
        torch.testing.assert_close(found.patches(1), expected[1])
    assert type(pivot.load_encoder(tmp_path / "dual")).__name__ == "SiglipVisionModel"


def test_an_image_processor_of_another_size_is_named() -> None:
    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=56
        )
    )
    wrong = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    with pytest.raises(ModelError, match=r"takes images of size 56; CLIPImageProcessor gives .*64, 64"):
        features(encoder, IMAGES[:1], processor=wrong, cache=False)


def test_what_holds_no_encoder_is_refused(llava: Any) -> None:
    model, processor = llava
    with pytest.raises(DataError, match="no images"):
        features(model, [], processor=processor)
    with pytest.raises(SettingsError, match="pool is 'max'"):
        features(model, IMAGES, processor=processor, pool="max")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="image 1"):
        features(model, [IMAGES[0], b"no image"], processor=processor, workers=0)
    text = Qwen2Model(
        Qwen2Config(
            num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2
        )
    )
    with pytest.raises(ModelError, match="no vision tower"):
        features(text, IMAGES)
    encoder = find_adapter(model).extract()
    with pytest.raises(ModelError, match="No image processor was given"):
        features(encoder, IMAGES)
    with pytest.raises(ModelError, match="is an encoder by itself"):
        features(encoder, IMAGES, processor=processor, projected=True)
    with pytest.raises(ModelError, match="encoder by itself and has no language model"):
        pivot.optimize(encoder, [], processor=processor)


def test_a_processor_that_cuts_tiles_is_refused(make: Any) -> None:
    model, processor = make("internvl")
    who = subject(model, processor)
    tiled = type(who)(who.name, who.adapter, processor.image_processor, processor)
    with pytest.raises(ModelError, match=r"cuts images into tiles: 1 images gave \d views"):
        features(tiled, [Image.new("RGB", (200, 60))], cache=False)
