"""Exports are read by the other side: timm by itself, the repositories' classes by their names and shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlavaImageProcessor,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pivot_plugin.encoders import export
from pivot_plugin.encoders.compatibility import save_model
from pivot_plugin.errors import EncoderError, SettingsError

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14}
INTERN = {**SMALL, "image_size": [56, 56], "patch_size": [14, 14], "attention_bias": True}
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def clip(**settings: Any) -> PreTrainedModel:
    return randomised(CLIPVisionModel(CLIPVisionConfig(**{**SMALL, "image_size": 56, **settings})))


def siglip(**settings: Any) -> PreTrainedModel:
    return randomised(SiglipVisionModel(SiglipVisionConfig(**{**SMALL, "image_size": 56, **settings})))


def intern(**settings: Any) -> PreTrainedModel:
    return randomised(InternVLVisionModel(InternVLVisionConfig(**{**INTERN, **settings})))


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Every parameter away from zeros and ones, so that none can be left out or exchanged unseen."""
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=drawn) * 0.1)
    return model.eval()


def images(side: int = 56) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


@torch.no_grad()
def hidden(encoder: PreTrainedModel, layer: int | None) -> torch.Tensor:
    outputs = encoder(PIXELS, output_hidden_states=layer is not None)
    return outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]


@pytest.mark.parametrize("layer", [None, -1, -2])
@pytest.mark.parametrize(
    "make",
    [
        clip,
        lambda: clip(hidden_act="gelu"),
        siglip,
        lambda: siglip(vision_use_head=False),
        intern,
        lambda: intern(attention_bias=False),
    ],
    ids=["clip", "clip-gelu", "siglip", "siglip-headless", "internvit", "internvit-without-bias"],
)
@torch.no_grad()
def test_timm_computes_the_features_that_are_in_use(make: Any, layer: int | None, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    encoder = make()
    encoder.config.vision_feature_layer = layer
    if layer is not None and encoder.config.model_type == "internvl_vision":
        pytest.skip("read at its output, by every InternVL")
    written = export(encoder, "timm", tmp_path / "timm", image_processor=images())
    model = timm.create_model(f"local-dir:{written.folder}", pretrained=True).eval()
    features = eval(written.settings["features"], {"model": model, "images": PIXELS})
    expected = hidden(encoder, layer)[:, -16:]
    assert (features - expected).abs().max() < 1e-5


@torch.no_grad()
def test_timm_pools_as_the_encoder_does(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    for name, encoder in (("clip", clip()), ("siglip", siglip())):
        written = export(encoder, "timm", tmp_path / name, image_processor=images())
        model = timm.create_model(f"local-dir:{written.folder}", pretrained=True).eval()
        assert (model(PIXELS) - encoder(PIXELS).pooler_output).abs().max() < 1e-5


def test_timm_prepares_images_with_the_same_numbers(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    processor = images()
    written = export(clip(), "timm", tmp_path / "timm", image_processor=processor)
    told = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{written.folder}", pretrained=True))
    assert list(told["mean"]) == pytest.approx(list(processor.image_mean))
    assert list(told["std"]) == pytest.approx(list(processor.image_std))
    assert told["input_size"] == (3, 56, 56)
    assert (told["interpolation"], told["crop_mode"], told["crop_pct"]) == ("bicubic", "center", 1.0)


def test_timm_puts_images_on_a_square_where_the_encoder_does(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    processor = LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_mean=[0.4, 0.5, 0.6]
    )
    written = export(clip(), "timm", tmp_path / "timm", image_processor=processor)
    told = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{written.folder}", pretrained=True))
    image = Image.new("RGB", (112, 56), (250, 20, 90))
    theirs = timm.data.create_transform(**told)(image)
    ours = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    # a level of rounding, and the rows into which resizing mixes the border
    apart = (theirs - ours).abs().amax(dim=(0, 2))
    assert apart.max() < 2.0
    assert torch.cat([apart[:10], apart[18:38], apart[46:]]).max() < 0.03


class FusedAttention(nn.Module):
    """Attention of InternVL's own InternVisionModel, by the shapes of its modules."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q * (width // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(rows, tokens, width))


class InternBlock(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        width = settings["hidden_size"]
        self.attn = FusedAttention(width, settings["num_attention_heads"])
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, settings["intermediate_size"]),
                "fc2": nn.Linear(settings["intermediate_size"], width),
            }
        )
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=settings["layer_norm_eps"]) for _ in range(2))
        self.ls1, self.ls2 = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))) * self.ls2


class InternVision(nn.Module):
    """The repository's InternVisionModel with its modules' names, as far as an inference needs it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        width, patch = settings["hidden_size"], settings["patch_size"]
        positions = (settings["image_size"] // patch) ** 2 + 1
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, positions, width))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(InternBlock(settings) for _ in range(settings["num_hidden_layers"]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.embeddings.class_embedding.expand(len(x), -1, -1), x], dim=1)
        x = x + self.embeddings.position_embedding
        for layer in self.encoder.layers:
            x = layer(x)
        return x


@torch.no_grad()
def test_internvls_own_class_computes_the_same(tmp_path: Path) -> None:
    encoder = intern()
    written = export(encoder, "internvl", tmp_path / "internvl", image_processor=images())
    theirs = InternVision(json.loads((written.folder / "config.json").read_text())).eval()
    theirs.load_state_dict(load_file(written.folder / "model.safetensors"))
    assert (theirs(PIXELS) - hidden(encoder, None)).abs().max() < 1e-5


def test_llava_next_takes_a_clip_as_it_is(tmp_path: Path) -> None:
    encoder = clip()
    encoder.config.vision_feature_layer = 2
    written = export(encoder, "llava-next", tmp_path / "next", image_processor=images())
    names = load_file(written.folder / "model.safetensors")
    assert {name.removeprefix("vision_model.") for name in names} == set(encoder.state_dict())
    assert all(name.startswith("vision_model.") for name in names)
    assert written.settings["mm_vision_select_layer"] == -2
    again = CLIPVisionModel.from_pretrained(written.folder)
    assert torch.equal(hidden(again, 2), hidden(encoder, 2))


@pytest.mark.parametrize(("layer", "written_blocks"), [(None, 4), (-1, 4), (-2, 3), (1, 2)])
@torch.no_grad()
def test_the_block_that_llava_next_deletes_of_a_siglip_is_accounted_for(
    layer: int | None, written_blocks: int, tmp_path: Path
) -> None:
    wide = {"hidden_size": 1152, "image_size": 384, "intermediate_size": 8, "num_attention_heads": 16}
    encoder = siglip(**wide)
    encoder.config.vision_feature_layer = layer
    written = export(encoder, "llava-next", tmp_path / "next", image_processor=SiglipImageProcessor())
    assert any("deletes" in note for note in written.notes)
    theirs = SiglipVisionModel.from_pretrained(written.folder).eval()
    assert len(theirs.encoder.layers) == written_blocks
    # what llava/model/multimodal_encoder/siglip_encoder.py does after loading
    del theirs.encoder.layers[-1:]
    pixels = torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(3))
    states: list[torch.Tensor] = []
    theirs.encoder.layers[-1].register_forward_hook(lambda _, __, output: states.append(output))
    theirs(pixels)
    ours = encoder(pixels, output_hidden_states=True).hidden_states[-1 if layer is None else layer]
    assert (states[0] - ours).abs().max() < 1e-5


def test_transformers_4_gets_its_names(tmp_path: Path) -> None:
    encoder = siglip()
    written = export(encoder, "transformers-4", tmp_path / "four", image_processor=SiglipImageProcessor())
    assert all(name.startswith("vision_model.") for name in load_file(written.folder / "model.safetensors"))
    assert json.loads((written.folder / "config.json").read_text())["torch_dtype"] == "float32"
    again = SiglipVisionModel.from_pretrained(written.folder)
    assert torch.equal(again(PIXELS).pooler_output, encoder(PIXELS).pooler_output)


@pytest.mark.parametrize(
    ("make", "target", "reason"),
    [
        (lambda: clip(layer_norm_eps=1e-3), "timm", "layer_norm_eps is 0.001"),
        (lambda: clip(hidden_act="relu"), "timm", "activation 'relu'"),
        (lambda: intern(use_mean_pooling=False), "timm", "norm behind its last block"),
        (lambda: intern(use_qk_norm=True), "timm", "queries and keys are normed"),
        (clip, "internvl", "this is of type clip_vision_model"),
        (lambda: intern(use_mean_pooling=False), "internvl", "norm behind its last block"),
        (intern, "llava-next", "this is of type internvl_vision"),
        (siglip, "llava-next", "hidden_size 1152 built in, this has 32"),
    ],
)
def test_a_target_that_cannot_hold_the_tower_refuses_it(make: Any, target: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=reason):
        export(make(), target, tmp_path / "out", image_processor=images())
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="export target 'tim'"):
        export(clip(), "tim", tmp_path / "out", image_processor=images())  # type: ignore[arg-type]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    with pytest.raises(SettingsError, match="not empty"):
        export(clip(), "timm", tmp_path / "full", image_processor=images())


def test_a_folder_is_exported_as_its_encoder_is(tmp_path: Path) -> None:
    encoder = clip()
    save_model(encoder, tmp_path / "encoder")
    images().save_pretrained(tmp_path / "encoder")
    one = export(tmp_path / "encoder", "timm", tmp_path / "one")
    two = export(encoder, "timm", tmp_path / "two", image_processor=images())
    first, second = (load_file(written.folder / "model.safetensors") for written in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((one.folder / "export.json").read_text())["encoder"] == "encoder"
