"""The reference pass: what the cache lacks is computed in shares over processes, and every process gets all of it."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pivot_plugin.data.launch import Launch
from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.progress import is_watched

from .reference import KEY, ReferenceCache

SECONDS_BETWEEN_PARTS = 20.0
# is given pairs, the positions of those to score, and how many at once; gives of each batch its positions, in their
# order, and (pairs, columns) log-probabilities
Score = Callable[[PairDataset, Sequence[int], int], Iterator[tuple[list[int], np.ndarray]]]


@dataclass(frozen=True)
class ReferencePass:
    """How reference log-probabilities are computed.

    Attributes:
        cache: where they are kept. It may be another on every node; what one node has kept, all know.
        score: computes those of some pairs.
        size: pairs that are scored at once.
        launch: processes that compute together; each calls this alike.
    """

    cache: ReferenceCache
    score: Score
    size: int
    launch: Launch

    def __call__(self, pairs: PairDataset, name: str, quiet: bool) -> np.ndarray:
        """The log-probabilities of all pairs.

        Args:
            pairs: looked at already.
            name: of them, for the progress bar.
            quiet: whether to show none.

        Returns:
            (pairs, columns) of chosen and rejected answers and what is scored beside them, in every process.
        """
        # pairs with equal contents are computed once
        keys, first, pair_of = np.unique(
            np.ascontiguousarray(pairs.looks.contents).view(KEY)[:, 0], return_index=True, return_inverse=True
        )
        known, logps = self._look_up(keys)
        missing = first[~known]
        if len(missing):
            key_of = dict(zip(first.tolist(), range(len(first)), strict=True))
            share = shares(pairs.image_keys, missing, self.launch.count)[self.launch.rank]
            rows = np.array([key_of[position] for position in share], dtype=np.int64)
            hidden = quiet or not is_watched()
            computed = self._compute(pairs, share, keys[rows], tqdm(desc=f"reference of {name} pairs", disable=hidden))
            for some_rows, some_logps in self.launch.gather((rows, computed)):
                logps[some_rows] = some_logps
            if self.launch.local_rank == 0:
                self.cache.merge()
        return logps[pair_of]

    def _look_up(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What any node has kept; one process of each node looks."""
        mine = self.cache.look_up(keys) if self.launch.local_rank == 0 else None
        digest = None if mine is None else hashlib.sha256(mine[0].tobytes() + mine[1].tobytes()).hexdigest()
        # nobody writes before all have looked; and where all nodes see one folder, it is sent around once
        digests = self.launch.gather(digest)
        known, logps = np.zeros(len(keys), dtype=bool), np.zeros((len(keys), self.cache.columns), dtype=np.float32)
        for distinct in sorted(set(filter(None, digests))):
            theirs_known, theirs = self.launch.broadcast(mine, digests.index(distinct))
            news = theirs_known & ~known
            logps[news] = theirs[news]
            known |= theirs_known
        return known, logps

    def _compute(self, pairs: PairDataset, share: Sequence[int], keys: np.ndarray, bar: Any) -> np.ndarray:
        """Compute this process's share, and keep it every few seconds."""
        logps = np.zeros((len(share), self.cache.columns), dtype=np.float32)
        done = kept = 0
        written = time.monotonic()
        bar.reset(total=len(share))
        try:
            for positions, of_batch in self.score(pairs, share, self.size):
                logps[done : done + len(positions)] = of_batch
                done += len(positions)
                bar.update(len(positions))
                if time.monotonic() - written > SECONDS_BETWEEN_PARTS:
                    self.cache.add(keys[kept:done], logps[kept:done])
                    kept, written = done, time.monotonic()
        finally:
            # what was computed before an interruption is paid for
            self.cache.add(keys[kept:done], logps[kept:done])
            bar.close()
        return logps


def shares(image_keys: np.ndarray, positions: np.ndarray, count: int) -> list[list[int]]:
    """Divide pairs among processes so that the pairs of an image stay together.

    Args:
        image_keys: of all pairs, empty for none.
        positions: of the pairs to divide.
        count: of processes.

    Returns:
        for each process its pairs, those of an image next to each other; shares differ by at most one image's pairs,
        and where one image has more than a share, its pairs are divided too.
    """
    positions = np.sort(positions)
    keys = image_keys[positions]
    _, first, image_of = np.unique(keys, return_index=True, return_inverse=True)
    # in the order in which the images come; pairs without one have nothing in common
    rank = np.where(keys == b"", np.arange(len(keys)), first[image_of])
    ordered = np.argsort(rank, kind="stable")
    rank = rank[ordered]
    starts = np.flatnonzero(np.r_[True, rank[1:] != rank[:-1]]) if len(rank) else np.zeros(0, dtype=np.int64)
    cuts = []
    for number in range(1, count):
        ideal = round(number * len(ordered) / count)
        after = int(np.searchsorted(starts, ideal))
        around = [int(starts[at]) for at in (after - 1, after) if 0 <= at < len(starts)] + [len(ordered)]
        nearest = min(around, key=lambda start: abs(start - ideal))
        cuts.append(nearest if abs(nearest - ideal) * 2 <= len(ordered) / count else ideal)
    edges = [0, *np.maximum.accumulate(cuts).tolist(), len(ordered)] if cuts else [0, len(ordered)]
    return [positions[ordered[start:end]].tolist() for start, end in pairwise(edges)]
