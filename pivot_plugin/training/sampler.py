"""The order of pairs: shuffled, with pairs that share an image next to each other."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

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

    def __init__(self, image_keys: Sequence[bytes], seed: int) -> None:
        self._groups: dict[bytes, list[int]] = defaultdict(list)
        for position, key in enumerate(image_keys):
            self._groups[key or f"text-{position}".encode()].append(position)
        self._length = len(image_keys)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; called by the data loader."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self._seed}-{self._epoch}")
        groups = [rng.sample(positions, len(positions)) for positions in self._groups.values()]
        rng.shuffle(groups)
        for group in groups:
            yield from group


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
