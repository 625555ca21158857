"""The segmentation probe: labels of patches by hand, a mask grid that is known, chance, and masks that do not fit."""

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.probes import Masked, masked_images, patch_labels, segmentation_probe, subject
from pivot_plugin.probes.extraction import centre_square
from pivot_plugin.probes.segmentation import _counts, _Patches
from tests.helpers import picture


def test_patches_are_labelled_by_what_they_show() -> None:
    mask = np.zeros((4, 4), dtype=np.uint8)
    mask[:2, 2:] = 5
    mask[3, 0] = 7
    present, counts = patch_labels(mask, (2, 2))
    assert present.tolist() == [0, 5, 7]
    # 16 x 16 samples of each patch of 2 x 2 pixels
    assert counts.tolist() == [[256, 0, 0], [0, 256, 0], [192, 0, 64], [256, 0, 0]]


def test_only_the_central_square_counts() -> None:
    mask = np.full((4, 8), 3, dtype=np.int64)
    mask[:, 2:4], mask[:, 4:6] = 1, 2
    present, counts = patch_labels(mask, (1, 2), image_size=(8, 4))
    assert present.tolist() == [1, 2]
    assert (counts > 0).tolist() == [[True, False], [False, True]]


def test_a_value_that_is_no_class_is_left_out() -> None:
    mask = np.array([[255, 255, 1, 1]] * 4, dtype=np.uint8)
    present, counts = patch_labels(mask, (1, 2), classes=2, ignore=255)
    assert present.tolist() == [1]
    assert counts[0].tolist() == [0]


def test_the_square_of_an_image_and_of_its_mask_are_the_same_place() -> None:
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:20, 30:40] = 200
    image = Image.fromarray(mask).convert("RGB")
    _, counts = patch_labels((mask > 0).astype(np.int64), (4, 4))
    shown = np.asarray(centre_square(image, 64, Image.Resampling.BOX))[..., 0].reshape(4, 16, 4, 16).mean(axis=(1, 3))
    np.testing.assert_allclose(counts[:, 1].reshape(4, 4) / 256, shown / 200, atol=0.02)


def test_halves_of_known_colour_are_told_apart(tiny: Any, masked: Any) -> None:
    found = segmentation_probe(subject(*tiny), masked(40), epochs=60, seeds=1, labels="majority", cache=False)
    assert found.scores["recall"].value > 0.95
    assert found.scores["miou"].value > 0.9
    assert found.settings["classes"] == 3


def test_masks_that_say_nothing_about_the_image_are_at_chance(llava: Any, masked: Any) -> None:
    table = masked(60)
    order = np.random.default_rng(0).permutation(60)
    shuffled = datasets.Dataset.from_dict(
        {"image": table["image"], "annotation": [table[int(i)]["annotation"] for i in order]},
        features=table.features,
    )
    found = segmentation_probe(subject(*llava), shuffled, epochs=20, seeds=2, labels="majority", cache=False)
    assert 0.2 < found.scores["recall"].value < 0.5


def test_counts_give_recall_and_intersection_over_union_by_hand() -> None:
    goal = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])

    class Known(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            # predicts class 0, 0, 0, 2
            return torch.tensor([[9.0, 0, 0], [9, 0, 0], [9, 0, 0], [0, 0, 9]])

    class One:
        def __len__(self) -> int:
            return 1

        def patches(self, image: int) -> torch.Tensor:
            return torch.zeros(4, 1)

    # two pixels of every patch show a class
    patches = _Patches(One(), [(np.array([0, 1]), np.array([[2, 0], [2, 0], [0, 2], [0, 2]]))])  # type: ignore[arg-type]
    assert [values.tolist() for values in patches.goals(3, "majority")] == [goal.tolist()]
    counts = _counts(Known(), patches, [goal], "majority")
    assert counts["recall"].tolist() == [[[2, 2], [0, 2], [0, 0]]]
    # class 2 is in no mask: it counts against nothing
    assert counts["miou"].tolist() == [[[2, 3], [0, 2], [0, 0]]]


def test_several_seeds_give_a_spread_and_the_same_result_again(llava: Any, masked: Any) -> None:
    first, second = (segmentation_probe(subject(*llava), masked(10), epochs=2, seeds=2, cache=False) for _ in range(2))
    assert first.scores == second.scores
    assert first.scores["recall/spread"].value >= 0
    assert first.settings["seeds"] == [0, 1]
    alone = segmentation_probe(subject(*llava), masked(10), epochs=2, seeds=[0], cache=False)
    assert alone.scores["recall/spread"].value == 0


def test_the_ade20k_preset_on_a_stand_in_of_the_same_features(
    llava: Any, masked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = datasets.DatasetDict({"train": masked(8), "validation": masked(4, seed=90)})
    asked = []
    monkeypatch.setattr("pivot_plugin.probes.splits.datasets.load_dataset", lambda name: asked.append(name) or stand_in)
    found = segmentation_probe(subject(*llava), "ade20k", epochs=1, seeds=1, cache=False)
    assert asked == ["zhoubolei/scene_parse_150"]
    assert found.settings["classes"] == 151
    assert found.settings["ignore"] == 0
    assert found.settings["labels"] == "union"
    assert (found.settings["fitted_on"], found.settings["scored_on"]) == (8, 4)


def test_masks_of_another_size_than_their_image_are_named(llava: Any) -> None:
    data = Masked([picture(56, 56, 1), picture(56, 56, 2)], [np.zeros((56, 56), int), np.zeros((40, 56), int)])
    with pytest.raises(DataError, match=r"mask 1 is 56 x 40, its image 56 x 56") as caught:
        segmentation_probe(subject(*llava), (data, data), cache=False)
    assert "nearest" in caught.value.remedy


def test_values_out_of_range_are_named(llava: Any) -> None:
    bad = np.zeros((56, 56), int)
    bad[3, 3] = 9
    data = Masked([picture(56, 56, 1)], [bad])
    with pytest.raises(DataError, match="mask 0 holds the value 9, there are classes 0 to 2"):
        segmentation_probe(subject(*llava), (data, data), classes=3, cache=False)
    with pytest.raises(DataError, match=r"mask has shape \(2, 2, 3\)"):
        patch_labels(np.zeros((2, 2, 3), int), (1, 1))
    colour = Masked([picture(56, 56, 1)], [picture(56, 56, 1)])
    with pytest.raises(DataError, match="Mask 0 is a RGB image"):
        segmentation_probe(subject(*llava), (colour, colour), cache=False)


def test_data_without_masks_is_named(llava: Any, masked: Any) -> None:
    with pytest.raises(DataError, match="which hold images and masks is not known"):
        masked_images(masked(3).rename_column("annotation", "x"))
    with pytest.raises(DataError, match="Give at least two"):
        masked_images(masked(1))
    with pytest.raises(SettingsError, match="labels is 'most'"):
        segmentation_probe(subject(*llava), masked(3), labels="most")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="seeds is 0"):
        segmentation_probe(subject(*llava), masked(3), seeds=0)
