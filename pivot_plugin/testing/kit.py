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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.adapters import ImageFeatures, VisionAdapter
from pivot_plugin.config import PARTS
from pivot_plugin.encoders import load_encoder, save_encoder
from pivot_plugin.errors import ModelError, PivotError
from pivot_plugin.models.evaluating import evaluating, undisturbed
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.image_tokens import ImageTokens
from pivot_plugin.probes.patch_grid import FeaturesOf, grid_finding, noise, picture_features, seen_view
from pivot_plugin.training.batch import ForestCollator
from pivot_plugin.training.forest_check import read_rows
from pivot_plugin.training.forward import on_model
from pivot_plugin.training.plan import is_inside

Result = Literal["passed", "failed", "not verified", "skipped"]
# pictures of the kit: square, wide and tall; and one that processors cut into tiles, if they cut any
SIZES = ((96, 96), (240, 96), (96, 240))
LARGE = (384, 384)
# of rows, less far apart: some processors can put no pictures of very different shapes into one batch
ROW_SIZES = ((96, 96), (160, 96), (96, 160))


@dataclass(frozen=True)
class Check:
    """One promise of the contract, tried.

    Attributes:
        name: of the promise.
        result: "passed", "failed", "not verified" where the model mixes its patches too much to tell, or "skipped"
            where it does not apply.
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


class NotVerified(Exception):
    """A promise that the model does not show to be kept or broken."""


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
    except NotVerified as reason:
        return Check(name, "not verified", str(reason))
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
        images = self.image_tokens.process_images([[noise(size)] for size in ROW_SIZES])
        counts = ", ".join(str(sum(of_image)) for of_image in images.counts)
        found = f"{counts} image tokens for {_listed(ROW_SIZES)} px"
        try:
            self.image_tokens.process_images([[noise(SIZES[1])], [noise(LARGE)]])
        except ModelError as error:
            return f"{found}; {error.finding}"
        return found

    # What trains

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        """Rows with one image, with several, and with none, as far as the processor takes them."""
        pictures = [noise(size, seed) for seed, size in enumerate(ROW_SIZES)]
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
        # what tiles go through may be their own
        return self._reached_by(SIZES[0]) | self._reached_by(LARGE)

    def _reached_by(self, size: tuple[int, int]) -> set[str]:
        outputs = self.image_tokens.processed([[noise(size)]], [self.image_tokens.image_prompt(1)])
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

    @cached_property
    def _image_processor(self) -> Any:
        """What is published with the encoder."""
        return self.adapter.image_processor(self.processor)

    def _features(self, picture: Image.Image) -> ImageFeatures:
        return picture_features(self.adapter, self._image_processor, picture)

    def lit_patch(self) -> str:
        return self._verified(self._features, SIZES)

    def whole_view(self) -> str:
        """The view that saliency looks at shows all of the picture, each patch its own place."""
        return self._verified(partial(seen_view, self.adapter, self.processor), SIZES[:2])

    def _verified(self, features: FeaturesOf, sizes: Sequence[tuple[int, int]]) -> str:
        """What mosaics of some sizes show of where features lie.

        Raises:
            AssertionError: if they lie elsewhere.
            NotVerified: if the model does not tell.
        """
        findings = []
        for size in sizes:
            finding = grid_finding(features, partial(self.adapter.shown_box, self.processor), size)
            assert finding.result != "wrong", finding.reason
            if finding.result == "not verified":
                raise NotVerified(f"grid not verified: {finding.reason}")
            findings.append(finding)
        return f"grids of {', '.join(finding.reason for finding in findings)}; each patch shows its own place"

    # Out and in

    def round_trip(self) -> str:
        picture = noise(SIZES[1])
        expected = self._features(picture).values
        with tempfile.TemporaryDirectory() as folder:
            path = save_encoder(self.adapter, self.processor, Path(folder) / "encoder", {"license": "other"})
            encoder = load_encoder(path)
        alone = find_adapter(encoder.to(self.model.device, self.model.dtype), encoder=True)
        found = picture_features(alone, self._image_processor, picture).values
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
            noise(SIZES[1]).save(picture)
            runnable = _with_local_names(code, str(path), str(picture))
            # the card is ours, and its lines are what a reader would paste
            exec(compile(runnable, "card", "exec"), {"image": noise(SIZES[1])})
        return f"{len(code.strip().splitlines())} lines"


def _with_local_names(code: str, folder: str, picture: str) -> str:
    """The card's lines with the folder and a picture of this machine in the place of its examples."""
    code = re.sub(r'from_pretrained\(\s*"[^"]*"', f'from_pretrained("{folder}"', code)
    code = re.sub(r'load_encoder\(\s*"[^"]*"', f'load_encoder("{folder}"', code)
    return re.sub(r'Image\.open\(\s*"[^"]*"', f'Image.open("{picture}"', code)


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


def _on(outputs: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    return {name: on_model(value, model) for name, value in outputs.items()}


def _listed(sizes: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes)


def _may_be_deaf(name: str) -> bool:
    return name.endswith(("k_proj.bias", "key.bias", "class_embedding", "cls_token"))
