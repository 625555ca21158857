"""The conformance kit: every promise of the adapter contract, tried on a model.

    from pivot_plugin.testing import conformance

    @pytest.mark.parametrize("check", conformance(model, processor), ids=str)
    def test_my_family(check):
        check.raise_on_failure()

The kit makes pictures and questions of its own, runs the model forwards and backwards on them, and compares what the
adapter says with what happens. It changes nothing: weights and modes of the model are as they were.
"""

import copy
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.adapters.base import ImageFeatures
from pivot_plugin.config import PARTS
from pivot_plugin.encoders import load_encoder, save_encoder
from pivot_plugin.errors import ModelError, PivotError
from pivot_plugin.models.evaluating import evaluating, undisturbed
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.image_tokens import ImageTokens, about_images
from pivot_plugin.training.batch import ForestCollator
from pivot_plugin.training.forest_check import read_rows
from pivot_plugin.training.forward import on_model
from pivot_plugin.training.plan import is_inside

Result = Literal["passed", "failed", "skipped"]
# pictures of the kit: square, wide and tall
SIZES = ((96, 96), (160, 96), (96, 160))
# rows or columns of patches below which a patch grid cannot be seen to be right
COARSE = 3
# pixels of a patch at least
FINE = 4


@dataclass(frozen=True)
class Check:
    """One promise of the contract, tried.

    Attributes:
        name: of the promise.
        result: "passed", "failed", or "skipped" where it does not apply.
        reason: what was found.
    """

    name: str
    result: Result
    reason: str

    def raise_on_failure(self) -> None:
        """Raise an AssertionError with the reason, if the check failed."""
        assert self.result != "failed", f"{self.name}: {self.reason}"

    def __str__(self) -> str:
        return self.name


class Skipped(Exception):
    """A promise that does not apply to a model."""


def conformance(model: PreTrainedModel, processor: ProcessorMixin, adapter: VisionAdapter | None = None) -> list[Check]:
    """Try every promise of the adapter contract on a model.

    Args:
        model: the MLLM, loaded. Random weights will do; all are as they were afterwards.
        processor: its own.
        adapter: to be tried; the one that plugins offer where None.

    Returns:
        the checks in order, each with what was found. None raises: what a model or an adapter raises is a finding.
    """
    checks: list[Check] = []
    try:
        kit = _Kit(model, processor, adapter or find_adapter(model))
    except PivotError as error:
        return [Check("an adapter knows the model", "failed", str(error))]
    for name, attempt in kit.promises():
        with evaluating(model), undisturbed(seed=0):
            checks.append(_tried(name, attempt))
        model.zero_grad(set_to_none=True)
    return checks


def _tried(name: str, attempt: Callable[[], str]) -> Check:
    try:
        return Check(name, "passed", attempt())
    except Skipped as reason:
        return Check(name, "skipped", str(reason))
    except (AssertionError, PivotError) as error:
        return Check(name, "failed", str(error))
    # the kit runs foreign adapters and models: whatever they raise is what it is there to find
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Check(name, "failed", f"{type(error).__name__}: {error} ({where})")


@dataclass
class _Kit:
    """A model with what the checks share."""

    model: PreTrainedModel
    processor: ProcessorMixin
    adapter: VisionAdapter
    image_tokens: ImageTokens = field(init=False)

    def __post_init__(self) -> None:
        self.image_tokens = ImageTokens(self.processor, self.adapter.image_token_id)

    def promises(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Every promise by name, in the order in which they build on each other."""
        yield "parts are found and disjoint", self.parts
        yield "the processor's tokens are the model's", self.tokens
        yield "forest equals plain passes", self.forest
        yield "what has no gradient is what the adapter calls unread", self.unread
        yield "LoRA goes on the tower's linear layers that have a gradient", self.lora
        yield "a lit patch shows in its own cell", self.lit_patch
        yield "saliency looks at the view of the whole", self.whole_view
        yield "an encoder is extracted, saved and loaded as it was", self.round_trip
        yield "an encoder is grafted", self.graft
        yield "the card's lines run when pasted", self.card

    # Where things are

    def parts(self) -> str:
        adapter, names = self.adapter, [name for name, _ in self.model.named_parameters()]
        counts = {part: sum(adapter.part_of(name) == part for name in names) for part in PARTS}
        empty = [part for part, count in counts.items() if not count]
        assert not empty, f"no parameter belongs to the {' and the '.join(empty)}"
        tower = {id(module) for module in adapter.tower.modules()}
        decoder = self.model.get_decoder()
        shared = [path for path, module in decoder.named_modules() if id(module) in tower]
        assert not shared, f"tower and language model share {shared[0] or 'each other'}"
        inner = [path for path in adapter.projector_paths if is_inside(path, adapter.language_model_paths)]
        assert not inner, f"the projector {inner[0]} stands inside the language model"
        others = adapter.other_tower_paths
        told = f"; images also go through {', '.join(others)}, which stays as it is" if others else ""
        return f"{counts['encoder']} tensors of the tower, {counts['projector']} of the projector{told}"

    def tokens(self) -> str:
        images = self.image_tokens.process_images([[_picture(*size)] for size in SIZES])
        return f"{', '.join(str(sum(counts)) for counts in images.counts)} image tokens for {_listed(SIZES)} px"

    # What trains

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        """Rows with one image, with several, and with none, as far as the processor takes them."""
        pictures = [_picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
        rows = [_row("one", "what is it?", pictures[:1]), _row("another", "and this one?", pictures[1:2])]
        for row in (_row("several", "which is larger?", pictures[:2]), _row("none", "say hello", [])):
            try:
                ForestCollator(self.processor, self.adapter.image_token_id)([row])
            # a processor that takes no such row says so in its own way
            except Exception:
                continue
            rows.append(row)
        return rows

    def forest(self) -> str:
        rows = self._rows
        reading = read_rows(self.model, self.adapter, self.processor, rows)
        how = "in trees" if reading.no_trees is None else f"one sequence a row, because {reading.no_trees}"
        return f"{how}; rows: {', '.join(row['id'] for row in rows)}"

    @cached_property
    def _reached(self) -> set[str]:
        """Parameters that a loss on pictures reaches; the gradient itself is not kept."""
        outputs = self.image_tokens.processed([[_picture(*SIZES[0])]], [self.image_tokens.image_prompt(1)])
        flags = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        try:
            self.model.requires_grad_(True)
            with torch.enable_grad():
                logits = self.model(**_on(outputs, self.model), use_cache=False).logits.float()
                # a weight per word: a plain sum of squares can leave a bias without a gradient
                (logits * torch.randn_like(logits)).sum().backward()
            return {
                name
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
            }
        finally:
            self.model.zero_grad(set_to_none=True)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(flags[name])

    def unread(self) -> str:
        tower = [name for name, _ in self.model.named_parameters() if self.adapter.part_of(name) == "encoder"]
        deaf = [
            name
            for name in tower
            # a bias of keys shifts all scores of a query alike, and has no gradient but rounding
            if self.adapter.is_trainable(name) and name not in self._reached and not _may_be_deaf(name)
        ]
        assert not deaf, f"{len(deaf)} parameters get no gradient and are not called unread, such as {deaf[0]}"
        heard = [name for name in tower if not self.adapter.is_trainable(name) and name in self._reached]
        assert not heard, f"{len(heard)} parameters are called unread and have a gradient, such as {heard[0]}"
        return f"{len(self._reached & set(tower))} of {len(tower)} tensors of the tower are reached"

    def lora(self) -> str:
        linear = {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and self.adapter.part_of(f"{name}.weight") == "encoder"
        }
        expected = {name for name in linear if f"{name}.weight" in self._reached}
        try:
            targets = set(self.adapter.lora_targets())
        except ModelError as error:
            if not expected:
                raise Skipped(str(error)) from error
            raise
        assert not (missing := sorted(expected - targets)), (
            f"{len(missing)} linear layers of the tower have a gradient and get no LoRA, such as {missing[0]}"
        )
        assert not (deaf := sorted(targets - expected)), (
            f"{len(deaf)} layers get LoRA and have no gradient, such as {deaf[0]}"
        )
        return f"{len(targets)} linear layers"

    # What probes read

    def _features(self, picture: Image.Image) -> ImageFeatures:
        whole = self.adapter.image_processor(self.processor)
        inputs = _on(dict(whole(images=[picture], return_tensors="pt")), self.model)
        with torch.no_grad():
            features = self.adapter.patch_features(inputs)
        assert len(features) == 1, f"one image gave {len(features)} records of patch features"
        assert features[0].grid[0] * features[0].grid[1] == len(features[0].values), (
            f"{len(features[0].values)} patch features lie on a grid of {features[0].grid}"
        )
        return features[0]

    def lit_patch(self) -> str:
        grids = []
        for size in SIZES:
            picture, dark = _resolved(size, self._features)
            grids.append(f"{dark.grid[0]}x{dark.grid[1]}")
            places = _Places(self.adapter.shown_box(self.processor, picture.size), picture.size, dark.grid)
            for row, column in places.told_apart():
                lit = self._features(places.lit(picture, row, column))
                self._check_place(dark, lit, (row, column), f"a picture of {picture.width}x{picture.height} px")
        near = ", or beside it, because its convolutions overlap" if self._blur else ""
        return f"grids {', '.join(grids)} for {_listed(SIZES)} px; each in its own cell{near}"

    def _check_place(self, before: ImageFeatures, after: ImageFeatures, place: tuple[int, int], where: str) -> None:
        """A change of one patch of a picture shows most in that patch.

        Raises:
            AssertionError: if it does not.
            Skipped: if it does not, and the grid is too coarse to tell.
        """
        brightest, grid = _brightest(before, after), before.grid
        # among few patches a neighbour is as good as any, so that it counts for nothing there
        coarse = min(grid) < (2 * COARSE if self._blur else COARSE)
        if _apart(brightest, place) <= (0 if coarse else self._blur):
            return
        if coarse:
            raise Skipped(f"a grid of {grid[0]}x{grid[1]} is too coarse to tell: every patch sees much of the picture")
        raise AssertionError(f"in {where} a change of patch {place} of {grid} shows most in patch {brightest}")

    @property
    def _blur(self) -> int:
        """Patches by which a change may show beside its own: convolutions that overlap mix neighbours."""
        kernels = [module for module in self.adapter.tower.modules() if isinstance(module, nn.Conv2d)]
        return int(any(size > step for one in kernels for size, step in zip(one.kernel_size, one.stride, strict=True)))

    def whole_view(self) -> str:
        """The view that saliency looks at moves with every corner of the picture, and its own corner moves most."""
        picture, before = _resolved(SIZES[0], self._seen_view)
        places = _Places(self.adapter.shown_box(self.processor, picture.size), picture.size, before.grid)
        for row, column in places.corners():
            after = self._seen_view(places.lit(picture, row, column))
            self._check_place(before, after, (row, column), "the view that saliency looks at")
        return f"a grid of {before.grid[0]}x{before.grid[1]}"

    def _seen_view(self, picture: Image.Image) -> ImageFeatures:
        """Patches of the view of the whole in the MLLM's own forward pass."""
        outputs = self.image_tokens.processed([[picture]], [self.image_tokens.image_prompt(1)])
        inputs = _on(outputs, self.model)
        images = about_images(inputs, self.processor)
        count = int((inputs["input_ids"] == self.adapter.image_token_id).sum())
        with self.adapter.watched_tower() as passes, torch.no_grad():
            self.model(**inputs, use_cache=False)
        # what is cut out of the picture may follow in a pass of its own
        hidden = self.adapter.hidden_state(passes[0].output)
        self.adapter.read_processor(self.processor)
        return self.adapter.on_whole_views(hidden, images, [count])[0]

    # Out and in

    def round_trip(self) -> str:
        picture = _picture(*SIZES[1])
        expected = self._features(picture).values
        with tempfile.TemporaryDirectory() as folder:
            path = save_encoder(self.adapter, self.processor, Path(folder) / "encoder", {"license": "other"})
            encoder = load_encoder(path)
        image_processor = self.adapter.image_processor(self.processor)
        inputs = _on(dict(image_processor(images=[picture], return_tensors="pt")), self.model)
        alone = find_adapter(encoder.to(self.model.device, self.model.dtype), encoder=True)
        with torch.no_grad():
            found = alone.patch_features(inputs)[0].values
        assert found.shape == expected.shape, f"features of shape {tuple(found.shape)}, {tuple(expected.shape)} before"
        gap = (found - expected).abs().max().item()
        assert gap <= 1e-4 * max(1.0, expected.abs().max().item()), f"features are {gap:.2g} apart after the round trip"
        return f"{type(encoder).__name__}, features {gap:.1g} apart"

    def graft(self) -> str:
        encoder = self.adapter.extract()
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.mul_(1.1)
        other = find_adapter(copy.deepcopy(self.model))
        other.graft(encoder)
        apart = [
            name
            for (name, ours), theirs in zip(encoder.named_parameters(), other.tower.parameters(), strict=True)
            if not torch.equal(ours, theirs)
        ]
        assert not apart, f"{apart[0]} is not what was grafted"
        untouched = dict(self.model.named_parameters())
        changed = [
            name
            for name, parameter in other.model.named_parameters()
            if not is_inside(name, (other.tower_path,)) and not torch.equal(parameter, untouched[name])
        ]
        assert not changed, f"grafting changed {changed[0]}"
        return f"{sum(1 for _ in encoder.parameters())} tensors"

    def card(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = save_encoder(self.adapter, self.processor, Path(folder) / "encoder", {"license": "other"})
            text = (path / "README.md").read_text(encoding="utf-8")
            snippet = next((part for part in text.split("```python")[1:] if "from_pretrained" in part), "")
            code = snippet.split("```")[0]
            assert code.strip(), "the card has no lines that load the encoder"
            picture = Path(folder) / "picture.png"
            _picture(*SIZES[1]).save(picture)
            runnable = _with_local_names(code, str(path), str(picture))
            # the card is ours, and its lines are what a reader would paste
            exec(compile(runnable, "card", "exec"), {"image": _picture(*SIZES[1])})
        return f"{len(code.strip().splitlines())} lines"


def _with_local_names(code: str, folder: str, picture: str) -> str:
    """The card's lines with the folder and a picture of this machine in the place of its examples."""
    code = re.sub(r'from_pretrained\(\s*"[^"]*"', f'from_pretrained("{folder}"', code)
    code = re.sub(r'load_encoder\(\s*"[^"]*"', f'load_encoder("{folder}"', code)
    return re.sub(r'Image\.open\(\s*"[^"]*"', f'Image.open("{picture}"', code)


def _picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise: no two patches are alike."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _row(name: str, question: str, images: list[Image.Image]) -> dict[str, Any]:
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
    return {
        "id": name,
        "images": images,
        "image_key": "".join(str(id(image)) for image in images),
        "prompt": [{"role": "user", "content": content}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a red cat"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a red dog!"}]}],
    }


def _resolved(
    size: tuple[int, int], features: Callable[[Image.Image], ImageFeatures]
) -> tuple[Image.Image, ImageFeatures]:
    """A picture of some shape, as large as its patches need to be changed one by one, and its features."""
    for scale in (1, 2, 4):
        picture = _picture(size[0] * scale, size[1] * scale)
        seen = features(picture)
        if min(seen.grid) >= COARSE and FINE * max(seen.grid) <= min(picture.size):
            break
    return picture, seen


def _brightest(before: ImageFeatures, after: ImageFeatures) -> tuple[int, int]:
    """Row and column of the patch whose features moved most."""
    moved = (after.values - before.values).float().norm(dim=1).reshape(before.grid)
    row, column = divmod(int(moved.argmax()), before.grid[1])
    return row, column


def _apart(first: tuple[int, int], second: tuple[int, int]) -> int:
    return max(abs(first[0] - second[0]), abs(first[1] - second[1]))


@dataclass(frozen=True)
class _Places:
    """Where the patches of a grid lie in a picture.

    Attributes:
        box: of the picture that the grid covers, as `VisionAdapter.shown_box` says it.
        size: width and height of the picture.
        grid: rows and columns.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    grid: tuple[int, int]

    def edges(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom pixel of a patch; those of a border lie outside the picture."""
        left, top, right, bottom = self.box
        across, down = (right - left) / self.grid[1], (bottom - top) / self.grid[0]
        shares = left + across * column, top + down * row, left + across * (column + 1), top + down * (row + 1)
        return tuple(round(share * self.size[axis % 2]) for axis, share in enumerate(shares))  # type: ignore[return-value]

    def _shown(self) -> tuple[list[int], list[int]]:
        """Rows and columns of patches of which most shows the picture, and not a border around it."""
        rows: list[int] = []
        columns: list[int] = []
        for found, count, axis in ((rows, self.grid[0], 1), (columns, self.grid[1], 0)):
            for index in range(count):
                edges = self.edges(index, index)
                start, stop = edges[axis], edges[axis + 2]
                if min(stop, self.size[axis]) - max(start, 0) > 0.6 * max(1, stop - start):
                    found.append(index)
        return rows, columns

    def corners(self) -> list[tuple[int, int]]:
        """The outermost patches that show the picture."""
        rows, columns = self._shown()
        ends = [(row, column) for row in (rows[0], rows[-1]) for column in (columns[0], columns[-1])]
        return list(dict.fromkeys(ends))

    def told_apart(self) -> list[tuple[int, int]]:
        """Corners and two patches inside, no two alike under a transposition."""
        rows, columns = self._shown()
        inside = [
            (rows[len(rows) // 3], columns[2 * len(columns) // 3]),
            (rows[2 * len(rows) // 3], columns[len(columns) // 4]),
        ]
        return list(dict.fromkeys([*self.corners(), *inside]))

    def lit(self, picture: Image.Image, row: int, column: int) -> Image.Image:
        """The picture with other pixels where a patch lies."""
        left, top, right, bottom = self.edges(row, column)
        left, top = max(0, left), max(0, top)
        pixels = np.array(picture)
        part = pixels[top : max(bottom, top + 1), left : max(right, left + 1)]
        part[...] = 255 - part
        return Image.fromarray(pixels)


def _on(outputs: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    return {name: on_model(value, model) for name, value in outputs.items()}


def _listed(sizes: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes)


def _may_be_deaf(name: str) -> bool:
    return name.endswith(("k_proj.bias", "key.bias", "class_embedding", "cls_token"))
