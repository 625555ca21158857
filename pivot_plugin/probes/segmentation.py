"""The segmentation probe: how well does a small MLP on frozen patch features tell what each patch shows?

Protocol: arXiv 2510.16333, appendix E.5, which follows Covert et al. 2025 ("Locality alignment improves vision-language
models"): Linear(D, 1024), GELU, Linear(1024, classes) on every patch; 5 epochs of AdamW, 1e-3 to 1e-4 by cosine after a
warm-up, weight decay 0.01, batches of 32 images; images and masks cut to their central square. The last epoch counts,
where the published code keeps the one that is best on the images it is scored on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import nn

from pivot_plugin.data.images import ImageAccess
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.models.evaluating import undisturbed

from . import subjects
from .data import Masked, masked_images
from .extraction import Features, encoder_size, features
from .patch_grid import picture_features, said_of_grid
from .scores import ProbeResult, Score, plain_score, score_of
from .splits import PRESETS

HIDDEN = 1024
EPOCHS, BATCH = 5, 32
RATE, LAST_RATE, WEIGHT_DECAY, WARMUP = 1e-3, 1e-4, 0.01, 500
# pixels of a patch's side at which its share of a mask is read
PIXELS_PER_PATCH = 16
LabelKind = Literal["union", "majority"]
# (n, K, 2) each: hits over patches with the class, intersection over union
STATISTICS = ("recall", "miou")


def segmentation_probe(
    examined: object,
    data: object,
    *,
    labels: LabelKind = "union",
    classes: int | None = None,
    ignore: int | None = None,
    epochs: int = EPOCHS,
    seeds: int | Sequence[int] = 3,
    projected: bool = False,
    **extraction: Any,
) -> ProbeResult:
    """Fit the MLP on the patches of images, and score it on those of others.

    Args:
        examined: as for `features`.
        data: as for `masked_images`.
        labels: what a patch is to be told: "union", every class in it (several may be right, a sigmoid each), or
            "majority", the class of most of it (a softmax).
        classes: how many; the preset's, or as many as the masks show.
        ignore: a value of the masks that counts as no class.
        epochs: over the images to fit on.
        seeds: of the MLP's weights and the order of images: how many, or which. Counts of all are added up.
        projected: measure encoder and projector together.
        **extraction: options of `features`.

    Returns:
        "recall", macro recall over the classes that occur, and "miou", intersection over union averaged over them;
        "recall/spread" and "miou/spread", the standard deviations over seeds.

    Raises:
        DataError: for masks that do not fit their images or hold values out of range.
    """
    if labels not in ("union", "majority"):
        raise SettingsError(f"labels is {labels!r}.", "Choose 'union' or 'majority'.")
    preset = PRESETS.get(data) if isinstance(data, str) else None
    if preset:
        classes, ignore = classes or preset.classes, preset.ignore if ignore is None else ignore
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or epochs < 1:
        raise SettingsError(f"seeds is {seeds!r}, epochs {epochs}.", "Give at least one of each.")
    subject = subjects.subject(examined)
    fitting, scoring = masked_images(data)
    side = encoder_size(subject)
    of_picture = partial(picture_features, subject.adapter, subject.image_processor, projected=projected)
    grid = said_of_grid(subject, of_picture, (side, side))
    fitted_on, scored_on = (
        _Patches.of(
            part, features(subject, part.images, square=side, projected=projected, **extraction), classes, ignore
        )
        for part in (fitting, scoring)
    )
    count = classes or 1 + max(fitted_on.highest, scored_on.highest)
    goals, expected = fitted_on.goals(count, labels), scored_on.goals(count, labels)
    per_seed = []
    for seed in numbers:
        mlp = _fitted(fitted_on, goals, labels, epochs, seed)
        per_seed.append(_counts(mlp, scored_on, expected, labels))
    settings = {
        "labels": labels,
        "classes": count,
        "ignore": ignore,
        "epochs": epochs,
        "seeds": numbers,
        "fitted_on": len(fitting.images),
        "scored_on": len(scoring.images),
        "features": "encoder+projector" if projected else "encoder",
        "patch grid": grid,
    }
    return ProbeResult("segmentation", _scores(per_seed), settings)


def _scores(per_seed: Sequence[dict[str, np.ndarray]]) -> dict[str, Score]:
    """Scores of the counts of all seeds together, and the spread of the scores of each."""
    scores = {name: score_of(np.sum([counts[name] for counts in per_seed], axis=0)) for name in STATISTICS}
    for name in STATISTICS:
        values = [score_of(counts[name]).value for counts in per_seed]
        scores[f"{name}/spread"] = plain_score(float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
    return scores


def patch_labels(
    mask: np.ndarray,
    grid: tuple[int, int],
    where: str = "mask",
    classes: int | None = None,
    ignore: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What the patches of the central square of a mask show.

    Args:
        mask: (height, width) integers.
        grid: rows and columns of patches over the square.
        where: names the mask in errors.
        classes: values below this are classes; None for any.
        ignore: a value that is no class.
        image_size: (width, height) of its image, where they are to be compared.

    Returns:
        the classes that occur, (K,), and how many of a patch's pixels show each, (P, K), the patches in raster order.

    Raises:
        DataError: if the mask has another size than its image, or a value out of range.
    """
    if mask.ndim != 2 or mask.dtype.kind not in "iub":
        raise DataError(f"{where} has shape {mask.shape} and type {mask.dtype}.", "Give (height, width) integers.")
    if image_size is not None and (mask.shape[1], mask.shape[0]) != image_size:
        raise DataError(
            f"{where} is {mask.shape[1]} x {mask.shape[0]}, its image {image_size[0]} x {image_size[1]}.",
            "Scale the mask to its image (nearest neighbour), or leave the row out.",
        )
    values = mask.astype(np.int64)
    if classes is not None or values.min() < 0:
        bad = (values < 0) | (values >= (classes or np.inf))
        if ignore is not None:
            bad &= values != ignore
        if bad.any():
            raise DataError(
                f"{where} holds the value {values[bad][0]}, there are classes 0 to {(classes or 0) - 1}.",
                "Mend the mask, raise classes=, or name a value that is no class by ignore=.",
            )
    rows, columns = grid
    edge = min(mask.shape)
    top, left = (mask.shape[0] - edge) // 2, (mask.shape[1] - edge) // 2
    square = values[top : top + edge, left : left + edge]
    # nearest neighbour: the pixel in whose area the centre of a sample lies
    at = [((np.arange(n * PIXELS_PER_PATCH) + 0.5) * edge / (n * PIXELS_PER_PATCH)).astype(int) for n in grid]
    sampled = square[at[0]][:, at[1]].reshape(rows, PIXELS_PER_PATCH, columns, PIXELS_PER_PATCH)
    patches = sampled.transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    present = np.array([value for value in np.unique(patches) if value != ignore], dtype=np.int64)
    return present, np.stack([(patches == value).sum(axis=1) for value in present], axis=1) if len(present) else (
        np.zeros((rows * columns, 0), dtype=np.int64)
    )


def _mask(part: Masked, position: int) -> np.ndarray:
    mask = part.masks[position]
    if isinstance(mask, Image.Image) and mask.mode not in ("L", "P", "I", "I;16", "1"):
        raise DataError(f"Mask {position} is a {mask.mode} image.", "Give one class number per pixel.")
    return np.asarray(mask)


def _image_size(part: Masked, position: int) -> tuple[int, int]:
    return ImageAccess().size(part.images[position], f"image {position}")


@dataclass(frozen=True)
class _Patches:
    """Features of the patches of images, and what the patches show.

    Attributes:
        features: of the images.
        shown: per image the classes that occur, (K,), and the pixels of each patch that show each, (P, K).
    """

    features: Features
    shown: list[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, part: Masked, features: Features, classes: int | None, ignore: int | None) -> Self:
        """The patches of images with masks, features and masks on one grid."""
        shown = [
            patch_labels(_mask(part, i), tuple(features.grids[i]), f"mask {i}", classes, ignore, _image_size(part, i))
            for i in range(len(part.images))
        ]
        return cls(features, shown)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def highest(self) -> int:
        """The highest class that occurs; 0 where none does."""
        return max(int(classes.max(initial=0)) for classes, _ in self.shown)

    def values(self, image: int) -> torch.Tensor:
        """(Q, D) features of those patches of an image that show any class."""
        return self.features.patches(image)[torch.from_numpy(self._counted(image))].float()

    def goals(self, classes: int, labels: LabelKind) -> list[torch.Tensor]:
        """Per image (Q, K) of 0 and 1 for those patches that show any class."""
        goals = []
        for image, (present, counts) in enumerate(self.shown):
            counts = counts[self._counted(image)]
            goal = torch.zeros(len(counts), classes)
            if labels == "union":
                goal[:, present] = torch.from_numpy((counts > 0).astype(np.float32))
            elif len(counts):
                goal[np.arange(len(counts)), present[counts.argmax(axis=1)]] = 1
            goals.append(goal)
        return goals

    def _counted(self, image: int) -> np.ndarray:
        counted: np.ndarray = self.shown[image][1].sum(axis=1) > 0
        return counted


def _fitted(patches: _Patches, goals: list[torch.Tensor], labels: LabelKind, epochs: int, seed: int) -> nn.Module:
    """The MLP after so many epochs, its weights and the order of images drawn from the seed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with undisturbed(seed), torch.enable_grad():
        mlp = nn.Sequential(
            nn.Linear(patches.features.width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, goals[0].shape[1])
        ).to(device)
        optimizer = torch.optim.AdamW(mlp.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        schedule = _schedule(optimizer, epochs * -(-len(patches) // BATCH))
        for _ in range(epochs):
            order = torch.randperm(len(patches)).tolist()
            for batch in (order[start : start + BATCH] for start in range(0, len(order), BATCH)):
                values = torch.cat([patches.values(image) for image in batch]).to(device)
                goal = torch.cat([goals[image] for image in batch]).to(device)
                if len(values):
                    loss = _loss(mlp(values), goal, labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                schedule.step()
    return mlp.eval()


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    # a small set is seen in fewer steps than the protocol warms up
    warmup = min(WARMUP, max(1, steps // 10))
    return torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup), LAST_RATE),
        ],
        [warmup],
    )


def _loss(logits: torch.Tensor, goal: torch.Tensor, labels: LabelKind) -> torch.Tensor:
    if labels == "union":
        return nn.functional.binary_cross_entropy_with_logits(logits, goal)
    return nn.functional.cross_entropy(logits, goal.argmax(dim=1))


@torch.no_grad()
def _counts(mlp: nn.Module, patches: _Patches, goals: list[torch.Tensor], labels: LabelKind) -> dict[str, np.ndarray]:
    """(n, K, 2) of each statistic, over the patches that show any class."""
    recall, iou = [], []
    device = next(mlp.parameters()).device
    for image, goal in enumerate(goal.bool() for goal in goals):
        logits = mlp(patches.values(image).to(device)).cpu()
        if labels == "union":
            predicted = logits > 0
        else:
            predicted = nn.functional.one_hot(logits.argmax(dim=1), goal.shape[1]).bool()
        hits, of_class = (predicted & goal).sum(dim=0), goal.sum(dim=0)
        recall.append(torch.stack([hits, of_class], dim=1))
        iou.append(torch.stack([hits, (predicted | goal).sum(dim=0)], dim=1))
    counts = {
        name: torch.stack(values).numpy().astype(np.float64)
        for name, values in zip(STATISTICS, (recall, iou), strict=True)
    }
    # a class that no image shows has no intersection over union
    occurs = counts["recall"][..., 1].sum(axis=0) > 0
    counts["miou"][:, ~occurs] = 0
    return counts
