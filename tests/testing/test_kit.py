"""The conformance kit: the built-in families keep every promise, and an adapter that lies is found at it."""

import re
from functools import partial
from typing import Any

import pytest
import torch

from pivot_plugin.adapters import ImageFeatures, VisionAdapter
from pivot_plugin.models.find import find_adapter
from pivot_plugin.probes.patch_grid import WIDE, grid_finding, picture_features
from pivot_plugin.testing import Check, conformance, zoo

pytestmark = pytest.mark.slow


def test_a_built_in_family_keeps_every_promise(tiny: Any) -> None:
    model, processor = tiny
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    checks = conformance(model, processor)
    assert len(checks) == 10
    for check in checks:
        check.raise_on_failure()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def lies(adapter: VisionAdapter, **methods: Any) -> VisionAdapter:
    """The adapter with other methods."""
    kind = type("Lying", (type(adapter),), methods)
    return kind(adapter.model)


def failed(model: Any, processor: Any, adapter: VisionAdapter) -> dict[str, str]:
    checks = conformance(model, processor, adapter)
    return {check.name: check.reason for check in checks if check.result == "failed"}


def reordered(order: Any) -> Any:
    """A method `on_grid` that puts the patches in another order, by the rows and columns of the grid."""

    def on_grid(self: Any, *arguments: Any) -> list[ImageFeatures]:
        found = super(type(self), self).on_grid(*arguments)
        places = [torch.arange(len(one.values)).reshape(one.grid) for one in found]
        return [ImageFeatures(one.values[order(of).flatten()], one.grid) for one, of in zip(found, places, strict=True)]

    return on_grid


ORDERS = {
    "transposed": lambda of: of.flatten().reshape(of.shape[1], of.shape[0]).T,
    "turned by half": lambda of: of.flip(0, 1),
    "mirrored": lambda of: of.flip(1),
    "shifted by a row": lambda of: of.roll(1, 0),
    "shifted by a column": lambda of: of.roll(1, 1),
    "those of a corner": lambda of: of[torch.arange(of.shape[0]) // 2][:, torch.arange(of.shape[1]) // 2],
}
# one of each kind of tower: one picture size, rows of patches, blocks, windows, convolutions that overlap, tiles, a
# mask on a padded picture, positions, a border around the picture, a tower that merges by itself
TOWERS = (
    *("vipllava", "mistral3", "qwen3_vl_moe", "exaone4_5", "got_ocr2", "idefics3", "idefics2", "gemma4", "janus"),
    *("glm4v", "lfm3_vl", "unlimited_ocr"),
)
LARGE_GRIDS, SOME = ("got_ocr2", "gemma4"), ("transposed", "shifted by a row")


@pytest.mark.parametrize("name", TOWERS)
def test_patches_in_another_order_are_found_in_every_kind_of_tower(name: str) -> None:
    model, processor = zoo.build(name)
    right, image_processor = find_adapter(model), find_adapter(model).image_processor(processor)
    # of the large grids some orders only
    orders = {**ORDERS} if name not in LARGE_GRIDS else {order: ORDERS[order] for order in SOME}
    for order, permuted in {"right": None, **orders}.items():
        adapter = right if permuted is None else lies(right, on_grid=reordered(permuted))
        adapter.read_processor(processor)
        features = partial(picture_features, adapter, image_processor)
        finding = grid_finding(features, partial(adapter.shown_box, processor), WIDE)
        assert finding.result == ("verified" if permuted is None else "wrong"), (order, finding)


def test_blocks_and_windows_that_are_not_undone_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    promises = {"a lit patch shows in its own cell", "saliency looks at the view of the whole"}
    model, processor = zoo.build("exaone4_5")
    with monkeypatch.context() as patched:
        patched.setattr("pivot_plugin.adapters.grids._in_windows", lambda config: False)
        assert set(failed(model, processor, find_adapter(model))) == promises
    in_raster_order = lies(find_adapter(model), read_processor=lambda self, of: setattr(self, "in_blocks", False))
    assert set(failed(model, processor, in_raster_order)) == promises


@pytest.mark.parametrize("order", ["transposed", "shifted by a row"])
def test_a_wrong_grid_is_a_finding_of_the_kit(llava: Any, order: str) -> None:
    model, processor = llava
    found = failed(model, processor, lies(find_adapter(model), on_grid=reordered(ORDERS[order])))
    assert {"a lit patch shows in its own cell", "saliency looks at the view of the whole"} <= set(found)
    assert "on the 4x4 grid of a picture of 96x96 px" in found["a lit patch shows in its own cell"]


def test_a_tower_that_mixes_its_patches_is_not_verified(llava: Any) -> None:
    model, processor = llava

    def mixed(self: Any, *arguments: Any) -> list[ImageFeatures]:
        found = super(type(self), self).on_grid(*arguments)
        return [ImageFeatures(one.values.mean(0).expand_as(one.values), one.grid) for one in found]

    checks = conformance(model, processor, lies(find_adapter(model), on_grid=mixed))
    undecided = {check.name: check.reason for check in checks if check.result == "not verified"}
    assert set(undecided) == {"a lit patch shows in its own cell", "saliency looks at the view of the whole"}
    for reason in undecided.values():
        assert re.match("grid not verified: on the 4x4 grid .* so much does the model mix its patches", reason)
    assert "a lit patch shows in its own cell" not in {check.name for check in checks if check.result == "failed"}


def test_a_wrong_tile_is_found(make: Any) -> None:
    model, processor = make("llava_next")
    adapter = lies(find_adapter(model), whole_views=lambda self, inputs, counts: [1] * len(counts))
    found = failed(model, processor, adapter)
    assert set(found) == {"saliency looks at the view of the whole"}
    assert "patches show another place" in found["saliency looks at the view of the whole"]


def test_an_end_of_the_tiles_that_shows_a_crop_is_found() -> None:
    model, processor = zoo.build("cohere2_vision")
    lying = lies(find_adapter(model), read_processor=lambda self, of: setattr(self, "whole_view", "first"))
    found = failed(model, processor, lying)
    assert set(found) == {"saliency looks at the view of the whole"}


def test_a_projector_inside_the_tower_that_is_counted_as_tower_is_found(make: Any) -> None:
    model, processor = make("qwen2_vl")
    found = failed(model, processor, lies(find_adapter(model), projector_names=()))
    assert found["parts are found and disjoint"] == "no parameter belongs to the projector"


def test_a_picture_that_is_said_to_lie_elsewhere_on_the_grid_is_found() -> None:
    model, processor = zoo.build("janus")
    # it is put in the middle of a square, and not over all of it
    found = failed(model, processor, lies(find_adapter(model), shown_box=lambda self, of, size: (0.0, 0.0, 1.0, 1.0)))
    assert set(found) == {"a lit patch shows in its own cell", "saliency looks at the view of the whole"}
    assert "rows and +0.0 columns beside its patches" in found["a lit patch shows in its own cell"]


def test_a_family_that_cannot_be_served_is_one_finding_with_its_reason() -> None:
    (check,) = conformance(*zoo.build("mllama"))
    assert (check.name, check.result) == ("an adapter knows the model", "failed")
    assert "reads its images by cross-attention (cross_attention_mask)" in check.reason


def test_lora_on_too_many_and_on_too_few_layers_is_found(llava: Any) -> None:
    model, processor = llava
    right = find_adapter(model).lora_targets()
    unread = f"{find_adapter(model).unread_paths()[0]}.mlp.fc1"
    promise = "LoRA goes on the tower's linear layers that have a gradient"
    more = failed(model, processor, lies(find_adapter(model), lora_targets=lambda self: [*right, unread]))
    assert more == {promise: f"1 layers get LoRA and have no gradient, such as {unread}"}
    fewer = failed(model, processor, lies(find_adapter(model), lora_targets=lambda self: right[1:]))
    assert fewer == {promise: f"1 linear layers of the tower have a gradient and get no LoRA, such as {right[0]}"}


def test_layers_that_are_read_and_called_unread_are_found(llava: Any) -> None:
    model, processor = llava
    first = find_adapter(model).blocks()[0]
    found = failed(model, processor, lies(find_adapter(model), unread_paths=lambda self: (first,)))
    assert "called unread and have a gradient" in str(found) or "get no gradient" in str(found)
    assert "what has no gradient is what the adapter calls unread" in found


def test_wrong_positions_are_found(make: Any) -> None:
    model, processor = make("qwen2_5_vl")
    found = failed(model, processor, lies(find_adapter(model), positions=lambda self, tokens, images: None))
    assert list(found) == ["forest equals plain passes"]
    assert "the positions differ from token" in found["forest equals plain passes"]


def test_an_image_processor_that_crops_without_a_word_is_found(llava: Any) -> None:
    model, processor = llava

    def crops(self: Any, of: Any) -> Any:
        image_processor = super(type(self), self).image_processor(of)
        image_processor.do_center_crop = True
        image_processor.size = {"shortest_edge": 2 * image_processor.crop_size["height"]}
        return image_processor

    found = failed(model, processor, lies(find_adapter(model), image_processor=crops))
    assert "a lit patch shows in its own cell" in found


def test_an_adapter_that_raises_is_a_finding(llava: Any) -> None:
    model, processor = llava

    def broken(self: Any, *_: Any) -> Any:
        raise ZeroDivisionError("no luck")

    found = failed(model, processor, lies(find_adapter(model), patch_features=broken))
    assert "ZeroDivisionError: no luck (test_kit.py:" in found["a lit patch shows in its own cell"]


def test_a_model_that_nobody_knows_is_a_finding_too(llava: Any) -> None:
    model, processor = llava
    (check,) = conformance(model.get_encoder(modality="image"), processor)
    assert (check.name, check.result) == ("an adapter knows the model", "failed")
    with pytest.raises(AssertionError, match="is an encoder by itself"):
        check.raise_on_failure()
    assert str(Check("name", "passed", "reason")) == "name"
