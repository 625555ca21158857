"""The k-nearest-neighbour probe: votes counted by hand, separable classes, chance, and what it cannot be asked."""

from typing import Any

import datasets
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

import pivot_plugin as pivot
from pivot_plugin.errors import SettingsError
from pivot_plugin.probes import Labelled, features, knn_probe, labelled_images, subject
from pivot_plugin.probes.lookup import available
from tests.helpers import picture


def by_hand(vectors: np.ndarray, labels: np.ndarray, others: np.ndarray, k: int, temperature: float) -> list[int]:
    """One image at a time: its k most similar, each voting with exp(similarity / temperature)."""
    said = []
    for other in others:
        likeness = [float(v @ other / np.linalg.norm(v) / np.linalg.norm(other)) for v in vectors]
        nearest = sorted(range(len(vectors)), key=lambda index: -likeness[index])[:k]
        votes: dict[int, float] = {}
        for index in nearest:
            votes[int(labels[index])] = votes.get(int(labels[index]), 0.0) + np.exp(likeness[index] / temperature)
        said.append(max(sorted(votes), key=lambda label: votes[label]))
    return said


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 10.0)])
def test_the_votes_are_those_counted_by_hand(llava: Any, labelled: Any, k: int, temperature: float) -> None:
    who = subject(*llava)
    data = datasets.DatasetDict(
        {"train": labelled(12, shuffled=True), "test": labelled(9, seed=100, shuffled=True).select(range(20))}
    )
    found = knn_probe(who, data, k=k, temperature=temperature, cache=False)
    fitting, scoring = labelled_images(data)
    vectors, others = (features(who, p.images, pool="mean", cache=False).pooled() for p in (fitting, scoring))
    said = by_hand(vectors, fitting.labels, others, k, temperature)
    assert len(set(np.bincount(scoring.labels))) > 1
    assert found.scores["top1"].value == pytest.approx(np.mean(np.array(said) == scoring.labels))
    assert found.main.value == pytest.approx(balanced_accuracy_score(scoring.labels, said))
    assert found.main.low <= found.main.value <= found.main.high
    assert (found.settings["chance"], found.settings["k"]) == (1 / 3, k)


def test_classes_that_lie_apart_are_told_and_random_labels_are_at_chance(llava: Any, labelled: Any) -> None:
    who = subject(*llava)
    assert knn_probe(who, labelled(), k=3, cache=False).main.value == 1
    found = knn_probe(who, labelled(60, shuffled=True), cache=False)
    assert found.main.low < found.settings["chance"] < found.main.high


def test_a_class_that_is_nearly_all_there_is_gains_nothing(llava: Any) -> None:
    """Who says red to all is right of nine in ten images, and of half of the classes."""
    images = [picture(40, 40, seed) for seed in range(40)]
    fitting = Labelled(images[:20], np.array([0] * 19 + [1]), ("red", "also red"))
    scoring = Labelled(images[20:], np.array([0] * 18 + [1] * 2), ("red", "also red"))
    found = knn_probe(subject(*llava), (fitting, scoring), k=19, temperature=100.0, cache=False)
    assert found.scores["top1"].value == pytest.approx(0.9)
    assert found.main.value == pytest.approx(0.5)


def test_it_is_named_like_the_others_and_compared_sample_by_sample(make: Any, labelled: Any) -> None:
    assert available()["knn"] is knn_probe
    models = {"one": subject(*make("llava")), "same": subject(*make("llava"))}
    comparison = pivot.compare(models, {"knn": labelled(6)})
    (balanced, _) = comparison.contrasts()
    assert balanced.difference.value == 0 and balanced.p == 1.0


@pytest.mark.parametrize(
    ("options", "finding"),
    [({"k": 0}, "k is 0"), ({"k": 1000}, "k is 1000, for 24 images"), ({"temperature": 0.0}, r"temperature is 0\.0")],
)
def test_what_cannot_be_asked_is_said(llava: Any, labelled: Any, options: dict[str, Any], finding: str) -> None:
    with pytest.raises(SettingsError, match=finding):
        knn_probe(subject(*llava), labelled(), cache=False, **options)
