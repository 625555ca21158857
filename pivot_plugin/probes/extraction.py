"""Frozen features of images: extracted in batches, kept on disk by content, read back as they are needed.

The cache holds a file per chunk of images, named after everything its content depends on: the encoder's weights, the
image processor, what is read, and the images. An extraction that was interrupted goes on with the missing chunks.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
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
from pivot_plugin.data.images import ImageAccess, content_key
from pivot_plugin.errors import DataError, ModelError, SettingsError
from pivot_plugin.files import cache_folder, write_whole
from pivot_plugin.models.fingerprints import model_fingerprint

from .subjects import Subject, subject

logger = logging.getLogger(__name__)

Pool = Literal["none", "mean"]
CHUNK = 256
WORKERS = 4


@dataclass(frozen=True)
class Features:
    """Features of images in order; those on disk are read when they are asked for.

    Attributes:
        grids: (images, 2) rows and columns of each image's patch grid.
        width: of a feature.
    """

    grids: np.ndarray
    width: int
    _chunks: tuple[Any, ...]
    _pooled: bool

    def __len__(self) -> int:
        return len(self.grids)

    def patches(self, image: int) -> torch.Tensor:
        """(P, width) features of one image's patches in raster order, in the precision of the encoder.

        Raises:
            SettingsError: if only pooled features were kept.
        """
        if self._pooled:
            raise SettingsError("Only pooled features were extracted.", 'Extract with pool="none" for patches.')
        return self._chunks[image // CHUNK].rows(image % CHUNK)

    def pooled(self) -> np.ndarray:
        """(images, width) float32: the mean of each image's patch features."""
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
        found: torch.Tensor = self._values[int(self._starts[first]) : int(self._starts[last])]
        return found


class _Batches(Dataset[Any]):
    """Batches of images as the encoder takes them; decoded and processed in the worker that reads them."""

    def __init__(
        self, images: Sequence[Any], batches: list[range], image_processor: Any, access: ImageAccess, square: int | None
    ) -> None:
        self.images, self.batches = images, batches
        self.image_processor, self.access, self.square = image_processor, access, square

    def __len__(self) -> int:
        return len(self.batches)

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
    examined = subject(encoder_or_model, processor)
    if pool not in ("none", "mean"):
        raise SettingsError(f"pool is {pool!r}.", "Choose 'none' or 'mean'.")
    if not len(images):
        raise DataError("There are no images to take features of.", "Give at least one.")
    if projected and not examined.is_mllm and len(examined.adapter.projector_paths) != 1:
        examined.mllm("The projector's output")
    place, was = _device(device), examined.adapter.tower.device
    model = examined.adapter.tower if not projected else examined.model
    folder = _folder(cache)
    chunks, access = _chunks(len(images)), ImageAccess()
    names = None
    if folder is not None:
        depends = _depends_on(examined, pool, projected, square, place.type)
        names = [folder / f"{_chunk_key(depends, images, chunk, access)}.safetensors" for chunk in chunks]
    missing = [i for i in range(len(chunks)) if names is None or not names[i].exists()]
    training, fresh = model.training, {}
    model.eval()
    try:
        if missing:
            model.to(place)
        for index, found in _extracted(
            examined, images, [chunks[i] for i in missing], access, projected, pool, square, batch_size, workers, place
        ):
            chunk, grids = missing[index], torch.tensor([image.grid for image in found])
            values = torch.cat([image.values for image in found]).contiguous()
            if names is None:
                rows = [1] * len(found) if pool == "mean" else grids.prod(dim=1).tolist()
                fresh[chunk] = (_Chunk(values, rows), grids.numpy(), values.shape[1])
            else:
                _write(names[chunk], {"values": values, "grids": grids})
    finally:
        model.to(was).train(training)
    read = [fresh[i] if names is None else _read(names[i], pool) for i in range(len(chunks))]
    return Features(
        np.concatenate([grids for _, grids, _ in read]), read[0][2], tuple(c for c, _, _ in read), pool == "mean"
    )


def _extracted(
    examined: Subject,
    images: Sequence[Any],
    chunks: list[range],
    access: ImageAccess,
    projected: bool,
    pool: Pool,
    square: int | None,
    batch_size: int,
    workers: int | None,
    place: torch.device,
) -> Iterator[tuple[int, list[ImageFeatures]]]:
    """Chunk by chunk, the features of its images, on the host."""
    batches, owner = [], []
    for index, chunk in enumerate(chunks):
        cut = [chunk[start : start + batch_size] for start in range(0, len(chunk), batch_size)]
        batches += cut
        owner += [index] * len(cut)
    if workers is None:
        # on a CPU they would take the cores that compute
        workers = WORKERS if len(batches) > 4 and place.type != "cpu" else 0
    data = _Batches(images, batches, examined.image_processor, access, square)
    loader = DataLoader(data, batch_size=None, num_workers=workers, pin_memory=place.type == "cuda")
    adapter, done = examined.adapter, []
    precise = torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda")
    total = sum(map(len, chunks))
    with precise, tqdm(total=total, desc="features", unit="image", disable=total < 1024, leave=False) as bar:
        for position, inputs in enumerate(loader):
            inputs = {name: value.to(place, non_blocking=True) for name, value in inputs.items()}
            try:
                found = adapter.patch_features(inputs)
            except (ValueError, RuntimeError) as error:
                raise _disagree(examined, inputs, error) from error
            if projected:
                found = [adapter.project(image) for image in found]
            if pool == "mean":
                found = [ImageFeatures(image.values.float().mean(dim=0, keepdim=True), image.grid) for image in found]
            if len(found) != len(batches[position]):
                raise ModelError(
                    f"{type(examined.image_processor).__name__} cuts images into tiles: {len(batches[position])} "
                    f"images gave {len(found)} views.",
                    "Use one that gives a single view of an image (VisionAdapter.image_processor).",
                )
            # views of one large tensor would keep all of it
            done += [ImageFeatures(image.values.cpu().clone(), image.grid) for image in found]
            bar.update(len(found))
            if position + 1 == len(batches) or owner[position + 1] != owner[position]:
                yield owner[position], done
                done = []


def _disagree(examined: Subject, inputs: dict[str, torch.Tensor], error: Exception) -> ModelError:
    config = examined.adapter.tower.config
    given = {name: tuple(value.shape) for name, value in inputs.items()}
    return ModelError(
        f"{type(examined.adapter.tower).__name__} of {examined.name} takes images of size "
        f"{getattr(config, 'image_size', 'any')}; {type(examined.image_processor).__name__} gives {given}: {error}.",
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


def encoder_size(examined: Subject) -> int:
    """Pixels of a square image as the encoder takes it; 448 where it takes any size."""
    side = getattr(examined.adapter.tower.config, "image_size", None)
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


def _depends_on(examined: Subject, pool: Pool, projected: bool, square: int | None, device: str) -> str:
    adapter = examined.adapter
    hashes = [model_fingerprint(adapter.tower)]
    if projected:
        hashes += [model_fingerprint(adapter.model.get_submodule(path)) for path in adapter.projector_paths]
    processor = json.dumps(examined.image_processor.to_dict(), sort_keys=True, default=str)
    read = [type(adapter.tower).__name__, type(examined.image_processor).__name__, adapter.feature_layer]
    return json.dumps([hashes, processor, read, pool, projected, square, device])


def _chunk_key(depends: str, images: Sequence[Any], chunk: range, access: ImageAccess) -> str:
    digest = hashlib.sha256(depends.encode())
    for position in chunk:
        digest.update(content_key([access.encoded(images[position], f"image {position}")]).encode())
    return digest.hexdigest()[:40]


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        write_whole(path, lambda aside: save_file(tensors, aside))
    except OSError as error:
        raise SettingsError(
            f"Features cannot be kept in {str(path.parent)!r}: {error}.",
            "Make room, give another cache= folder, or cache=False.",
        ) from error


def _read(path: Path, pool: Pool) -> tuple[_Chunk, np.ndarray, int]:
    with safe_open(path, "pt") as file:
        grids = file.get_tensor("grids")
        width = file.get_slice("values").get_shape()[1]
    rows = [1] * len(grids) if pool == "mean" else grids.prod(dim=1).tolist()
    return _Chunk(None, rows, path), grids.numpy(), int(width)
