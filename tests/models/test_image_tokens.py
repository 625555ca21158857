"""Which outputs of a processor are about images, and texts as tokens with their images expanded."""

from typing import Any

import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from pivot_plugin.errors import DataError, ModelError
from pivot_plugin.models.image_tokens import ImageTokens, about_images
from pivot_plugin.testing import zoo
from tests.helpers import Tiny, picture

TWO_SETS = [[picture(60, 60, 1)], [picture(120, 50, 2), picture(40, 80, 3)]]


def test_outputs_about_images_are_those_that_do_not_follow_the_text(tiny: Tiny) -> None:
    """A longer text about the same images changes every output about text, and none about images."""
    _, processor = tiny

    def processed(tail: str) -> dict[str, Any]:
        marker = processor.image_token
        return dict(
            processor(images=TWO_SETS, text=[marker + tail, marker * 2 + tail], padding=True, return_tensors="pt")
        )

    short, longer = processed(""), processed("and more words")
    following = {name for name in short if short[name].shape != longer[name].shape}
    assert {"input_ids", "attention_mask"} <= following
    assert set(about_images(short, processor)) == set(short) - following
    for name, value in about_images(short, processor).items():
        assert torch.equal(value, longer[name]), name


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_grid_of_the_shape_of_the_tokens_is_about_images(family: str, make: Any) -> None:
    """One image of three tokens: (1, 3) ids beside a (1, 3) grid of time, height and width."""
    _, processor = make(family)
    size = processor.image_processor.patch_size * processor.image_processor.merge_size
    image = picture(3 * size, size, 1)
    processor.image_processor.size = {"shortest_edge": size * size, "longest_edge": 64 * size * size}
    outputs = dict(processor(images=[[image]], text=[processor.image_token], return_tensors="pt"))
    assert outputs["image_grid_thw"].shape == outputs["input_ids"].shape == (1, 3)
    assert set(about_images(outputs, processor)) == {"pixel_values", "image_grid_thw"}


def test_token_types_are_those_of_the_processor(tiny: Tiny) -> None:
    """With images and without, against what TRL's collator makes of the processor's outputs."""
    _, processor = tiny
    rows = [
        {
            "images": TWO_SETS[1],
            "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a"}],
        },
        {"images": [], "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    ]
    image_tokens = ImageTokens(processor)
    for row in rows:
        expected = dict(DataCollatorForVisionLanguageModeling(processor)([row]))
        types = image_tokens.token_types(expected["input_ids"])
        per_token = {name for name, value in expected.items() if value.shape == expected["input_ids"].shape}
        assert types.keys() == per_token - {"input_ids", "attention_mask", "labels"}
        for name, values in types.items():
            assert torch.equal(values, expected[name]), name


def test_names_of_inputs_about_images_are_those_a_text_with_images_has(tiny: Tiny) -> None:
    _, processor = tiny
    outputs = processor(images=TWO_SETS, text=[processor.image_token, processor.image_token * 2], padding=True)
    assert ImageTokens(processor).image_names == set(outputs) - {"input_ids", "attention_mask"}


def test_expanded_prompts_are_what_the_processor_makes(tiny: Tiny) -> None:
    _, processor = tiny
    image_tokens = ImageTokens(processor)
    text = f"first {processor.image_token} then {processor.image_token}?"
    expected = processor(images=[TWO_SETS[1]], text=[text], add_special_tokens=False)["input_ids"][0]
    images = image_tokens.process_images([TWO_SETS[1]])
    expansions = images.expansions_of(0)
    assert expansions is not None
    assert image_tokens.expand({}, image_tokens.tokens(text), expansions) == list(expected)
    assert [part.count(image_tokens.image_token_id) for part in expansions] == images.counts[0]
    assert sum(images.counts[0]) == list(expected).count(image_tokens.image_token_id)
    row = {"images": TWO_SETS[1], "id": "row"}
    assert not image_tokens.whole_prompts
    assert not image_tokens.rewrites(row, text)
    whole = ImageTokens(processor, whole_prompts=True)
    processed = whole.process_images([TWO_SETS[1]], [text])
    assert whole.prompt(row, text, processed.expansions_of(0)) == list(expected)
    assert [sum(counts) for counts in processed.counts] == [sum(counts) for counts in images.counts]


def test_a_row_with_more_images_than_markers_is_named(llava: Tiny) -> None:
    image_tokens = ImageTokens(llava[1])
    with pytest.raises(DataError, match=r"Row 'seven' has 2 image\(s\) and 1 image marker\(s\)"):
        image_tokens.expand({"id": "seven"}, [image_tokens.marker_id], [[5], [5]])


def test_a_processor_of_another_model_is_refused(llava: Tiny) -> None:
    other = ImageTokens(llava[1]).image_token_id + 1
    with pytest.raises(ModelError, match=f"makes no token {other}, the model's image token, of"):
        ImageTokens(llava[1], other).process_images([TWO_SETS[0]])


def test_images_that_a_processor_can_put_into_no_batch_are_refused_with_their_sizes() -> None:
    if missing := zoo.missing_packages("perception_lm"):
        pytest.skip(f"needs {', '.join(missing)}")
    _, processor = zoo.build("perception_lm")
    with pytest.raises(ModelError, match="cannot put images of 240x96, 384x384 px into one batch"):
        ImageTokens(processor).process_images([[Image.new("RGB", (240, 96))], [Image.new("RGB", (384, 384))]])
