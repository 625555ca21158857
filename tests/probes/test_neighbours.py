"""Mutual k nearest neighbours, by brute force."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2Model

import pivot_plugin as pivot
from pivot_plugin.errors import DataError, ModelError, SettingsError
from pivot_plugin.probes import Captioned, alignment, mutual_knn, subject
from pivot_plugin.probes.neighbours import clamped, text_features
from pivot_plugin.testing.families import byte_tokenizer
from tests.helpers import picture
from tests.helpers.encoders import encoder


def brute_force(first: np.ndarray, second: np.ndarray, k: int) -> list[float]:
    shares = []
    for row in range(len(first)):
        nearest = []
        for vectors in (first, second):
            likeness = [
                (float(vectors[row] @ other / np.linalg.norm(vectors[row]) / np.linalg.norm(other)), index)
                for index, other in enumerate(vectors)
                if index != row
            ]
            nearest.append({index for _, index in sorted(likeness, reverse=True)[:k]})
        shares.append(len(nearest[0] & nearest[1]) / k)
    return shares


@given(st.integers(0, 1000), st.integers(1, 7), st.integers(9, 20))
def test_it_agrees_with_brute_force(seed: int, k: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(count, 5)), rng.normal(size=(count, 8))
    assert mutual_knn(first, second, k).tolist() == pytest.approx(brute_force(first, second, k))


def test_a_turned_and_scaled_copy_has_the_same_neighbours() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 6))
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert mutual_knn(vectors, 3 * vectors @ turn, 5).mean() == 1


def test_unrelated_vectors_are_at_chance() -> None:
    rng = np.random.default_rng(0)
    found = [mutual_knn(rng.normal(size=(101, 20)), rng.normal(size=(101, 20)), 10).mean() for _ in range(10)]
    assert np.mean(found) == pytest.approx(10 / 100, abs=0.01)


def test_outliers_are_clamped_and_lengths_are_one() -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 40))
    vectors[0, 0] = 1e6
    kept = clamped(vectors)
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), 1)
    # one huge number no longer is all there is of its row
    assert kept[0, 0] < 0.5


def text_model() -> Any:
    return Qwen2Model(
        Qwen2Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()


def test_an_encoder_is_aligned_with_a_text_model(tiny: Any) -> None:
    images = [picture(60, 60, seed) for seed in range(12)]
    captions = [f"caption number {seed} of twelve" for seed in range(12)]
    data = Captioned(images, captions, text_model(), byte_tokenizer())
    who = subject(*tiny)
    found = alignment(who, data, k=3, cache=False)
    assert 0 <= found.main.value <= 1
    assert found.settings["chance"] == pytest.approx(3 / 11)
    small = alignment(who, data, k=3, cache=False, batch_size=5)
    # padding and batches do not change what a caption means
    assert small.main.value == pytest.approx(found.main.value, abs=0.06)


def test_what_cannot_be_aligned_is_named(llava: Any) -> None:
    images = [picture(60, 60, 1)] * 4
    who = subject(*llava)
    with pytest.raises(DataError, match="There are 4 images and 3 captions"):
        alignment(who, Captioned(images, ["a"] * 3, text_model(), byte_tokenizer()))
    with pytest.raises(DataError, match="4 images and 4 captions for 10 neighbours"):
        alignment(who, Captioned(images, ["a"] * 4, text_model(), byte_tokenizer()))
    with pytest.raises(ModelError, match="without its tokenizer"):
        alignment(who, Captioned(images, ["a"] * 4, text_model()), k=2, cache=False)
    with pytest.raises(SettingsError, match="k is 0"):
        mutual_knn(np.eye(3), np.eye(3), 0)


def test_the_code_of_a_text_model_s_author_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked whether to run code"))
    names = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    images = [picture(20, 20, number) for number in range(3)]
    with pytest.raises(ModelError, match="without code of its author"):
        text_features(Captioned(images, ["a", "b", "c"], str(tmp_path)), 2)
    with pytest.raises(ModelError, match="No language model with its tokenizer could be loaded"):
        pivot.assemble(*encoder("siglip")[:1], str(tmp_path), image_processor=encoder("siglip")[1])
    assert not (tmp_path / "ran").exists()
