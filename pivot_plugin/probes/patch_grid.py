"""Do patch features lie where the adapter says? Shown on the model itself, with mosaics of known pieces.

Every patch of a picture is one of two pieces, drawn at random from mosaic to mosaic. What a patch's features follow, of
all the pieces that changed, is where that patch looks: the share of the variance of its features that each piece
explains. On a right grid that is its own piece. Towers mix: attention makes a patch follow all others a little,
overlapping convolutions its neighbours as much as itself. So the shares are averaged over the patches of each quarter
of the picture, by the offset from a patch to the piece: the middle of what is left must lie in the patch itself, by
which a shift by one row is seen even where nine neighbours count alike. And single patches must not follow others,
by which transposed, mirrored and scrambled orders and wrong tiles are seen.

Where chance explains as much as the pieces do, more mosaics are shown; where that stays so, nothing is verified.

Notation: M mosaics, K patches looked at, P patches shown, D width of the features.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from pivot_plugin.adapters import ImageFeatures, VisionAdapter
from pivot_plugin.errors import ModelError
from pivot_plugin.models.evaluating import evaluating, undisturbed
from pivot_plugin.models.image_tokens import ImageTokens, about_images
from pivot_plugin.training.forward import on_model

from .subjects import Subject

logger = logging.getLogger(__name__)

FeaturesOf = Callable[[Image.Image], ImageFeatures]
Box = tuple[float, float, float, float]
BoxOf = Callable[[tuple[int, int]], Box]
Result = Literal["verified", "wrong", "not verified"]

# of pictures in which rows are not mistaken for columns
WIDE = (240, 96)
# mosaics of one pair of pictures, and pairs of pictures that are tried at most
MOSAICS, ROUNDS = 16, 6
# patches that are looked at, at most
LOOKED_AT = 256
# rows or columns of patches, and pixels of a patch, below which a larger picture is tried
COARSE, FINE, SCALES = 3, 4, (1, 2, 4, 8)
# standard deviations of chance, and share of the variance, above which a patch, or a quarter of them, follows something
SEEN, FOLLOWS = 6.0, 0.1
# rows or columns by which the middle of what is followed may lie beside a patch, from which it is elsewhere, and from
# which two sides lie too far apart
BESIDE, ELSEWHERE, STRETCHED = 0.5, 0.75, 0.9
# pairs of pictures that must show the same wrong; fewer do where patches follow single places by so much
INSISTED, INSISTED_LOCAL, LOCAL = 4, 2, 0.25
# of the patches that follow any piece, the share that may follow another than their own
MISPLACED = 0.1


@dataclass(frozen=True)
class GridFinding:
    """Whether patch features of pictures of one size lie where they are said to.

    Attributes:
        result: "verified", "wrong", or "not verified" where the model mixes its patches too much to tell.
        reason: what was seen.
        grid: rows and columns of patches.
    """

    result: Result
    reason: str
    grid: tuple[int, int]


@torch.no_grad()
def grid_finding(features: FeaturesOf, box_of: BoxOf, size: tuple[int, int]) -> GridFinding:
    """Show a model mosaics, and compare where its patches look with where they are said to lie.

    Args:
        features: of a picture, on the patch grid in question.
        box_of: the part of a picture of some size that the grid covers, as `VisionAdapter.shown_box` says it.
        size: width and height of the pictures; a multiple of them where their patches would be too small.

    Raises:
        ModelError: as `features` and `box_of`.
        AssertionError: if pictures of one size have different grids.
    """
    size, grid = _resolved(features, size)
    places = Places(box_of(size), size, grid)
    shown = places.shown()
    if len(shown) < 2:
        few = f"pictures of {size[0]}x{size[1]} px have {len(shown)} patch(es), of which none is told from another"
        return GridFinding("not verified", few, grid)
    generator = torch.Generator().manual_seed(0)
    looked_at = shown[torch.randperm(len(shown), generator=generator)[:LOOKED_AT].sort().values]
    shares: list[torch.Tensor] = []
    by_chance: list[torch.Tensor] = []
    where = f"on the {grid[0]}x{grid[1]} grid of a picture of {size[0]}x{size[1]} px"
    wrong = undecided = ""
    for round_ in range(ROUNDS):
        codes = _codes(len(shown), generator)
        seen = _shown_mosaics(features, places, shown, codes, seed=round_)[
            :, looked_at[:, 0] * grid[1] + looked_at[:, 1]
        ]
        shares.append(_shares(seen, codes))
        by_chance.append(_shares(seen, _codes(LOOKED_AT, generator)))
        followed = _Followed(looked_at, shown, torch.stack(shares).mean(0), torch.stack(by_chance).mean(0), grid)
        wrong, undecided = followed.wrong(), followed.undecided()
        if not wrong and not undecided:
            return GridFinding("verified", f"{grid[0]}x{grid[1]} for {size[0]}x{size[1]} px", grid)
        # what one pair of pictures shows may be chance, or a whim of these pictures
        if wrong and round_ + 1 >= (INSISTED_LOCAL if followed.is_local else INSISTED):
            return GridFinding("wrong", f"{where} {wrong}", grid)
    return GridFinding("not verified", f"{where} {wrong or undecided}", grid)


def prompted(
    adapter: VisionAdapter, processor: ProcessorMixin, picture: Image.Image
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A question about a picture as an MLLM takes it: all inputs, those about the picture, and its number of tokens.

    Args:
        adapter: of the MLLM's family.
        processor: the MLLM's own.
        picture: any.
    """
    image_tokens = ImageTokens(processor, adapter.image_token_id)
    outputs = image_tokens.processed([[picture]], [image_tokens.image_prompt(1)])
    inputs = {name: on_model(value, adapter.model) for name, value in outputs.items()}
    count = int((inputs["input_ids"] == adapter.image_token_id).sum())
    return inputs, about_images(inputs, processor), count


def seen_view(adapter: VisionAdapter, processor: ProcessorMixin, picture: Image.Image) -> ImageFeatures:
    """Patches of the view of the whole picture in the MLLM's own forward pass, which saliency looks at.

    Args:
        adapter: of the MLLM's family.
        processor: the MLLM's own.
        picture: any.

    Raises:
        ModelError: if which view shows the whole, or how its patches lie, is not known.
    """
    inputs, images, count = prompted(adapter, processor, picture)
    with adapter.watched_tower() as passes, torch.no_grad():
        adapter.model(**inputs, use_cache=False)
    adapter.read_processor(processor)
    # what is cut out of the picture may follow in a pass of its own
    hidden = adapter.hidden_state(passes[0].output)
    return adapter.on_whole_views(hidden, images, [count])[0]


def picture_features(
    adapter: VisionAdapter, image_processor: object, picture: Image.Image, projected: bool = False
) -> ImageFeatures:
    """Patch features of one picture.

    Args:
        adapter: of the encoder.
        image_processor: that is published with it.
        picture: any.
        projected: whether to take what the projector makes of them.

    Raises:
        ModelError: if the features form no grid.
        AssertionError: if they are of more than one picture, or not as many as their grid has patches.
    """
    outputs = dict(image_processor(images=[picture], return_tensors="pt"))  # type: ignore[operator]
    inputs = {name: on_model(value, adapter.tower) for name, value in outputs.items()}
    with torch.no_grad():
        features = adapter.patch_features(inputs)
    assert len(features) == 1, f"one image gave {len(features)} records of patch features"
    (one,) = features
    assert one.grid[0] * one.grid[1] == len(one.values), f"{len(one.values)} patch features lie on a grid of {one.grid}"
    return adapter.project(one) if projected else one


def said_of_grid(subject: Subject, features: FeaturesOf, size: tuple[int, int]) -> str:
    """Whether the patches of a subject lie where they are said to, for the settings of a result.

    Args:
        subject: that is measured.
        features: of a picture, as they are measured.
        size: width and height of the pictures.

    Returns:
        "verified", or "not verified" with the reason, which is logged as well.

    Raises:
        ModelError: if they lie elsewhere.
    """
    processor = subject.processor or subject.image_processor
    with evaluating(subject.model), undisturbed(seed=0):
        finding = grid_finding(features, partial(subject.adapter.shown_box, processor), size)
    if finding.result == "wrong":
        raise ModelError(
            f"The patch grid of {subject.name} is not what its adapter says: {finding.reason}.",
            "Use an adapter that describes the family (`pivot check` tells more).",
        )
    if finding.result == "verified":
        return finding.result
    logger.warning("The patch grid of %s is not verified: %s.", subject.name, finding.reason)
    return f"not verified: {finding.reason}"


def _resolved(features: FeaturesOf, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """A size as large as its patches need to be changed one by one, and its patch grid."""
    grid = (0, 0)
    for scale in SCALES:
        larger, before = (size[0] * scale, size[1] * scale), grid
        grid = features(noise(larger)).grid
        # towers of one picture size have one grid
        if (min(grid) >= COARSE or grid == before) and FINE * max(grid) <= min(larger):
            break
    return larger, grid


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture in which no two patches are alike.

    Args:
        size: width and height.
        seed: of the pixels.
    """
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _codes(count: int, generator: torch.Generator) -> torch.Tensor:
    """(M, count) which of its two pieces each patch is in each mosaic: 1 or -1."""
    return torch.randint(0, 2, (MOSAICS, count), generator=generator).float() * 2 - 1


def _shown_mosaics(
    features: FeaturesOf, places: "Places", shown: torch.Tensor, codes: torch.Tensor, seed: int
) -> torch.Tensor:
    """(M, R * C, D) what a model makes of mosaics."""
    pieces = [places.coloured(seed * 2 + which) for which in (0, 1)]
    mosaics = []
    for code in codes:
        second = torch.zeros(places.grid, dtype=torch.bool)
        second[shown[:, 0], shown[:, 1]] = code > 0
        one = features(places.mosaic(pieces[0], pieces[1], second))
        assert one.grid == places.grid, f"pictures of one size have grids of {places.grid} and {one.grid}"
        mosaics.append(one.values.float().cpu())
    return torch.stack(mosaics)


def _shares(seen: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """(K, P) share of the variance of each patch's features that each piece explains, above that of all patches.

    Args:
        seen: (M, K, D) features.
        codes: (M, P) of the pieces.
    """
    seen, codes = seen - seen.mean(dim=0), codes - codes.mean(dim=0)
    gram = torch.einsum("mkd,nkd->kmn", seen, seen)
    explained = torch.einsum("mp,kmn,np->kp", codes, gram, codes) / codes.square().sum(dim=0).clamp(min=1e-9)
    total = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    shares = explained / total[:, None].clamp(min=1e-30)
    # what all patches follow, such as the middle of the picture in convolutional nets, tells none from another
    return shares - shares.mean(dim=0)


@dataclass(frozen=True)
class _Followed:
    """Which pieces patches follow.

    Attributes:
        looked_at: (K, 2) row and column of each patch.
        shown: (P, 2) row and column of each piece.
        shares: (K, P) of variance.
        by_chance: (K, any) the same of pieces that were nowhere shown.
        grid: rows and columns.
    """

    looked_at: torch.Tensor
    shown: torch.Tensor
    shares: torch.Tensor
    by_chance: torch.Tensor
    grid: tuple[int, int]

    @property
    def is_local(self) -> bool:
        """Whether patches follow single places, and not many of which one shows a little more."""
        return self.shares.amax(dim=1).median().item() >= LOCAL

    def undecided(self) -> str:
        """What is not seen, as a clause; nothing if every quarter of the picture looks where it should."""
        for name, rows in self._quarters():
            middle = self._middle(rows)
            if middle is None:
                return (
                    f"the {name} follows no place of the picture above chance, so much does the model mix its patches"
                )
            if max(map(abs, middle)) >= BESIDE:
                return f"the {name} follows {_beside(middle)}, which is neither there nor elsewhere"
        return ""

    def wrong(self) -> str:
        """What looks elsewhere, as a clause; nothing if nothing does."""
        misplaced, decided = self._misplaced()
        if len(misplaced) > max(1, MISPLACED * decided):
            patch, piece = misplaced[0]
            return (
                f"{len(misplaced)} of {decided} patches show another place, such as patch {patch}, which shows what "
                f"lies at {piece}"
            )
        middles = {name: middle for name, rows in self._quarters() if (middle := self._middle(rows)) is not None}
        for name, middle in middles.items():
            if max(map(abs, middle)) >= ELSEWHERE:
                return f"the {name} shows {_beside(middle)}"
        return self._stretched(middles)

    def _stretched(self, middles: dict[str, tuple[float, float]]) -> str:
        """Whether opposite sides look away from each other or towards each other, as a clause; nothing if not."""
        for axis, (near, far) in enumerate((("upper", "lower"), ("left", "right"))):
            sides = {side: [m[axis] for name, m in middles.items() if side in name] for side in (near, far)}
            if not all(sides.values()):
                continue
            before, after = (float(np.mean(sides[side])) for side in (near, far))
            if abs(after - before) >= STRETCHED:
                beside = f"{before:+.1f}, its {far} half what lies {after:+.1f} {('rows', 'columns')[axis]} beside"
                return f"its {near} half shows what lies {beside}"
        return ""

    def _quarters(self) -> list[tuple[str, torch.Tensor]]:
        """Each quarter of the shown part by name, and which of the patches looked at lie in it."""
        quarters = []
        low, high = self.shown.amin(dim=0), self.shown.amax(dim=0)
        for side in ("upper left", "upper right", "lower left", "lower right"):
            inside = torch.ones(len(self.looked_at), dtype=torch.bool)
            for axis, is_far in ((0, side.startswith("lower")), (1, side.endswith("right"))):
                # a middle row belongs to both
                twice, span = 2 * (self.looked_at[:, axis] - low[axis]), high[axis] - low[axis]
                inside &= (twice >= span) if is_far else (twice <= span)
            if inside.any():
                quarters.append((f"{side} quarter", inside))
        return quarters

    def _middle(self, inside: torch.Tensor) -> tuple[float, float] | None:
        """Rows and columns from some patches to the middle of what they follow, None for nothing."""
        rows, columns = self.grid
        width = 2 * columns - 1
        offset = self.shown[None] - self.looked_at[inside][:, None] + torch.tensor([rows - 1, columns - 1])
        index = (offset[..., 0] * width + offset[..., 1]).flatten()
        size = (2 * rows - 1) * width
        variance = self.by_chance[inside].var(dim=1)[:, None].expand(-1, len(self.shown))
        total = torch.zeros(size).index_add_(0, index, self.shares[inside].flatten())
        chance = torch.zeros(size).index_add_(0, index, variance.flatten())
        count = torch.zeros(size).index_add_(0, index, torch.ones(len(index)))
        above = torch.where(count >= max(1.0, inside.sum().item() / 4), total / chance.clamp(min=1e-12).sqrt(), 0.0)
        mean = total / count.clamp(min=1)
        seen = above >= SEEN
        peak = torch.where(seen, mean, 0.0).max()
        weights = torch.where(seen & (mean >= 0.5 * peak), mean, 0.0).reshape(-1, width)
        if weights.sum() < FOLLOWS:
            return None
        weights = weights / weights.sum()
        middle_row = (weights.sum(dim=1) * torch.arange(1 - rows, rows)).sum().item()
        middle_column = (weights.sum(dim=0) * torch.arange(1 - columns, columns)).sum().item()
        return middle_row, middle_column

    def _misplaced(self) -> tuple[list[tuple[tuple[int, int], tuple[int, int]]], int]:
        """Patches that follow another piece more than their own, with that piece; how many follow any."""
        chance = self.by_chance.std(dim=1).clamp(min=1e-9)
        most, best = self.shares.max(dim=1)
        is_own = (self.shown[None] == self.looked_at[:, None]).all(dim=2)
        own = self.shares[is_own]
        follows = (most >= FOLLOWS) & (most >= SEEN * chance)
        # two shares are further apart by chance than one is from nothing
        elsewhere = follows & (most - own >= SEEN * 2**0.5 * chance)
        pairs = [
            (_pair(self.looked_at[index]), _pair(self.shown[best[index]]))
            for index in elsewhere.nonzero()[:, 0].tolist()
        ]
        return pairs, int(follows.sum())


def _beside(middle: tuple[float, float]) -> str:
    return f"what lies {middle[0]:+.1f} rows and {middle[1]:+.1f} columns beside its patches"


def _pair(place: torch.Tensor) -> tuple[int, int]:
    return int(place[0]), int(place[1])


@dataclass(frozen=True)
class Places:
    """Where the patches of a grid lie in a picture.

    Attributes:
        box: of the picture that the grid covers, as `VisionAdapter.shown_box` says it.
        size: width and height of the picture.
        grid: rows and columns.
    """

    box: Box
    size: tuple[int, int]
    grid: tuple[int, int]

    def _edges(self, axis: int) -> np.ndarray:
        """Pixels along an axis, 0 for across, at which the patches of the grid begin, and the last ends."""
        start, stop, count = self.box[axis], self.box[axis + 2], self.grid[1 - axis]
        return np.round((start + (stop - start) * np.arange(count + 1) / count) * self.size[axis])

    def shown(self) -> torch.Tensor:
        """(P, 2) row and column of the patches of which most shows the picture, and not a border around it."""
        kept = []
        for axis in (1, 0):
            edges, inside = self._edges(axis), np.clip(self._edges(axis), 0, self.size[axis])
            kept.append(np.flatnonzero(np.diff(inside) > 0.6 * np.maximum(1, np.diff(edges))))
        rows, columns = np.meshgrid(kept[0], kept[1], indexing="ij")
        return torch.from_numpy(np.stack([rows.ravel(), columns.ravel()], axis=1))

    def _patch_of(self, axis: int) -> np.ndarray:
        """Row or column of patches that each pixel along an axis lies in; outside of all, of the nearest."""
        middles = np.arange(self.size[axis]) + 0.5
        return np.clip(np.searchsorted(self._edges(axis), middles) - 1, 0, self.grid[1 - axis] - 1)

    def coloured(self, seed: int) -> np.ndarray:
        """(height, width, 3) pixels: a colour of its own in each patch, with noise on it.

        Args:
            seed: of colours and noise.
        """
        generator = np.random.default_rng(seed)
        colours = generator.integers(0, 192, (*self.grid, 3))[np.ix_(self._patch_of(1), self._patch_of(0))]
        return (colours + generator.integers(0, 64, colours.shape)).astype(np.uint8)

    def mosaic(self, first: np.ndarray, second: np.ndarray, is_second: torch.Tensor) -> Image.Image:
        """A picture made of patches of two.

        Args:
            first, second: pixels of both.
            is_second: (R, C) which patches are the second's.
        """
        of_pixel = is_second.numpy()[np.ix_(self._patch_of(1), self._patch_of(0))]
        return Image.fromarray(np.where(of_pixel[..., None], second, first))
