"""RAVEL on constructed cases, and its parts by brute force."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.probes import Captioned, alignment, ravel, subject
from pivot_plugin.probes.ravel import Whitening, chamfer, patch_overlap
from pivot_plugin.testing.families import byte_tokenizer
from tests.helpers import picture


def turned(width: int, seed: int = 0) -> np.ndarray:
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    return turn


def as_sets(vectors: np.ndarray) -> list[np.ndarray]:
    """Images of one patch each."""
    return list(vectors[:, None])


def test_a_rotation_of_the_same_features_has_the_same_neighbours() -> None:
    texts = np.random.default_rng(0).normal(size=(120, 8))
    shares, ranks = patch_overlap(as_sets(texts @ turned(8)), texts, 10)
    assert shares.mean() == 1
    assert ranks == (8, 8)


def test_a_stretched_and_moved_copy_has_them_too_because_both_sides_are_whitened() -> None:
    """What `alignment` does not see through."""
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(200, 6))
    stretched = texts * np.array([30, 10, 3, 1, 1, 0.3]) @ turned(6) + 5
    assert patch_overlap(as_sets(stretched), texts, 10)[0].mean() > 0.99
    from pivot_plugin.probes import mutual_knn

    assert mutual_knn(stretched, texts, 10).mean() < 0.7


def test_independent_noise_is_at_chance() -> None:
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        patches = list(rng.normal(size=(101, 4, 12)))
        found.append(patch_overlap(patches, rng.normal(size=(101, 20)), 10)[0].mean())
    assert np.mean(found) == pytest.approx(10 / 100, abs=0.015)


def test_neither_the_order_of_patches_nor_their_number_matters() -> None:
    rng = np.random.default_rng(1)
    texts = rng.normal(size=(40, 5))
    patches = list(rng.normal(size=(40, 6, 5)))
    shuffled = [rng.permutation(one) for one in patches]
    np.testing.assert_array_equal(patch_overlap(patches, texts, 5)[0], patch_overlap(shuffled, texts, 5)[0])
    # an image that shows everything twice is like the one that shows it once
    once = [torch.nn.functional.normalize(torch.from_numpy(one), dim=1) for one in patches]
    twice = [torch.cat([one, one]) if index % 2 else one for index, one in enumerate(once)]
    torch.testing.assert_close(chamfer(once), chamfer(twice), check_dtype=False)


def test_what_a_mean_would_lose_is_kept() -> None:
    """Images whose patches have the same mean, and differ in one patch that the text tells."""
    rng = np.random.default_rng(2)
    told = rng.normal(size=(60, 6))
    patches = [np.stack([one, -one]) for one in told]
    assert patch_overlap(patches, np.concatenate([told, told**2], axis=1)[:, :6], 5)[0].mean() > 0.3
    assert np.abs(np.stack(patches).mean(axis=1)).max() < 1e-12


def test_chamfer_agrees_with_brute_force() -> None:
    rng = np.random.default_rng(3)
    sets = [rng.normal(size=(int(rng.integers(1, 6)), 4)) for _ in range(40)]
    sets = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in sets]
    found = chamfer([torch.from_numpy(one).float() for one in sets]).numpy()
    for i in range(40):
        for j in range(40):
            there = np.mean([max(float(a @ b) for b in sets[j]) for a in sets[i]])
            back = np.mean([max(float(a @ b) for a in sets[i]) for b in sets[j]])
            assert found[i, j] == pytest.approx((there + back) / 2, abs=1e-5)


def test_whitened_features_have_no_preferred_direction() -> None:
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(4000, 5)) * np.array([9, 3, 1, 1, 0.5]) @ turned(5)
    white = Whitening(vectors)(vectors)
    np.testing.assert_allclose(np.linalg.norm(white, axis=1), 1)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(5) / 5, atol=0.02)
    # a direction in which nothing differs is left out
    flat = np.concatenate([vectors, np.ones((4000, 2))], axis=1)
    assert Whitening(flat).rank == 5


def text_model() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    return Qwen2Model(Qwen2Config(vocab_size=300, num_hidden_layers=2, **sizes)).eval()


def test_an_encoder_is_measured_beside_its_alignment(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    images = [picture(60 + 8 * (seed % 3), 60, seed) for seed in range(12)]
    data = Captioned(images, [f"caption number {seed} of twelve" for seed in range(12)], text_model(), byte_tokenizer())
    who = subject(*tiny)
    with caplog.at_level(logging.WARNING):
        found = ravel(who, data, k=3, cache=False)
    assert 0 <= found.main.value <= 1
    assert found.settings["chance"] == alignment(who, data, k=3, cache=False).settings["chance"]
    assert found.settings["rank of captions"] <= 8
    assert "whitened" not in caplog.text
    few = Captioned(images[:5], data.captions[:5], data.text_model, data.tokenizer)
    with caplog.at_level(logging.WARNING):
        ravel(who, few, k=2, cache=False)
    assert "5 captions of 8 dimensions: whitened" in caplog.text


def test_what_cannot_be_measured_is_named(llava: Any) -> None:
    who = subject(*llava)
    data = Captioned([picture(60, 60, 1)] * 4, ["a"] * 4, text_model(), byte_tokenizer())
    with pytest.raises(DataError, match="4 images and 4 captions for 100 neighbours"):
        ravel(who, data)
    with pytest.raises(DataError, match="All features are equal"):
        ravel(who, data, k=2, cache=False)
    with pytest.raises(SettingsError, match="k is 0"):
        patch_overlap(as_sets(np.eye(3)), np.eye(3), 0)
