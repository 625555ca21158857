"""The linear probe: scikit-learn's own score, separable classes, chance, and data that cannot be used."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score

from pivot_plugin.encoders import save_encoder
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.probes import features, labelled_images, linear_probe, prototype_probe, subject
from pivot_plugin.probes.linear import normalised, prototypes, top_k
from pivot_plugin.probes.splits import PRESETS, Preset, per_class, stratified


def test_the_score_is_scikit_learn_s_own(llava: Any, labelled: Any) -> None:
    data = datasets.DatasetDict({"train": labelled(8, shuffled=True), "test": labelled(6, seed=100)})
    who = subject(*llava)
    found = linear_probe(who, data, regularisation=[0.1], cache=False)
    fitting, scoring = labelled_images(data)
    vectors, others = (
        normalised(features(who, p.images, pool="mean", cache=False).pooled()) for p in (fitting, scoring)
    )
    model = LogisticRegression(C=0.1, max_iter=1000).fit(vectors, fitting.labels)
    assert found.main.value == pytest.approx(model.score(others, scoring.labels))
    assert found.settings["fitted_on"] == 24
    assert found.settings["C"] == 0.1


def test_classes_that_can_be_separated_are_told_apart_without_error(tiny: Any, labelled: Any) -> None:
    who = subject(*tiny)
    assert linear_probe(who, labelled(), regularisation=[100.0], cache=False).main.value == 1
    assert prototype_probe(who, labelled(), cache=False).main.value == 1


def test_random_labels_are_at_chance(llava: Any, labelled: Any) -> None:
    found = linear_probe(subject(*llava), labelled(60, shuffled=True), cache=False)
    assert found.main.low < 1 / 3 < found.main.high
    # three classes: the right one is always among the five most likely
    assert found.scores["top5"].value == 1


def test_regularisation_is_chosen_on_images_that_are_not_scored(llava: Any, labelled: Any) -> None:
    """Labels of the test split change the score and not the choice."""
    train, test = labelled(10), labelled(5, seed=100)
    turned = test.map(lambda row: {"label": (row["label"] + 1) % 3})
    first, second = (
        linear_probe(subject(*llava), datasets.DatasetDict({"train": train, "test": t}), cache=False)
        for t in (test, turned)
    )
    assert first.settings["C"] == second.settings["C"]
    assert first.settings["validation_top1"] == second.settings["validation_top1"]
    assert second.main.value == 0


def test_the_regularisation_that_is_best_on_the_validation_split_is_taken(llava: Any, labelled: Any) -> None:
    """Of twenty red and six green images a classifier that may hardly have weights says red to all."""
    data = datasets.DatasetDict({"train": labelled(20, classes=2).select(range(26)), "test": labelled(5, classes=2)})
    found = linear_probe(subject(*llava), data, regularisation=[1e-6, 100.0], cache=False)
    assert found.settings["C"] == 100
    assert found.settings["validation_top1"] == {"1e-06": 0.8, "100.0": 1.0}
    assert found.main.value == 1


def test_the_choice_is_that_of_a_search_by_hand_and_of_equals_the_strongest(llava: Any, labelled: Any) -> None:
    who, values = subject(*llava), [10.0, 1e-3, 0.316, 1.0, 100.0]
    found = linear_probe(who, labelled(15, shuffled=True), regularisation=values, seed=3, cache=False)
    fitting, scoring = labelled_images(labelled(15, shuffled=True), seed=3)
    vectors, others = (
        normalised(features(who, p.images, pool="mean", cache=False).pooled()) for p in (fitting, scoring)
    )
    held = stratified(fitting.labels, 0.2, 3, fitting.names, "images")
    by_hand = {
        value: LogisticRegression(C=value, max_iter=1000)
        .fit(vectors[~held], fitting.labels[~held])
        .score(vectors[held], fitting.labels[held])
        for value in values
    }
    assert found.settings["validation_top1"] == {str(value): round(by_hand[value], 6) for value in sorted(values)}
    best = min(value for value in values if by_hand[value] == max(by_hand.values()))
    assert found.settings["C"] == best
    model = LogisticRegression(C=best, max_iter=1000).fit(vectors, fitting.labels)
    assert found.main.value == pytest.approx(model.score(others, scoring.labels))


def test_an_untouched_encoder_scores_the_same_after_a_round_trip(
    family: str, tiny: Any, labelled: Any, tmp_path: Path
) -> None:
    folder = save_encoder(find_adapter(tiny[0]), tiny[1], tmp_path / "encoder", {})
    data = labelled(6, shuffled=True)
    before, after = linear_probe(subject(*tiny), data, cache=False), linear_probe(folder, data, cache=False)
    assert before.scores == after.scores
    assert before.settings == after.settings


def test_top_k_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(50, 7)), rng.integers(0, 7, 50)
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=np.arange(7))
        assert top_k(scores, labels, k).mean() == pytest.approx(expected)


def test_a_class_that_was_never_fitted_is_never_right() -> None:
    vectors, labels = np.eye(4)[[0, 0, 1, 3]], np.array([0, 0, 1, 3])
    decide = prototypes(vectors, labels)
    assert top_k(decide(np.eye(4)), np.array([0, 1, 2, 3]), 1).tolist() == [1, 1, 0, 1]
    assert top_k(decide(np.eye(4)), np.array([0, 1, 9, 3]), 5).tolist() == [1, 1, 0, 1]


def test_a_folder_per_class_is_data(llava: Any, labelled: Any, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 3)):
        for index, row in enumerate(labelled(count, seed=0 if split == "train" else 50)):
            place = tmp_path / split / ["red", "green", "blue"][row["label"]]
            place.mkdir(parents=True, exist_ok=True)
            row["image"].save(place / f"{index}.png")
    found = prototype_probe(subject(*llava), str(tmp_path), cache=False)
    assert found.main.value == 1
    assert found.settings["scored_on"] == 9


def test_a_data_set_saved_to_disk_is_data(llava: Any, labelled: Any, tmp_path: Path) -> None:
    labelled(5).save_to_disk(str(tmp_path / "saved"))
    assert prototype_probe(subject(*llava), tmp_path / "saved", cache=False).settings["scored_on"] == 3


def test_the_imagenet_preset_on_a_stand_in_of_the_same_features(
    llava: Any, labelled: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    preset = PRESETS["imagenet-1k"]
    assert (preset.repo, preset.train, preset.test, preset.per_class) == (
        "ILSVRC/imagenet-1k",
        "train",
        "validation",
        50,
    )
    names = [f"class {index}" for index in range(1000)]
    feature = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    stand_in = datasets.DatasetDict(
        {"train": labelled(60).cast(feature), "validation": labelled(4, seed=500).cast(feature)}
    )
    asked = []
    monkeypatch.setattr("pivot_plugin.probes.splits.datasets.load_dataset", lambda name: asked.append(name) or stand_in)
    found = linear_probe(subject(*llava), "imagenet-1k", regularisation=[100.0], cache=False)
    assert asked == ["ILSVRC/imagenet-1k"]
    assert found.settings["fitted_on"] == 150
    assert found.settings["scored_on"] == 12
    assert found.main.value == 1


def test_a_random_subset_has_as_many_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [100, 30, 7])
    chosen = per_class(labels, 10, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [10, 10, 7]
    assert (chosen != per_class(labels, 10, seed=1)).any()
    assert stratified(labels, 0.2, 0, ["a", "b", "c"], "x").sum() == 20 + 6 + 1


def test_a_class_with_one_image_is_named(llava: Any, labelled: Any) -> None:
    lonely = datasets.concatenate_datasets([labelled(4, classes=3).select(range(8)), labelled(4).select([8])])
    with pytest.raises(DataError, match=r"Class 'blue' .* has 1 image\(s\)") as caught:
        linear_probe(subject(*llava), lonely)
    assert "leave the class out" in caught.value.remedy
    with pytest.raises(DataError, match=r"Class 'blue' of the images to fit on has 1"):
        linear_probe(subject(*llava), datasets.DatasetDict({"train": lonely, "test": labelled(2)}))


def test_labels_out_of_range_are_named(llava: Any, labelled: Any) -> None:
    table = labelled(4)
    hidden = table.map(lambda row, index: {"label": -1 if index in (5, 7) else row["label"]}, with_indices=True)
    hidden = hidden.cast_column("label", datasets.ClassLabel(names=["red", "green", "blue"]))
    with pytest.raises(DataError, match=r"Row 5 of .*: label -1 is out of range, there are classes 0 to 2; so in 2"):
        linear_probe(subject(*llava), hidden)


def test_data_that_is_no_labelled_images_is_named(llava: Any, labelled: Any, tmp_path: Path) -> None:
    who = subject(*llava)
    for source, message in (
        (42, "given as a int"),
        (str(tmp_path / "absent"), "cannot be read"),
        (labelled(3).remove_columns("label"), "0 columns of ClassLabel"),
        (labelled(3).select([]), "is empty"),
        (labelled(3).cast_column("label", datasets.Value("string")), "0 columns|labels are text"),
    ):
        with pytest.raises(DataError, match=message):
            linear_probe(who, source)
    with pytest.raises(SettingsError, match="A share is 0"):
        linear_probe(who, labelled(3), validation_share=0)
    with pytest.raises(SettingsError, match="method is 'svm'"):
        linear_probe(who, labelled(3), method="svm")  # type: ignore[arg-type]


def test_presets_say_where_their_protocol_comes_from() -> None:
    assert all(isinstance(preset, Preset) and "2510.16333" in preset.source for preset in PRESETS.values())
