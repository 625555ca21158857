"""An encoder is known by its features of two pictures, and is not changed by being looked at."""

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from pivot_plugin.encoders.signature import differs, signature

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def encoder() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=56, patch_size=14, attention_dropout=0.5))


def processor(side: int) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def test_the_signature_is_the_same_each_time_and_another_for_other_weights() -> None:
    tower = encoder().train()
    first = signature(tower, processor(56))
    assert differs(first, signature(tower, processor(56))) is None
    with torch.no_grad():
        tower.get_parameter("encoder.layers.0.mlp.fc1.weight").mul_(1.5)
    assert "apart" in str(differs(first, signature(tower, processor(56))))


def test_an_encoder_keeps_its_mode_also_when_it_cannot_read_the_pictures() -> None:
    tower = encoder().train()
    tower.encoder.layers[0].eval()
    before = {name: module.training for name, module in tower.named_modules()}
    signature(tower, processor(56))
    assert {name: module.training for name, module in tower.named_modules()} == before
    with pytest.raises(ValueError, match="size"):
        signature(tower, processor(28))
    assert {name: module.training for name, module in tower.named_modules()} == before
