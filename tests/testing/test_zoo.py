"""Every family of the zoo: it builds, its processor and its model work together, and a picture makes a difference."""

import functools
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from pivot_plugin.testing import FAMILIES as BUILT_IN
from pivot_plugin.testing import zoo
from pivot_plugin.testing.zoo_traits import prompt_inputs, traits

pytestmark = pytest.mark.slow

LARGEST = 2_000_000


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (84, 120, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(params=list(zoo.FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    """Every family that can be built here, in turn."""
    if missing := zoo.missing_packages(request.param):
        pytest.skip(f"needs {', '.join(missing)}")
    return request.param


@functools.lru_cache(maxsize=1)
def built(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    return zoo.build(name)


@torch.no_grad()
def logits(name: str, *pictures: Image.Image) -> torch.Tensor:
    model, processor = built(name)
    return model(**prompt_inputs(model, processor, pictures)).logits


def test_it_answers_a_question_about_a_picture(name: str) -> None:
    answer = logits(name, picture(0))
    model, _ = built(name)
    assert answer.shape[0] == 1
    assert answer.shape[-1] >= len(built(name)[1].tokenizer)
    assert torch.isfinite(answer).all()
    assert model.dtype == torch.float32
    assert not model.training


def test_another_picture_makes_another_answer(name: str) -> None:
    first, second = logits(name, picture(0)), logits(name, picture(1))
    assert first.shape == second.shape
    # of what comes next, which is not a place that holds an image
    assert (first[0, -1] - second[0, -1]).abs().max() > 1e-3


def test_the_same_picture_makes_the_same_answer(name: str) -> None:
    assert torch.equal(logits(name, picture(0)), logits(name, picture(0)))


def test_padding_changes_nothing(name: str) -> None:
    model, processor = built(name)
    inputs = prompt_inputs(model, processor, [picture(0)])
    length = inputs["input_ids"].shape[1]
    about_text = {key for key in inputs if key in ("input_ids", "attention_mask") or key.endswith("token_type_ids")}
    others = {key: value for key, value in inputs.items() if key not in about_text and isinstance(value, torch.Tensor)}
    if model.config.is_encoder_decoder or any(value.ndim > 1 and value.shape[1] == length for value in others.values()):
        pytest.skip("further inputs run along the prompt")
    padded = {key: torch.nn.functional.pad(inputs[key], (0, 3)) for key in about_text}
    with torch.no_grad():
        expected = model(**inputs).logits
        answer = model(**{**inputs, **padded}).logits
    # what comes before the prompt, where a family puts the image there
    assert torch.allclose(answer[:, : expected.shape[1]], expected, atol=1e-3)


def test_a_seed_stands_for_its_weights_and_leaves_the_random_state(name: str) -> None:
    model, _ = built(name)
    state = torch.random.get_rng_state()
    same, other = zoo.build(name)[0], zoo.build(name, seed=1)[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    weights, others = model.state_dict(), other.state_dict()
    assert all(torch.equal(weight, weights[key]) for key, weight in same.state_dict().items())
    assert any(not torch.equal(weight, weights[key]) for key, weight in others.items())


def test_it_is_tiny_but_has_three_layers_of_language(name: str) -> None:
    model, _ = built(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # timm makes the towers of its own families, and how small they can be
    assert parameters < LARGEST or "timm" in zoo.FAMILIES[name].needs
    text = model.config.get_text_config(decoder=True)
    depth = next(
        depth
        for key in ("num_hidden_layers", "num_layers", "decoder_layers", "layers")
        if (depth := getattr(text, key, None)) is not None
    )
    assert depth >= 3


def test_its_class_and_its_processor_are_the_familys_own(name: str) -> None:
    model, processor = built(name)
    family = zoo.FAMILIES[name]
    assert type(model).__name__ == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family.model_type]
    assert type(processor).__module__.startswith("transformers.models.")
    assert hasattr(processor, "image_processor")


def test_every_image_feature_has_its_token(name: str) -> None:
    found = traits(*built(name), picture(0))
    if not found.image_tokens or not found.image_features.startswith("("):
        pytest.skip("images do not stand in the prompt, or their features cannot be asked for alone")
    shapes = re.findall(r"\(([\d, ]+)\)", found.image_features)
    features = sum(int(np.prod([int(size) for size in shape.split(",")][:-1])) for shape in shapes)
    counts = found.image_tokens.values()
    # the embeddings of marks around an image may be replaced as well; and each feature may have a token of its own
    assert features == (sum(counts) if max(counts) == 1 else max(counts))


def test_every_image_text_to_text_class_has_a_place() -> None:
    known = {family.model_type for family in zoo.FAMILIES.values()} | set(zoo.UNSUPPORTED) | set(BUILT_IN)
    new = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - known)
    assert not new, f"add to the zoo's table, or to UNSUPPORTED with the reason: {new}"
    assert not set(zoo.FAMILIES) & set(zoo.UNSUPPORTED)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert zoo.missing_packages("fast_vlm") == ["timm"]
    assert zoo.missing_packages("vipllava") == []


def test_a_gate_that_starts_closed_is_open() -> None:
    model, _ = zoo.build("mllama")
    gates = [value for key, value in model.named_parameters() if key.endswith("cross_attn_attn_gate")]
    assert gates
    assert all(gate.item() == 0.5 for gate in gates)
