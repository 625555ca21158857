"""Pairs of a step are dealt out evenly: the same pairs, in an order that is still a shuffle."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivot_plugin.data.pairs import load_pairs
from pivot_plugin.training.balance import BalancedSampler, Nodes, deal, measure_rates
from pivot_plugin.training.batch import ForestCollator
from pivot_plugin.training.sampler import ImageGroupSampler
from tests.helpers import picture, row

PROCESSES, SIZE, ACCUMULATED = 4, 4, 2
STEP = PROCESSES * SIZE * ACCUMULATED


def nodes_of(count: int, images: int, seed: int = 0) -> Nodes:
    rng = random.Random(seed)
    keys = np.array([f"image-{rng.randrange(images)}" if images else "" for _ in range(count)], dtype="S32")
    size = {key: rng.choice([50, 100, 600, 2500]) for key in sorted(set(keys.tolist()))}
    shared = np.array([float(size[key]) if key else 0.0 for key in keys.tolist()])
    return Nodes(shared, np.array([float(rng.choice([10, 30, 200])) for _ in range(count)]), keys)


def by_rank(order: list[int], nodes: Nodes) -> np.ndarray:
    """(steps, processes) nodes of a process in an optimiser step, as accelerate gives batches out in turn."""
    batches = [nodes.of_batch(order[start : start + SIZE]) for start in range(0, len(order), SIZE)]
    return np.array(batches).reshape(-1, ACCUMULATED, PROCESSES).sum(axis=1)


def sampler(nodes: Nodes, seed: int = 1) -> BalancedSampler:
    return BalancedSampler(ImageGroupSampler(nodes.keys, seed), nodes, PROCESSES, SIZE, ACCUMULATED, seed)


@pytest.mark.parametrize(("images", "left"), [(100, 0.7), (400, 0.45)])
def test_processes_get_about_equally_many_nodes_of_a_step(images: int, left: float) -> None:
    nodes = nodes_of(STEP * 40, images)
    before = by_rank(list(ImageGroupSampler(nodes.keys, 1)), nodes)
    after = by_rank(list(sampler(nodes)), nodes)
    # who is last decides how long a step takes
    waste_before, waste_after = (float((load.max(axis=1) / load.mean(axis=1)).mean()) for load in (before, after))
    assert waste_before > 1.3
    assert waste_after < 1 + left * (waste_before - 1)
    # and no node is computed twice for it
    assert after.sum() <= before.sum() * 1.02


def test_every_step_has_the_pairs_it_had_and_the_order_is_drawn_anew() -> None:
    nodes = nodes_of(STEP * 5 + 3, 40)
    plain, balanced = ImageGroupSampler(nodes.keys, 1), sampler(nodes)
    orders = []
    for epoch in range(3):
        plain.set_epoch(epoch)
        balanced.set_epoch(epoch)
        before, after = list(plain), list(balanced)
        assert sorted(after) == list(range(len(nodes.keys)))
        for start in range(0, len(before), STEP):
            assert set(after[start : start + STEP]) == set(before[start : start + STEP])
        # what does not fill a step stays as it is
        assert after[STEP * 5 :] == before[STEP * 5 :]
        again = sampler(nodes)
        again.set_epoch(epoch)
        assert list(again) == after
        orders.append(after)
    assert orders[0] != orders[1] != orders[2]
    # no process has the large ones of every step
    own = np.random.default_rng(0).random(STEP * 20)
    texts = Nodes(0 * own, own, np.array([b""] * len(own)))
    assert len(set(by_rank(list(sampler(texts)), texts).argmax(axis=1).tolist())) == PROCESSES


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 5), st.integers(0, 99))
def test_batches_are_full_and_hold_every_pair_once(batches: int, size: int, images: int, seed: int) -> None:
    nodes = nodes_of(batches * size, images, seed)
    positions = random.Random(seed).sample(range(batches * size), batches * size)
    dealt = deal(positions, nodes, batches, size)
    assert [len(batch) for batch in dealt] == [size] * batches
    assert sorted(position for batch in dealt for position in batch) == list(range(batches * size))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_nodes_are_told_from_pixels_and_characters(make: Any, family: str) -> None:
    model, processor = make(family)
    rng = random.Random(0)
    pairs = load_pairs(
        [
            row(f"number {n}{'!' * rng.randrange(30)}?", "yes " * rng.randrange(1, 20), "no", *images)
            for n in range(40)
            for images in ([picture(28 * rng.randrange(1, 8), 28 * rng.randrange(1, 8), n)] if n % 5 else [],)
        ]
    ).verify()
    collate = ForestCollator(processor, model.config.image_token_id)
    nodes = measure_rates(pairs.looks, lambda position: collate([pairs[position]])).nodes(pairs.looks)
    told = np.array([nodes.of_batch([position]) for position in range(40)])
    real = np.array([float(collate([pairs[position]])["forest"].forest.is_node.sum()) for position in range(40)])
    assert np.corrcoef(told, real)[0, 1] > 0.9
    assert told.sum() == pytest.approx(real.sum(), rel=0.1)
