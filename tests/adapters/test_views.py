"""What image processors show of a picture, measured: against what is known of each by its settings."""

import pytest
import torch
from PIL import Image
from transformers import LlavaImageProcessor

from pivot_plugin.adapters.views import (
    one_view_processor,
    patches_in_blocks,
    shown_box,
    stacked_views,
    views_of_each,
    whole_end,
)
from pivot_plugin.errors import ModelError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.image_tokens import about_images
from pivot_plugin.testing import zoo
from pivot_plugin.testing.zoo_processors import zoo_processor
from tests.helpers import picture


def image_processor(family: str) -> object:
    if missing := zoo.missing_packages(family):
        pytest.skip(f"needs {', '.join(missing)}")
    return zoo_processor(zoo.FAMILIES[family]).image_processor


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("llava_next_video", "first"),
        ("granite4_vision", "first"),
        ("perception_lm", "first"),
        ("molmo2", "first"),
        ("ovis2", "first"),
        ("idefics3", "last"),
        ("smolvlm", "last"),
        ("cohere2_vision", "last"),
        ("aya_vision", "last"),
        ("mistral3", None),
        ("glm4v", None),
    ],
)
def test_the_tile_that_shows_the_whole_is_found(family: str, end: str | None) -> None:
    assert whole_end(image_processor(family), 56) == end


def test_tiles_of_which_none_shows_the_whole_are_refused() -> None:
    class Halves:
        """Cuts a picture into its left and its right half."""

        def __call__(self, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
            values = torch.tensor(list(images[0].convert("L").tobytes()), dtype=torch.float32)
            across, down = images[0].size
            halves = values.reshape(down, 2, across // 2).transpose(0, 1)
            return {"pixel_values": halves[:, None].expand(-1, 3, -1, -1)}

    with pytest.raises(ValueError, match="of 2 views neither the first nor the last"):
        whole_end(Halves(), 16)


@pytest.mark.parametrize(
    "family",
    [
        *("llava_next_video", "granite4_vision", "perception_lm", "ovis2", "idefics3", "cohere2_vision", "aya_vision"),
        *("gemma3", "got_ocr2", "aria", "video_llava"),
    ],
)
def test_what_is_published_shows_a_picture_in_one_view(family: str) -> None:
    whole = one_view_processor(image_processor(family), clip=False)
    for size in ((160, 96), (60, 200)):
        pixels = next(v for n, v in whole(images=[picture(*size, 1)], return_tensors="pt").items() if n[:5] == "pixel")
        assert pixels.shape[:2] == (1, 3), family


def test_a_picture_put_on_a_square_leaves_a_border_beyond_its_edges() -> None:
    model, processor = zoo.build("janus")
    box = find_adapter(model).shown_box(processor, (160, 96))
    # 32 of 96 pixels above, and as many below
    assert box == pytest.approx((0, -1 / 3, 1, 4 / 3), abs=0.02)
    assert find_adapter(model).shown_box(processor, (96, 160)) == pytest.approx((-1 / 3, 0, 4 / 3, 1), abs=0.02)
    assert find_adapter(model).shown_box(processor, (96, 96)) == (0, 0, 1, 1)


def test_a_picture_that_is_put_on_a_square_and_then_cut_loses_nothing() -> None:
    model, processor = zoo.build("vipllava")
    crop = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    processor.image_processor = LlavaImageProcessor(do_pad=True, **crop)
    # 32 of 96 pixels above, and as many below; a crop of the square is all of it
    box = find_adapter(model).shown_box(processor, (160, 96))
    assert box == pytest.approx((0, -1 / 3, 1, 4 / 3), abs=0.02)
    processor.image_processor = LlavaImageProcessor(do_pad=False, **crop)
    assert find_adapter(model).shown_box(processor, (160, 96)) == pytest.approx((0.2, 0, 0.8, 1), abs=1e-9)


def test_a_patch_that_a_picture_fills_in_part_is_shown_whole() -> None:
    model, processor = zoo.build("aria")
    # 980 x 588 pixels, of patches of 70
    assert find_adapter(model).shown_box(processor, (160, 96)) == pytest.approx((0, 0, 1, 9 * 70 / 588), abs=0.01)


def test_a_crop_is_measured_as_its_settings_say() -> None:
    model, processor = zoo.build("vipllava")
    whole = processor.image_processor
    assert whole.do_center_crop
    measured = shown_box(whole, (160, 96), (14, 14), model.config.vision_config)
    assert measured == pytest.approx((0.2, 0, 0.8, 1), abs=0.01)
    assert find_adapter(model).shown_box(processor, (160, 96)) == pytest.approx((0.2, 0, 0.8, 1), abs=1e-9)


def test_views_are_counted_by_what_the_processor_says() -> None:
    tiles = torch.zeros(2, 3, 3, 4, 4)
    tiles[0, :3], tiles[1, :1] = 1, 1
    assert views_of_each({"pixel_values": tiles}) == [3, 1]
    assert stacked_views(tiles).shape == (4, 3, 4, 4)
    flat = torch.ones(6, 3, 4, 4)
    assert views_of_each({"pixel_values": flat, "num_patches": torch.tensor([1, 5])}, [7, 7]) == [1, 5]
    # a grid of tiles, and the whole beside it where there are several
    assert views_of_each({"pixel_values": flat, "grids": torch.tensor([[2, 2], [1, 1]])}, [7, 7]) == [5, 1]
    assert views_of_each({"pixel_values": flat}, [4, 20]) == [1, 5]
    assert views_of_each({"pixel_values": flat}, [9]) == [6]
    assert views_of_each({"pixel_values": flat}, [4, 7]) is None
    assert views_of_each({"pixel_values": torch.ones(16, 12), "image_grid_thw": torch.tensor([[1, 4, 4]])}) is None


def test_which_tile_shows_the_whole_is_not_guessed() -> None:
    model, processor = zoo.build("cohere2_vision")
    adapter = find_adapter(model)
    text = processor.image_token
    outputs = processor(images=[[picture(160, 96, 1)]], text=[text], return_tensors="pt")
    images = about_images(outputs, processor)
    count = int((outputs["input_ids"] == adapter.image_token_id).sum())
    with pytest.raises(ModelError, match="which one shows the whole is not known"):
        adapter.whole_views(images, [count])
    adapter.read_processor(processor)
    assert adapter.whole_views(images, [count]) == [len(images["pixel_values"]) - 1]


@pytest.mark.parametrize(
    ("family", "in_blocks"),
    [("glm4v", True), ("exaone4_5", True), ("kimi_k25", False), ("paddleocr_vl", False), ("hunyuan_vl", False)],
)
def test_the_order_of_patches_is_seen_in_a_picture_that_grows_brighter(family: str, in_blocks: bool) -> None:
    model, processor = zoo.build(family)
    tower = find_adapter(model).tower.config
    assert patches_in_blocks(processor.image_processor, tower) is in_blocks
    assert patches_in_blocks(image_processor("mistral3"), tower) is None


def test_an_image_processor_that_takes_no_picture_is_named() -> None:
    model, _ = zoo.build("mistral3")

    def broken(images: object, return_tensors: str) -> dict[str, torch.Tensor]:
        raise KeyError("depth")

    with pytest.raises(ModelError, match=r"What function shows of an image is not known.*KeyError: 'depth'"):
        find_adapter(model).read_processor(broken)


def test_a_processor_is_measured_once_for_each_size_and_again_when_its_settings_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = zoo.build("idefics2")
    adapter = find_adapter(model)
    kind, calls = type(processor.image_processor), []
    process = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *given, **named: calls.append(1) or process(*given, **named))
    sizes = [(90 + 4 * number, 60) for number in range(20)]
    boxes = {size: adapter.shown_box(processor, size) for size in sizes}
    adapter.read_processor(processor)
    measured = len(calls)
    for number in range(200):
        adapter.read_processor(processor)
        assert adapter.shown_box(processor, sizes[number % 20]) == boxes[sizes[number % 20]]
    assert len(calls) == measured <= 20 * 12
    processor.image_processor.size = {"longest_edge": 70, "shortest_edge": 56}
    adapter.shown_box(processor, sizes[0])
    adapter.read_processor(processor)
    assert len(calls) > measured
