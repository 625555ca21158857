"""Frozen features of images: extracted in batches, kept on disk by content, read back as they are needed.

The cache holds a file per chunk of images, named after everything its content depends on: the encoder's weights, the
image processor, what is read, and the images. An extraction that was interrupted goes on with the missing chunks.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from pivot_plugin.adapters import ImageFeatures
from pivot_plugin.data.images import ImageAccess
from pivot_plugin.errors import DataError, ModelError, SettingsError, said
from pivot_plugin.files import cache_folder, write_whole
from pivot_plugin.models.evaluating import evaluating
from pivot_plugin.models.fingerprints import model_fingerprint

from . import subjects
from .subjects import Subject

logger = logging.getLogger(__name__)

Pool = Literal["none", "mean"]
CHUNK = 256
WORKERS = 4


@dataclass(frozen=True)
class Features:
    """Features of images in order; those on disk are read when they are asked for.

    Attributes:
        grids: (n, 2) rows and columns of each image's patch grid.
        width: of a feature.
    """

    grids: np.ndarray
    width: int
    _chunks: tuple[Any, ...]
    _pooled: bool

    def __len__(self) -> int:
        return len(self.grids)

    def patches(self, image: int) -> torch.Tensor:
        """(P, D) features of one image's patches in raster order, in the precision of the encoder.

        Raises:
            SettingsError: if only pooled features were kept.
        """
        if self._pooled:
            raise SettingsError("Only pooled features were extracted.", 'Extract with pool="none" for patches.')
        return self._chunks[image // CHUNK].rows(image % CHUNK)

    def pooled(self) -> np.ndarray:
        """(n, D) float32: the mean of each image's patch features."""
        if self._pooled:
            return torch.cat([chunk.all().float() for chunk in self._chunks]).numpy()
        return np.stack([self.patches(image).float().mean(dim=0).numpy() for image in range(len(self))])


class _Chunk:
    """Features of up to CHUNK images, in memory or in a file that is mapped when it is first read."""

    def __init__(self, values: torch.Tensor | None, rows: Sequence[int], path: Path | None = None) -> None:
        self._values: Any = values
        self._path = path
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(int)

    def rows(self, image: int) -> torch.Tensor:
        return self._between(image, image + 1)

    def all(self) -> torch.Tensor:
        return self._between(0, len(self._starts) - 1)

    def _between(self, first: int, last: int) -> torch.Tensor:
        if self._values is None:
            self._values = safe_open(self._path, "pt").get_slice("values")
        rows: torch.Tensor = self._values[int(self._starts[first]) : int(self._starts[last])]
        return rows


@dataclass(frozen=True)
class _Reading:
    """What is read of each image, and how.

    Attributes:
        subject: whose features.
        pool, projected, square: as `features` documents them.
        device: to run on.
    """

    subject: Subject
    pool: Pool
    projected: bool
    square: int | None
    device: torch.device

    def __post_init__(self) -> None:
        if self.pool not in ("none", "mean"):
            raise SettingsError(f"pool is {self.pool!r}.", "Choose 'none' or 'mean'.")
        if self.projected and not self.subject.is_mllm and len(self.subject.adapter.projector_paths) != 1:
            self.subject.mllm("The projector's output")

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Have the model in eval mode on the device meanwhile; afterwards it is where and as it was."""
        model = self.subject.model if self.projected else self.subject.adapter.tower
        was_on = self.subject.adapter.tower.device
        try:
            with evaluating(model, self.device):
                yield
        finally:
            model.to(was_on)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> list[ImageFeatures]:
        """Features of each image of a batch, on the host."""
        adapter = self.subject.adapter
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
        try:
            batch = adapter.patch_features(inputs)
        except (ValueError, RuntimeError) as error:
            raise _disagree(self.subject, inputs, error) from error
        if self.projected:
            batch = [adapter.project(image) for image in batch]
        if self.pool == "mean":
            batch = [ImageFeatures(image.values.float().mean(dim=0, keepdim=True), image.grid) for image in batch]
        # views of one large tensor would keep all of it
        return [ImageFeatures(image.values.cpu().clone(), image.grid) for image in batch]

    def key(self) -> str:
        """What features depend on, beside the images."""
        adapter, image_processor = self.subject.adapter, self.subject.image_processor
        hashes = [model_fingerprint(adapter.tower)]
        if self.projected:
            hashes += [model_fingerprint(adapter.model.get_submodule(path)) for path in adapter.projector_paths]
        processor = json.dumps(image_processor.to_dict(), sort_keys=True, default=str)
        layer = [type(adapter.tower).__name__, type(image_processor).__name__, adapter.feature_layer]
        return json.dumps([hashes, processor, layer, self.pool, self.projected, self.square, self.device.type])


class _Batches(Dataset[Any]):
    """Batches of images as the encoder takes them; decoded and processed in the worker that reads them."""

    def __init__(
        self,
        images: Sequence[Any],
        chunks: list[range],
        size: int,
        image_processor: Any,
        access: ImageAccess,
        square: int | None,
    ) -> None:
        self.images = images
        self.image_processor, self.access, self.square = image_processor, access, square
        self.batches: list[range] = []
        # of each batch the chunk it is a part of: no batch reaches over two
        self.chunk_of: list[int] = []
        for index, chunk in enumerate(chunks):
            batches = [chunk[start : start + size] for start in range(0, len(chunk), size)]
            self.batches += batches
            self.chunk_of += [index] * len(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def ends_chunk(self, index: int) -> bool:
        """Whether a batch is the last of its chunk."""
        return index + 1 == len(self.batches) or self.chunk_of[index + 1] != self.chunk_of[index]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        decoded = [self.access.open(self.images[position], f"image {position}") for position in self.batches[index]]
        if self.square is not None:
            decoded = [centre_square(image, self.square) for image in decoded]
        return dict(self.image_processor(images=decoded, return_tensors="pt"))


@torch.no_grad()
def features(
    encoder_or_model: object,
    images: Sequence[Any],
    *,
    processor: object | None = None,
    pool: Pool = "none",
    projected: bool = False,
    square: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    cache: str | Path | bool = True,
    device: str | torch.device | None = None,
) -> Features:
    """Frozen features of images on their patch grids, as the projector reads them.

    Args:
        encoder_or_model: an encoder, an MLLM, the folder or Hub id of either, or a `Subject`.
        images: PIL images, encoded bytes, paths, or rows of datasets' Image feature (undecoded ones are decoded once,
            in workers).
        processor: of a loaded model without a name.
        pool: "mean" keeps one vector per image, the mean of its patches; "none" keeps all patches.
        projected: take the projector's output (the paper's figure 6) instead of what it reads (figure D).
        square: cut images to their central square and scale them to so many pixels first.
        batch_size: images at once.
        workers: processes that decode and process images; by default four, and none on a CPU or for a few images.
        cache: folder to keep features in, by content; True is `$PIVOT_CACHE/features`, False keeps them in memory.
        device: to run on; by default a GPU where there is one. In bfloat16 on a GPU.

    Raises:
        DataError: for an image that cannot be read, or if there are none.
        ModelError: if processor and encoder disagree on size, or the features form no grid.
    """
    subject = subjects.subject(encoder_or_model, processor)
    reading = _Reading(subject, pool, projected, square, _device(device))
    if not len(images):
        raise DataError("There are no images to take features of.", "Give at least one.")
    folder = _folder(cache)
    chunks, access = _chunks(len(images)), ImageAccess()
    files = None
    if folder is not None:
        key = reading.key()
        files = [folder / f"{_chunk_key(key, images, chunk, access)}.safetensors" for chunk in chunks]
    missing = [i for i in range(len(chunks)) if files is None or not files[i].exists()]
    batches = _Batches(images, [chunks[i] for i in missing], batch_size, subject.image_processor, access, square)
    in_memory = {}
    with reading.ready() if missing else nullcontext():
        for index, values, grids in _extracted(reading, batches, workers):
            if files is None:
                in_memory[missing[index]] = _loaded(values, grids, pool)
            else:
                _write(files[missing[index]], {"values": values, "grids": grids})
    read = [in_memory[i] if files is None else _read(files[i], pool) for i in range(len(chunks))]
    return Features(
        np.concatenate([grids for _, grids, _ in read]), read[0][2], tuple(c for c, _, _ in read), pool == "mean"
    )


def _extracted(
    reading: _Reading, batches: _Batches, workers: int | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Chunk by chunk its number, the features of its images, (rows, width), and their grids, (n, 2)."""
    device = reading.device
    if workers is None:
        # on a CPU they would take the cores that compute
        workers = WORKERS if len(batches) > 4 and device.type != "cpu" else 0
    loader = DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda")
    precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    total = sum(map(len, batches.batches))
    done: list[ImageFeatures] = []
    with precision, tqdm(total=total, desc="features", unit="image", disable=total < 1024, leave=False) as bar:
        for position, inputs in enumerate(loader):
            batch = reading(inputs)
            if len(batch) != len(batches.batches[position]):
                raise ModelError(
                    f"{type(batches.image_processor).__name__} cuts images into tiles: "
                    f"{len(batches.batches[position])} images gave {len(batch)} views.",
                    "Use one that gives a single view of an image (VisionAdapter.image_processor).",
                )
            done += batch
            bar.update(len(batch))
            if batches.ends_chunk(position):
                values = torch.cat([image.values for image in done]).contiguous()
                yield batches.chunk_of[position], values, torch.tensor([image.grid for image in done])
                done = []


def _disagree(subject: Subject, inputs: dict[str, torch.Tensor], error: Exception) -> ModelError:
    config = subject.adapter.tower.config
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    return ModelError(
        f"{type(subject.adapter.tower).__name__} of {subject.name} takes images of size "
        f"{getattr(config, 'image_size', 'any')}; {type(subject.image_processor).__name__} gives {shapes}: {error}.",
        "Use the image processor that was published with the encoder.",
    )


def centre_square(image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The central square of an image, scaled.

    Args:
        image: of any size.
        side: pixels of the result.
        resample: how to scale; NEAREST for masks.
    """
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return image.crop((left, top, left + edge, top + edge)).resize((side, side), resample)


def encoder_size(subject: Subject) -> int:
    """Pixels of a square image as the encoder takes it; 448 where it takes any size."""
    side = getattr(subject.adapter.tower.config, "image_size", None)
    if isinstance(side, list | tuple):
        side = side[0]
    return int(side) if side else 448


def _folder(cache: str | Path | bool) -> Path | None:
    if cache is False:
        return None
    folder = cache_folder("features") if cache is True else Path(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"The feature cache {str(folder)!r} cannot be written: {error.strerror}.", "Give another cache= folder."
        ) from error
    return folder


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")


def _chunks(count: int) -> list[range]:
    return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def _chunk_key(key: str, images: Sequence[Any], chunk: range, access: ImageAccess) -> str:
    digest = hashlib.sha256(key.encode())
    for position in chunk:
        digest.update(access.stored_key(images[position], f"image {position}").encode())
    return digest.hexdigest()[:40]


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        write_whole(path, lambda aside: save_file(tensors, aside))
    except OSError as error:
        raise SettingsError(
            f"Features cannot be kept in {str(path.parent)!r}: {said(error)}.",
            "Make room, give another cache= folder, or cache=False.",
        ) from error


def _read(path: Path, pool: Pool) -> tuple[_Chunk, np.ndarray, int]:
    with safe_open(path, "pt") as file:
        grids = file.get_tensor("grids")
        width = file.get_slice("values").get_shape()[1]
    return _Chunk(None, _rows(grids, pool), path), grids.numpy(), int(width)


def _loaded(values: torch.Tensor, grids: torch.Tensor, pool: Pool) -> tuple[_Chunk, np.ndarray, int]:
    return _Chunk(values, _rows(grids, pool)), grids.numpy(), values.shape[1]


def _rows(grids: torch.Tensor, pool: Pool) -> list[int]:
    """How many rows of features each image has."""
    rows: list[int] = [1] * len(grids) if pool == "mean" else grids.prod(dim=1).tolist()
    return rows
