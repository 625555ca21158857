"""The order of pairs: shuffled, with pairs that share an image next to each other."""

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler


class ImageGroupSampler(Sampler[int]):
    """Yields every position once per epoch, images in random order, the pairs of an image together in random order.

    The order depends on seed and epoch alone, so that a resumed run sees the order of an undisturbed one.

    Args:
        image_keys: for each pair a key that is equal for pairs with equal images, empty for none.
        seed: of the shuffle.
    """

    def __init__(self, image_keys: Sequence[bytes] | np.ndarray, seed: int) -> None:
        keys = np.asarray(image_keys)
        _, first, image_of = np.unique(keys, return_index=True, return_inverse=True)
        # images in the order in which they come; pairs without one have nothing in common
        rank = np.where(keys == keys.dtype.type(), np.arange(len(keys)), first[image_of])
        self._positions = np.argsort(rank, kind="stable")
        _, self._starts = np.unique(rank[self._positions], return_index=True)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; called by the data loader."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self._seed}-{self._epoch}")
        ends = np.append(self._starts, len(self._positions))
        # of one pair there is one order, which is drawn all the same: so the orders of releases stay what they are
        inside = {
            group: rng.sample(range(length), length)
            for group, length in enumerate(np.diff(ends).tolist())
            if length > 1 or rng.randrange(1)
        }
        groups = list(range(len(self._starts)))
        rng.shuffle(groups)
        for group in groups:
            for place in inside.get(group, (0,)):
                yield int(self._positions[self._starts[group] + place])


class EpochRepeatSampler(RepeatSampler):
    """TRL's order of questions and their roll-outs, also in an epoch that a resumed run begins with.

    TRL draws the order of an epoch when the one before it has been drawn, and begins anew in every process.

    Args:
        data_source, mini_repeat_count, batch_size, repeat_count, shuffle, seed: as TRL's.
    """

    _epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; called by the data loader."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self._epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()
