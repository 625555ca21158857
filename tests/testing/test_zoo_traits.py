"""What `traits` finds by running a model, against what the modelling code of these families is known to do."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from pivot_plugin.testing import build as build_built_in
from pivot_plugin.testing import zoo
from pivot_plugin.testing.zoo_traits import Traits, prompt_inputs, traits

pytestmark = pytest.mark.slow

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (84, 120, 3), dtype=np.uint8))


def found(name: str) -> Traits:
    return traits(*zoo.build(name), PICTURE)


@pytest.mark.parametrize(
    ("name", "token"), [("vipllava", "<image>"), ("gemma3", "<image_soft_token>"), ("aya_vision", "<|IMG_PATCH|>")]
)
def test_the_token_of_an_image_feature_is_found_by_what_it_does(name: str, token: str) -> None:
    model, processor = zoo.build(name)
    token_id = processor.tokenizer.convert_tokens_to_ids(token)
    ids = prompt_inputs(model, processor, [PICTURE])["input_ids"]
    assert traits(model, processor, PICTURE).image_tokens == {token_id: int((ids == token_id).sum())}


def test_pictures_beside_the_prompt_have_no_tokens_in_it() -> None:
    # cross-attention; only the place of the picture is in the prompt, as an ordinary token
    assert found("mllama").image_tokens == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vipllava", "no"), ("gemma3", "inside images"), ("molmo2", "inside images"), ("glm4v", "no")],
)
def test_what_a_token_sees_is_found_by_its_gradient(name: str, expected: str) -> None:
    assert found(name).looks_ahead == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vipllava", "plain"),
        # text_config.logit_scale, which Cohere2Vision's forward leaves out
        ("cohere2_vision", "plain"),
        # text_config.logits_scaling of 4, which the fused head of a trainer has to know
        ("granite_docling", "scaled by 0.25"),
    ],
)
def test_a_factor_on_the_logits_is_found(name: str, expected: str) -> None:
    assert found(name).head == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glm4v", {"rope_index": True, "position_axes": 3, "experts": False}),
        ("qwen3_vl_moe", {"rope_index": True, "position_axes": 3, "experts": True}),
        ("vipllava", {"rope_index": False, "experts": False}),
        ("qwen3_5", {"layer_types": ("linear_attention", "linear_attention", "full_attention")}),
        ("gemma3", {"layer_types": ("sliding_attention", "sliding_attention", "full_attention"), "window": 16}),
        ("deepseek_vl_hybrid", {"other_towers": ("model.high_res_vision_model",)}),
        ("vipllava", {"other_towers": (), "tower": ("CLIPVisionModel", "model.vision_tower")}),
        ("instructblip", {"no_image": False}),
    ],
)
def test_what_the_language_model_is(name: str, expected: dict[str, Any]) -> None:
    answer = found(name)
    assert {key: getattr(answer, key) for key in expected} == expected


def test_the_built_in_families_can_be_asked_as_well() -> None:
    answer = traits(*build_built_in("qwen2_vl"), PICTURE)
    assert answer.position_axes == 3
    assert answer.rope_index
    assert answer.two_images
    assert answer.no_image
