"""The card's snippet is what a reader copies: it runs with transformers alone and reads the layer that was trained."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.encoders import save_encoder
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
