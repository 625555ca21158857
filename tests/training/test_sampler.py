"""The order of pairs: a shuffle that keeps an image's pairs together."""

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from pivot_plugin.training.sampler import ImageGroupSampler

KEYS = [f"image-{n // 4}" for n in range(80)]


@given(st.lists(st.sampled_from(["", "a", "b", "c", "d"]), max_size=30), st.integers(0, 3))
def test_every_pair_comes_once_and_images_stay_together(keys: list[str], epoch: int) -> None:
    sampler = ImageGroupSampler(keys, seed=1)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(keys)))
    with_image = [keys[position] for position in order if keys[position]]
    runs = [key for key, _ in groupby([keys[p] or f"text-{p}" for p in order])]
    assert len(runs) == len(set(with_image)) + keys.count("")


def test_order_is_drawn_anew_each_epoch_and_is_the_same_for_the_same_epoch() -> None:
    sampler, twin = ImageGroupSampler(KEYS, seed=1), ImageGroupSampler(KEYS, seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        twin.set_epoch(epoch)
        orders.append(list(sampler))
        assert orders[-1] == list(twin)
    images = [[key for key, _ in groupby(KEYS[p] for p in order)] for order in orders]
    assert images[0] != images[1] != images[2]
    inside = [[p for p in order if KEYS[p] == "image-0"] for order in orders]
    assert len({tuple(positions) for positions in inside}) > 1
    assert list(ImageGroupSampler(KEYS, seed=2)) != orders[0]
