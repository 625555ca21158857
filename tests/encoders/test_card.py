"""The card's snippet is what a reader copies: it runs with transformers alone and reads the layer that was trained."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    LlavaImageProcessor,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.utils import ModelOutput

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.encoders import save_encoder
from pivot_plugin.encoders.card import card
from pivot_plugin.encoders.compatibility import checked_releases
from pivot_plugin.encoders.contract import contract
from pivot_plugin.models.find import find_adapter
from tests.helpers import picture

IMAGE = picture(84, 56, 1)


def read_as_the_card_says(folder: Path) -> torch.Tensor:
    """What the first snippet of a card calls features."""
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert snippet is not None and "pivot" not in snippet[1]
    names: dict[str, Any] = {"image": IMAGE}
    with torch.no_grad():
        exec(snippet[1].replace("<this repository>", str(folder)), names)
    features: torch.Tensor = names["features"]
    return features


def read_by(adapter: VisionAdapter, processor: Any) -> torch.Tensor:
    inputs = adapter.image_processor(processor)(images=[IMAGE], return_tensors="pt")
    with torch.no_grad():
        return adapter.hidden_state(adapter.run_tower(adapter.tower, inputs))


def test_the_snippet_of_every_family_reads_what_the_model_reads(tiny: Any, tmp_path: Path) -> None:
    model, processor = tiny
    adapter = find_adapter(model)
    folder = save_encoder(adapter, processor, tmp_path / "encoder", {})
    torch.testing.assert_close(read_as_the_card_says(folder), read_by(adapter, processor))


class Mine(VisionAdapter):
    """Of a plugin, for a model whose tower wants the grid of its patches; not built upon an adapter of ours."""

    family = "mine"

    def run_tower(self, tower: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> ModelOutput:
        return tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])


@pytest.mark.parametrize("built_like", ["qwen2_5_vl", "qwen3_vl"])
def test_a_plugin_s_tower_that_wants_a_grid_gets_a_snippet_that_runs(
    built_like: str, make: Any, tmp_path: Path
) -> None:
    model, processor = make(built_like)
    adapter = Mine(model)
    folder = save_encoder(adapter, processor, tmp_path / "encoder", {})
    torch.testing.assert_close(read_as_the_card_says(folder), read_by(adapter, processor))


def test_a_plugin_may_say_itself_how_its_tower_is_read(llava: Any, tmp_path: Path) -> None:
    class Pooled(VisionAdapter):
        def usage(self) -> str:
            return 'features = encoder(inputs["pixel_values"]).pooler_output'

    folder = save_encoder(Pooled(llava[0]), llava[1], tmp_path / "encoder", {})
    assert read_as_the_card_says(folder).shape == (1, 32)


def contract_of(folder: Path) -> dict[str, str]:
    """The rows of a card's contract; it stands before the first snippet."""
    text = (folder / "README.md").read_text()
    above = text[: text.index("```python")]
    return dict(re.findall(r"^\| (goes in|comes out|read|checked in) \| (.*) \|$", above, re.MULTILINE))


def test_the_contract_says_that_an_image_is_put_on_a_square(llava: Any, tmp_path: Path) -> None:
    model, processor = llava
    of_model = processor.image_processor
    square = LlavaImageProcessor(do_pad=True, size=of_model.size, crop_size=of_model.crop_size)
    said = []
    for image_processor in (of_model, square):
        bare = SimpleNamespace(image_processor=image_processor)
        said.append(contract_of(save_encoder(find_adapter(model), bare, tmp_path / "encoder", {}))["goes in"])
    assert "square" not in said[0]
    assert said[1].startswith("RGB images; put in the middle of a square of the mean colour; resized")


def test_the_contract_says_what_the_features_are(tiny: Any, tmp_path: Path) -> None:
    model, processor = tiny
    adapter = find_adapter(model)
    rows = contract_of(save_encoder(adapter, processor, tmp_path / "encoder", {}))
    assert rows.keys() == {"goes in", "comes out", "read", "checked in"}
    images = adapter.image_processor(processor)
    for value in (*images.image_mean, *images.image_std):
        assert f"{value:.6g}" in rows["goes in"]
    features = read_by(adapter, processor)
    expected = ", ".join(map(str, features.shape[1:])) if features.ndim == 3 else f"{features.shape[-1]}), in"
    assert expected in rows["comes out"]
    depth, layer = len(adapter.blocks()), adapter.feature_layer
    assert f"block {depth if layer in (None, -1) else depth + 1 + layer} of {depth}" in rows["read"]
    releases = checked_releases(adapter.tower.config.model_type)
    assert len(releases) >= 4
    assert f"transformers {', '.join(releases)}" in rows["checked in"]


def test_the_contract_tells_a_norm_that_was_passed_from_one_that_was_not() -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    images = SiglipImageProcessor(size={"height": 28, "width": 28})
    siglip = SiglipVisionModel(SiglipVisionConfig(**small, image_size=28, patch_size=14)).eval()
    for layer, words in (
        (None, "behind the norm `post_layernorm`, which follows block 2 of 2"),
        (-1, "behind block 2 of 2, before the norm `post_layernorm`"),
        (1, "behind block 1 of 2, before the norm `post_layernorm`"),
    ):
        siglip.config.vision_feature_layer = layer
        found = contract(siglip, images)
        assert found is not None
        assert found["layer"] == words
        assert found["out"] == "(images, 4, 32): 2 x 2 patches in raster order"
        assert "to 28 x 28, not keeping the aspect ratio" in found["in"]
        assert "times 0.00392157; less mean (0.5, 0.5, 0.5)" in found["in"]


def test_a_tower_of_others_says_where_it_was_checked(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = ViTModel(ViTConfig(**small, image_size=28, patch_size=14)).eval()
    adapter = find_adapter(encoder, encoder=True)
    processor = SimpleNamespace(image_processor=ViTImageProcessor(size={"height": 28, "width": 28}))
    rows = contract_of(save_encoder(adapter, processor, tmp_path / "encoder", {}))
    assert rows["checked in"] == f"the transformers it was saved with (`{transformers.__version__}`) alone"


def test_the_card_draws_the_way_of_an_image_with_its_sizes(tiny: Any, tmp_path: Path) -> None:
    model, processor = tiny
    adapter = find_adapter(model)
    folder = save_encoder(adapter, processor, tmp_path / "encoder", {})
    drawn = re.search(r"```text\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    assert drawn is not None
    stations = dict(line.split(maxsplit=1) for line in drawn[1].splitlines() if line.strip() != "|")
    assert list(stations) == ["image", "pixel_values", "patches", "features"]
    image = IMAGE.resize((224, 160))
    assert stations["image"] == "for example 224 x 160"
    inputs = adapter.image_processor(processor)(images=[image], return_tensors="pt")
    assert stations["pixel_values"] == str(list(inputs["pixel_values"].shape))
    with torch.no_grad():
        features = adapter.hidden_state(adapter.run_tower(adapter.tower, inputs))
    assert stations["features"].startswith(f"{list(features.shape)}  (")
    rows, columns = map(int, re.findall(r"\d+", stations["patches"]))
    others = features.shape[-2] - rows * columns
    assert others in (0, 1)
    assert ("patches" in stations["features"].split(" dim)")[0]) is (others == 0)


def test_what_a_record_draws_stays_inside_its_block() -> None:
    drawn = {"in": "a", "out": "b", "layer": "c", "releases": [], "notes": [], "flow": ["image", "```\n# mine"]}
    text = str(card({"contract": drawn}))
    assert "\n# mine" not in text and "''' # mine\n```" in text
