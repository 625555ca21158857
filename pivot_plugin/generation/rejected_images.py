"""Pairs whose rejected pictures are made: when a row is read, and of its own data set's pictures alone."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from pivot_plugin.data.images import ImageAccess
from pivot_plugin.data.pairs import PairDataset, load_pairs
from pivot_plugin.data.pixels import pixel_statistics, told_apart
from pivot_plugin.errors import DataError

from .makers import Draw, Maker, Picture, Pictures, Unsuitable, maker_of
from .makers.pictures import Thumbs

logger = logging.getLogger(__name__)

DIFFICULTY = 0.5
UNSUITABLE = "no rejected image can be made"
# another drawing where a maker gives the picture itself or none
ATTEMPTS = 8
# pairs that are measured before a run
MEASURED = 200


def with_rejected_images(
    pairs: object, make: str = "other_picture", difficulty: float = DIFFICULTY, seed: int = 0
) -> PairDataset:
    """Pairs in which every row with images and without rejected ones gets some, made when it is read.

    All rows about one picture get the same, so that it is encoded once for them.

    Args:
        pairs: as for `load`, with random access. Pairs that are to be held out are split off before: another row's
            picture is taken from these rows alone.
        make: name of a maker: "other_picture", "patch_shuffle", "region_blackout", "crop", or a plugin's.
        difficulty: from 0, quite another picture, to 1, a hardly different one.
        seed: of the drawing; the same rows and seed give the same pictures.

    Raises:
        SettingsError: for a maker that there is not.
        DataError: for pairs that cannot be used, or too few different pictures; when a row is read, for one of which
            nothing can be made.
    """
    maker = maker_of(make, difficulty, rejected=True)
    rows = load_pairs(pairs).verify()
    pool = _Pool(rows)
    if len(pool.pictures) < maker.pictures:
        raise DataError(
            f"{rows.name} shows {len(pool.pictures)} different picture(s), and {make!r} needs {maker.pictures}.",
            "Give rows about more pictures, or choose another maker.",
        )
    return rows.rejecting(_Rejecting(maker, difficulty, seed, pool))


def warn_of_made_looks(pairs: PairDataset, make: str) -> None:
    """Say where pixel statistics tell rejected pictures from true ones, as `pivot prefs check` does for all rows.

    Args:
        pairs: with rejected images, looked at.
        make: name of the maker.
    """
    different = np.flatnonzero((pairs.rejected_image_keys != b"") & (pairs.rejected_image_keys != pairs.image_keys))
    measured = []
    for position in different[:: max(1, len(different) // MEASURED)][:MEASURED].tolist():
        row, where = pairs.plain(position), pairs.where(position)
        true, other = (
            pixel_statistics(pairs.access.open(row[name][0], where)) for name in ("images", "rejected_images")
        )
        measured.append((true, other))
    told = told_apart(measured)
    if told is not None and told.beyond_chance:
        logger.warning(
            "Pixel statistics alone tell %.0f %% of the pictures of %r from true ones (half would be by chance): the "
            "model can learn to know unnatural pictures instead of reading them. Pictures that are natural themselves, "
            "as other_picture takes them, leave it no such way.",
            100 * told.share,
            make,
        )


class _FirstImages(Sequence[Any]):
    """Of some rows the first image as it stands in the source, read when it is asked for."""

    def __init__(self, pairs: PairDataset, positions: Sequence[int]) -> None:
        self._pairs = pairs
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._pairs.plain(self._positions[index])["images"][0]


class _Pool:
    """The different pictures of pairs; of several that a row shows the first.

    Args:
        pairs: looked at.
    """

    def __init__(self, pairs: PairDataset) -> None:
        first: dict[bytes, int] = {}
        for position, key in enumerate(pairs.image_keys.tolist()):
            if key:
                first.setdefault(key, position)
        self._number = {key: number for number, key in enumerate(first)}
        self.pictures = Pictures.of(_FirstImages(pairs, list(first.values())), pairs.access, pairs.name)

    def picture(self, key: str, number: int, image: Any, access: ImageAccess, where: str) -> Picture:
        """One image of a row as makers are given it.

        Args:
            key: of the row's images.
            number: of the image among them.
            image: itself.
            access, where: to it, and the row's name in errors.
        """
        # thumbs are kept by place, and a row has one
        thumbs = Thumbs() if number else self.pictures.thumbs
        index = self._number.get(key.encode(), -1)
        return Picture([image], 0, where, access, size=access.size(image, where), index=index, thumbs=thumbs)


@dataclass(frozen=True)
class _Rejecting:
    """Makes the rejected images of a row."""

    maker: Maker
    difficulty: float
    seed: int
    pool: _Pool
    # by picture which drawing gave another one, so that it need not be looked at again
    _attempts: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, images: list[Any], key: str, access: ImageAccess, where: str) -> list[Any]:
        return [self._made(number, image, key, access, where) for number, image in enumerate(images)]

    def _made(self, number: int, image: Any, key: str, access: ImageAccess, where: str) -> Any:
        own = access.key(image, where)
        picture = self.pool.picture(key, number, image, access, where)
        # by the picture's content, so that it is the same in any order of rows
        drawn = int(own[:12], 16) + number
        attempts = f"{own} {number}"
        reason = "it comes out as the picture itself"
        if min(picture.size) < self.maker.smallest(self.difficulty):
            reason = f"{picture.size[0]} x {picture.size[1]} pixels are too few"
        else:
            for attempt in range(self._attempts.get(attempts, 0), ATTEMPTS):
                draw = Draw(picture, self.pool.pictures, self.difficulty, drawn, self.seed, attempt)
                try:
                    assert self.maker.rejected is not None
                    made = self.maker.rejected(draw)
                except Unsuitable as unsuitable:
                    reason = str(unsuitable)
                    continue
                if attempts in self._attempts or access.key(made, where) != own:
                    self._attempts[attempts] = attempt
                    return made
        raise DataError(
            f"{where}: no rejected image can be made by {self.maker.name!r}: {reason}.",
            "Leave the row out, or choose another maker.",
            UNSUITABLE,
        )
