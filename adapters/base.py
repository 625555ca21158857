"""The whole contract between this package and one family of MLLMs.

Notation for shapes: I images, P patches of one image, D tower width, L tokens of one sequence.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import ModelOutput

from pivot_plugin.errors import EncoderError, ModelError

from .grids import ImageFeatures, on_grids, patch_size
from .unserved import REMEDY, is_quantiser, why_unserved
from .views import (
    Box,
    End,
    has_tile_axis,
    one_view_processor,
    patches_in_blocks,
    pixels_of,
    real_tiles,
    settings_of,
    shown_box,
    stacked_views,
    views_of_each,
    whole_end,
)

FEATURE_LAYER = "vision_feature_layer"
WHOLE_VIEW = "vision_whole_view"
IN_BLOCKS = "vision_patches_in_blocks"
MISMATCHES_SHOWN = 12

Part = Literal["encoder", "projector", "language_model"]
ImageInputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TowerPass:
    """One call of a vision tower.

    Attributes:
        args, kwargs: that it was given.
        output: that it answered.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: ModelOutput


@dataclass(frozen=True)
class TowerArgument:
    """What a tower is given.

    Attributes:
        value: the tensor.
        code: the expression that makes it of `inputs`, what an image processor gives.
    """

    value: torch.Tensor
    code: str


@dataclass(frozen=True)
class Assembled:
    """An MLLM made of an encoder and a language model.

    Attributes:
        model: with a projector whose linear layers are still to be drawn.
        image_text: what stands for an image in a chat template.
        processor: makes its processor of the chat template.
    """

    model: PreTrainedModel
    image_text: str
    processor: Callable[[str], ProcessorMixin]


class VisionAdapter:
    """What must be known of an MLLM family. The defaults serve any transformers model with `get_encoder`.

    What a family may have to say otherwise, by what needs it; most need two of these:

        to train     projector_names, unread_names, blocks, feature_layer, image_token_id, select_images, positions
        to probe     tower_arguments, run_tower, hidden_state, on_grid, project, whole_views, tokens_on_grid, shown_box
        to publish   image_processor, usage
        to graft     replace_tower, projector_first_layer
        to assemble  assemble, begin_projector, load

    A stand-alone encoder has an adapter too, of which only what concerns images is of use: its tower path is "".

    Args:
        model: the MLLM, never changed by an adapter except by `graft`; or a stand-alone encoder.
        family: name of the family, shown to users; defaults to the class's own.

    Raises:
        ModelError: if the model has no vision tower.
    """

    family: str = "generic"
    projector_names: ClassVar[tuple[str, ...]] = (
        "multi_modal_projector",
        "mm_projector",
        "connector",
        "merger",
        "aligner",
        "projector",
        "vision_projection",
        "vision_adapter",
        "embed_vision",
        "resampler_model",
        "visual_embeddings_table",
        "patch_merger",
    )
    """Names of the modules between tower and language model, wherever they stand."""
    unread_names: ClassVar[tuple[str, ...]] = ("head", "pooler")
    """Names of modules directly in the tower whose outputs the projector never reads."""
    lmms_eval_name: ClassVar[str | None] = None
    """What lmms-eval calls the family (`--model`), None where it does not know it."""

    def __init__(self, model: PreTrainedModel, family: str | None = None) -> None:
        self.model = model
        if family is not None:
            self.family = family
        self.tower_path = self._find_tower()
        # of an encoder by itself, what it was saved with
        self.whole_view: End | None = getattr(self.tower.config, WHOLE_VIEW, None)
        self.in_blocks: bool | None = getattr(self.tower.config, IN_BLOCKS, None)
        # of processors, by their settings: measuring them takes a dozen pictures
        self._read: str | None = None
        self._boxes: dict[tuple[str, tuple[int, int]], Box] = {}

    # Where things are

    def _find_tower(self) -> str:
        if is_encoder(self.model):
            # whatever it has inside
            return ""
        encoder = self.model.get_encoder(modality="image")
        # get_encoder answers with the model itself where it finds no encoder
        for path, module in self.model.named_modules():
            if path and module is encoder and isinstance(module, PreTrainedModel):
                return path
        if (reason := why_unserved(self.model)) is not None:
            raise ModelError(f"{type(self.model).__name__} {reason}.", REMEDY)
        raise ModelError(
            f"{type(self.model).__name__} has no vision tower: get_encoder(modality='image') finds none.",
            "Pass a multimodal model such as LlavaForConditionalGeneration, or install a plugin with an adapter "
            "that knows where its tower is (`pivot adapters` lists what is installed).",
        )

    @property
    def tower(self) -> PreTrainedModel:
        """The vision tower inside the model."""
        return self.model.get_submodule(self.tower_path)

    @cached_property
    def other_tower_paths(self) -> tuple[str, ...]:
        """Paths of further towers that images go through, outermost only; they are no part of what trains.

        Towers for videos, and quantisers that draw, are none.
        """
        paths: list[str] = []
        tower = set(self.tower.modules())
        inside = set(self.model.get_decoder().modules())
        for path, module in self.model.named_modules():
            if not path or module in tower or module in inside or any(_inside(path, outer) for outer in paths):
                continue
            takes_images = "pixel_values" in inspect.signature(module.forward).parameters
            takes_images = takes_images and "video" not in path.rpartition(".")[2] and not is_quantiser(module)
            if isinstance(module, PreTrainedModel) and takes_images and tower.isdisjoint(module.modules()):
                paths.append(path)
        return tuple(paths)

    @cached_property
    def projector_paths(self) -> tuple[str, ...]:
        """Paths of the modules that map tower features into the language model, outermost only."""
        found: list[str] = []
        for path, module in self.model.named_modules():
            if path.rpartition(".")[2] not in self.projector_names or any(_inside(path, outer) for outer in found):
                continue
            is_list = isinstance(module, nn.ModuleList)
            found += [f"{path}.{index}" for index in range(len(module))] if is_list else [path]
        return tuple(found)

    @cached_property
    def language_model_paths(self) -> tuple[str, ...]:
        """Paths of the language model and its output head."""
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        return tuple(path for path, module in self.model.named_modules() if path and module in (decoder, head))

    def part_of(self, name: str) -> Part:
        """Which part a parameter of the model belongs to; what is neither tower nor language model is projector."""
        if any(_inside(name, path) for path in self.projector_paths):
            return "projector"
        if _inside(name, self.tower_path):
            return "encoder"
        if any(_inside(name, path) for path in self.language_model_paths):
            return "language_model"
        return "projector"

    # To train

    @property
    def feature_layer(self) -> int | None:
        """Index into the tower's hidden states that the projector reads, None for the tower's own output."""
        layers = getattr(self.model.config, "vision_feature_layer", None)
        if isinstance(layers, list | tuple):
            depth = len(self.blocks())
            return max(layer if layer >= 0 else depth + 1 + layer for layer in layers)
        return layers

    def blocks(self) -> list[str]:
        """Paths of the tower's transformer blocks in order."""
        lists = [
            (path, module)
            for path, module in self.tower.named_modules()
            if isinstance(module, nn.ModuleList) and not any(name in path.split(".") for name in self.unread_names)
        ]
        if not lists:
            return []
        path, longest = max(lists, key=lambda item: len(item[1]))
        return [f"{self.tower_path}.{path}.{index}" for index in range(len(longest))]

    def unread_paths(self) -> tuple[str, ...]:
        """Paths in the tower that the features in use never pass through, so that nothing there can be trained."""
        blocks = self.blocks()
        used = len(blocks)
        if self.feature_layer is not None:
            used = self.feature_layer if self.feature_layer >= 0 else used + 1 + self.feature_layer
        # a hidden state is taken before the norm that closes the tower
        names = self.unread_names if self.feature_layer is None else (*self.unread_names, "post_layernorm")
        heads = [
            f"{self.tower_path}.{path}"
            for path, _ in self.tower.named_modules()
            if path.rpartition(".")[2] in names and not any(_inside(f"{self.tower_path}.{path}", b) for b in blocks)
        ]
        return (*blocks[used:], *heads)

    def is_trainable(self, name: str) -> bool:
        """Whether a parameter or module of the model lies on the way of the features in use."""
        return not any(_inside(name, path) for path in self.unread_paths())

    def lora_targets(self) -> list[str]:
        """Full names of the tower's linear layers that take LoRA: those that reach the features in use.

        Raises:
            ModelError: if the tower has no linear layer on the way of its features.
        """
        skipped = (*self.unread_paths(), *self.projector_paths)
        targets = [
            f"{self.tower_path}.{path}"
            for path, module in self.tower.named_modules()
            if isinstance(module, nn.Linear) and not any(_inside(f"{self.tower_path}.{path}", s) for s in skipped)
        ]
        if not targets:
            raise ModelError(
                f"The vision tower {type(self.tower).__name__} at {self.tower_path} has no linear layer that reaches "
                "the features in use, so LoRA has nothing to attach to.",
                'Train its weights themselves with lora=None, or train another part with train="encoder+projector".',
            )
        return targets

    @property
    def image_token_id(self) -> int:
        """The token that stands for one image feature in the language model's input."""
        for name in ("image_token_id", "image_token_index"):
            if isinstance(token := getattr(self.model.config, name, None), int):
                return token
        if (reason := why_unserved(self.model)) is not None:
            raise ModelError(f"{type(self.model).__name__} {reason}.", REMEDY)
        raise ModelError(
            f"{type(self.model.config).__name__} names no image token (image_token_id).",
            "Install or write a plugin whose adapter overrides image_token_id.",
        )

    def select_images(self, inputs: ImageInputs, start: int, stop: int) -> dict[str, torch.Tensor]:
        """The share of some images in what the processor made of several: rows start to stop of every tensor.

        Args:
            inputs: processor outputs about images, such as pixel_values, for I images in order.
            start: index of the first image wanted.
            stop: index after the last.
        """
        shares = {}
        grids = inputs.get("image_grid_thw")
        for name, value in inputs.items():
            if grids is not None and len(value) == int(grids.prod(dim=1).sum()) != len(grids):
                # one row per patch
                ends = [0, *grids.prod(dim=1).cumsum(0).tolist()]
                shares[name] = value[ends[start] : ends[stop]]
            else:
                shares[name] = value[start:stop]
        return shares

    def positions(self, tokens: torch.Tensor, images: ImageInputs) -> torch.Tensor | None:
        """Position ids of one whole sequence, or None where they simply count up.

        Args:
            tokens: (L,) token ids, images expanded.
            images: processor outputs about this sequence's images.

        Returns:
            (L,) or, for multi-axis rotary embeddings, (axes, L) integers; None for 0, 1, ..., L-1. Where the model
            counts positions by itself (`get_rope_index`), it is asked.
        """
        count = getattr(self.model.base_model, "get_rope_index", None)
        if count is None:
            return None
        wanted = inspect.signature(count).parameters
        is_image = (tokens == self.image_token_id).long()[None]
        available = {"input_ids": tokens[None], "attention_mask": torch.ones_like(is_image), **images}
        # what tells images from text is called mm_token_type_ids by most
        available |= {name: is_image for name in wanted if name.endswith("token_type_ids")}
        positions = count(**{name: available[name] for name in wanted if name in available})[0]
        return positions[0] if positions.ndim == 2 else positions[:, 0]

    # To probe

    def patch_features(self, inputs: ImageInputs, tower: PreTrainedModel | None = None) -> list[ImageFeatures]:
        """Features of every image on its patch grid, as the projector reads them.

        Args:
            inputs: processor outputs about images, for I images.
            tower: a stand-alone encoder of the same class; defaults to the tower inside the model.

        Returns:
            I records. Where an image is cut into tiles, of the tile that shows the whole of it.

        Raises:
            ModelError: if the features do not form a grid.
        """
        tower = tower or self.tower
        hidden = self.hidden_state(self.run_tower(tower, inputs))
        views = views_of_each(inputs)
        if views is not None and len(hidden) == sum(views) > len(views) and self.whole_view is not None:
            hidden = hidden[_whole_rows(views, self.whole_view)]
        return self.on_grid(hidden, inputs, tower)

    def run_tower(self, tower: PreTrainedModel, inputs: ImageInputs) -> ModelOutput:
        """What a tower answers about one view of each image, its hidden states included.

        Args:
            tower: the model's own, or a stand-alone encoder of the same class.
            inputs: processor outputs about images.
        """
        accepted = inspect.signature(tower.forward).parameters
        arguments: dict[str, Any] = {n: one.value for n, one in self.tower_arguments(tower, inputs).items()}
        if "output_hidden_states" in accepted or any(p.kind == p.VAR_KEYWORD for p in accepted.values()):
            arguments["output_hidden_states"] = self.feature_layer is not None
        return tower(**arguments)

    def tower_arguments(self, tower: PreTrainedModel, inputs: ImageInputs) -> dict[str, TowerArgument]:
        """What a tower is given of a processor's outputs, by its own names for it.

        Args:
            tower: the model's own, or a stand-alone encoder of the same class.
            inputs: processor outputs about images.
        """
        arguments = {}
        for name in inspect.signature(tower.forward).parameters:
            argument = _patch_mask(inputs, tower) if name == "patch_attention_mask" else _argument(name, inputs)
            if argument is not None:
                arguments[name] = argument
        return arguments

    @contextmanager
    def watched_tower(self) -> Iterator[list[TowerPass]]:
        """Keep what the tower is given and what it answers meanwhile, pass by pass."""
        passes: list[TowerPass] = []
        handle = self.tower.register_forward_hook(
            lambda module, args, kwargs, output: passes.append(TowerPass(args, kwargs, output)), with_kwargs=True
        )
        try:
            yield passes
        finally:
            handle.remove()

    def hidden_state(self, output: ModelOutput) -> torch.Tensor:
        """The hidden state in use among a tower's answers, (images or tiles, tokens, D), class token included."""
        layer = self.feature_layer
        # a model that reads the last one may not have asked for the others
        if layer is None or (layer == -1 and output.get("hidden_states") is None):
            return output.last_hidden_state
        return output.hidden_states[layer]

    def on_grid(self, hidden: torch.Tensor, inputs: ImageInputs, tower: PreTrainedModel) -> list[ImageFeatures]:
        """Put a hidden state of the tower, or its gradient, on the patch grids of the images.

        Args:
            hidden: as `hidden_state` gives it.
            inputs: processor outputs about the images it was computed from.
            tower: it comes from.

        Raises:
            ModelError: if the features do not form a grid.
        """
        found = on_grids(hidden, inputs, tower.config, self.in_blocks)
        if found is None:
            raise ModelError(
                f"{type(tower).__name__} gives features of shape {tuple(hidden.shape)}, which form no patch grid.",
                "Use an encoder with patch tokens, or an adapter that overrides on_grid.",
            )
        return found

    def project(self, features: ImageFeatures, tower: PreTrainedModel | None = None) -> ImageFeatures:
        """What the language model gets of one image's patch features, on its own grid.

        Args:
            features: of an image, as `patch_features` gives them.
            tower: they come from; defaults to the tower inside the model.

        Raises:
            ModelError: if there is no projector, or how it maps patches is not known.
        """
        if len(self.projector_paths) != 1:
            raise ModelError(
                f"{type(self.model).__name__} has {len(self.projector_paths)} projectors; one is expected.",
                "Measure the encoder alone, or use an adapter that overrides project.",
            )
        try:
            projected = self.model.get_submodule(self.projector_paths[0])(features.values[None])[0]
        # a projector that wants more than features, or another shape of them
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ModelError(
                f"The projector of {type(self.model).__name__} cannot be run alone: {type(error).__name__}: {error}.",
                "Measure the encoder alone, or use an adapter that overrides project.",
            ) from error
        if len(projected) != len(features.values):
            raise ModelError(
                f"The projector of {type(self.model).__name__} makes {len(projected)} tokens of "
                f"{len(features.values)} patches, and how they lie is not known.",
                "Measure the encoder alone, or use an adapter that overrides project.",
            )
        return ImageFeatures(projected, features.grid)

    def read_processor(self, processor: object) -> None:
        """Learn from a processor what its outputs do not say: which tile shows the whole, and the order of patches.

        Args:
            processor: the MLLM's, or an image processor.

        Raises:
            ModelError: if it takes no plain image, or makes several views of one, of which none shows the whole.
        """
        image_processor = getattr(processor, "image_processor", processor)
        if self._read is not None and self._read == settings_of(image_processor):
            return
        try:
            self.in_blocks = patches_in_blocks(image_processor, self.tower.config)
            self.whole_view = whole_end(image_processor, self._view_edge())
        except ValueError as reason:
            raise ModelError(
                f"What {type(processor).__name__} shows of an image is not known: {reason}.",
                "Use an adapter that overrides read_processor and whole_views.",
            ) from reason
        self._read = settings_of(image_processor)

    def _view_edge(self) -> int:
        size = getattr(self.tower.config, "image_size", None)
        return int(size if isinstance(size, int) else size[0] if size else 224)

    def whole_views(self, inputs: ImageInputs, image_tokens: Sequence[int]) -> list[int]:
        """For each image, which row of the tower's hidden states in the MLLM's own forward pass shows the whole of it.

        Args:
            inputs: processor outputs about I images.
            image_tokens: tokens of each of them in the language model's input.

        Raises:
            ModelError: where images are cut into tiles, and which are whose, or which shows the whole, is not known.
        """
        views = views_of_each(inputs, image_tokens)
        if views is None or max(views, default=1) == 1:
            return list(range(len(image_tokens)))
        if self.whole_view is None:
            raise ModelError(
                f"{type(self.model).__name__} sees {sum(views)} views of {len(views)} image(s), and which one shows "
                "the whole is not known.",
                "Call adapter.read_processor(processor) first, or use an adapter that overrides whole_views.",
            )
        return _whole_rows(views, self.whole_view)

    def on_whole_views(
        self, hidden: torch.Tensor, inputs: ImageInputs, image_tokens: Sequence[int]
    ) -> list[ImageFeatures]:
        """The tower's hidden states in the MLLM's own forward pass, or their gradients: of each image the whole.

        Args:
            hidden: as `hidden_state` gives it.
            inputs: processor outputs about I images.
            image_tokens: tokens of each of them in the language model's input.

        Raises:
            ModelError: as `whole_views` and `on_grid`.
        """
        views = self.whole_views(inputs, image_tokens)
        # towers for pictures of any size have all patches in one row
        if hidden.ndim <= 2 or len(hidden) in (1, len(views)):
            return self.on_grid(hidden, inputs, self.tower)
        of_views = {
            name: value[views] if isinstance(value, torch.Tensor) and len(value) == len(hidden) else value
            for name, value in inputs.items()
        }
        return self.on_grid(hidden[views], of_views, self.tower)

    def tokens_on_grid(self, tokens: torch.Tensor, inputs: ImageInputs) -> ImageFeatures:
        """Put the language model's image tokens of one image (or a gradient of theirs) on their grid.

        Args:
            tokens: (tokens, width).
            inputs: processor outputs about this image.

        Raises:
            ModelError: if they form no grid.
        """
        side = int(len(tokens) ** 0.5)
        if side * side != len(tokens):
            raise ModelError(
                f"{len(tokens)} image tokens of {type(self.model).__name__} form no square grid.",
                'Use at="encoder", or an adapter that overrides tokens_on_grid.',
            )
        return ImageFeatures(tokens, (side, side))

    def shown_box(self, processor: object, size: tuple[int, int]) -> Box:
        """Which part of an image its patch grid covers: left, top, right and bottom as shares of width and height.

        Args:
            processor: the MLLM's, or an image processor.
            size: width and height of the image.

        Returns:
            shares below 0 and above 1 where a border is put around the image, so that the grid covers more than it.

        Raises:
            ModelError: if the image processor takes no plain image.
        """
        image_processor = getattr(processor, "image_processor", processor)
        settings = settings_of(image_processor)
        if settings is None:
            return self._measured_box(image_processor, size)
        if (settings, size) not in self._boxes:
            self._boxes[settings, size] = self._measured_box(image_processor, size)
        return self._boxes[settings, size]

    def _measured_box(self, image_processor: Any, size: tuple[int, int]) -> Box:
        shortest = (getattr(image_processor, "size", None) or {}).get("shortest_edge")
        whole = one_view_processor(image_processor, clip=True)
        if getattr(whole, "do_center_crop", False) and shortest and not getattr(whole, "do_pad", False):
            # what is measured is right to the pixel, and this is exact
            crop, edge = whole.crop_size, min(size)
            shares = (
                crop[name] / shortest * edge / count for name, count in zip(("width", "height"), size, strict=True)
            )
            across, down = (min(1.0, share) for share in shares)
            return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2
        try:
            return shown_box(whole, size, patch_size(self.tower.config), self.tower.config)
        except ValueError as reason:
            raise ModelError(
                f"What {type(image_processor).__name__} shows of an image is not known: {reason}.",
                "Use an adapter that overrides shown_box.",
            ) from reason

    # To publish

    def extract(self) -> PreTrainedModel:
        """A stand-alone copy of the tower, in eval mode, every parameter free to train."""
        encoder = copy.deepcopy(self.tower).eval()
        encoder.config._name_or_path = ""
        # by which a loaded encoder is read at the same layer
        setattr(encoder.config, FEATURE_LAYER, self.feature_layer)
        return encoder.requires_grad_(True)

    def image_processor(self, processor: object) -> BaseImageProcessor:
        """The image processor to publish with the stand-alone encoder: a copy of the model's own.

        One that cuts images into tiles is asked not to, by every setting that transformers has for it; where no setting
        helps, and the views have one size, a plain one of that size takes its place.

        Args:
            processor: the MLLM's.
        """
        own = processor.image_processor  # type: ignore[attr-defined]
        # of what no setting and no plain processor shows in one view, `patch_features` takes the whole; what cannot be
        # learnt is refused where it is needed
        with suppress(ModelError):
            self.read_processor(processor)
        return one_view_processor(own, "clip" in str(getattr(self.tower.config, "model_type", "")))

    def usage(self, image_processor: object | None = None) -> str:
        """Two lines of Python for a model card, which read the tower by itself with nothing but transformers.

        Args:
            image_processor: that is published with it; what the tower is given is read off its outputs.

        Returns:
            code that makes `features` of `encoder`, the tower, and `inputs`, what its image processor gives.
        """
        layer = self.feature_layer
        keyword = "" if layer is None else ", output_hidden_states=True"
        read = "last_hidden_state" if layer is None else f"hidden_states[{layer}]"
        return f"outputs = encoder({self._arguments_code(image_processor)}{keyword})\nfeatures = outputs.{read}"

    def _arguments_code(self, image_processor: object | None) -> str:
        if image_processor is None:
            by_grid = "grid_thw" in inspect.signature(self.tower.forward).parameters
            return 'inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]' if by_grid else "**inputs"
        picture = Image.new("RGB", (160, 96), (200, 100, 50))
        inputs = dict(image_processor(images=[picture], return_tensors="pt"))  # type: ignore[operator]
        codes = {name: argument.code for name, argument in self.tower_arguments(self.tower, inputs).items()}
        if codes == {name: f'inputs["{name}"]' for name in inputs}:
            return "**inputs"
        first, *others = codes
        return ", ".join([codes[first], *(f"{name}={codes[name]}" for name in others)])

    # To graft

    def mismatches(self, encoder: PreTrainedModel) -> list[str]:
        """Why an encoder cannot take the place of this model's tower as it is: every difference, in words."""
        found = []
        if type(encoder) is not type(self.tower):
            found.append(
                f"The encoder is a {type(encoder).__name__}, this {type(self.model).__name__} has a "
                f"{type(self.tower).__name__} at {self.tower_path}"
            )
        for name in ("hidden_size", "image_size", "patch_size", "num_hidden_layers", "depth"):
            theirs, ours = (getattr(model.config, name, None) for model in (encoder, self.tower))
            if theirs is not None and ours is not None and theirs != ours:
                found.append(f"{name} is {theirs} in the encoder and {ours} in the model's tower")
        read = getattr(encoder.config, FEATURE_LAYER, self.feature_layer)
        if read != self.feature_layer:
            found.append(f"the encoder was trained to be read at layer {read}, the model reads {self.feature_layer}")
        if type(encoder) is not type(self.tower):
            return found
        new, old = encoder.state_dict(), self.tower.state_dict()
        for name in sorted(new.keys() | old.keys()):
            if name not in new or name not in old:
                owner = "model's tower" if name in old else "encoder"
                found.append(f"Only the {owner} has the tensor {name!r}")
            elif new[name].shape != old[name].shape:
                found.append(
                    f"Tensor {name!r} has shape {tuple(new[name].shape)} in the encoder and "
                    f"{tuple(old[name].shape)} in the model's tower"
                )
        return found

    def graft(self, encoder: PreTrainedModel) -> None:
        """Copy an encoder's weights into this model's tower, keeping the tower's device and precision.

        Raises:
            EncoderError: with every mismatch of class, layer, tensors or sizes; the model is unchanged then.
        """
        if found := self.mismatches(encoder):
            more = f"; and {len(found) - MISMATCHES_SHOWN} more" if len(found) > MISMATCHES_SHOWN else ""
            raise EncoderError(
                f"The encoder does not fit: {'; '.join(found[:MISMATCHES_SHOWN])}{more}.",
                "Graft one extracted from a model of the same architecture, or give it a new projector: "
                'projector="new".',
            )
        self.tower.load_state_dict(encoder.state_dict())

    def replace_tower(self, encoder: PreTrainedModel, image_processor: object, processor: object, layer: int) -> None:
        """Put an encoder of any class in the place of the tower, with a new projector of the model's own kind.

        Configuration and modules are rebuilt so that the saved model loads as a plain transformers one; the projector's
        weights are the caller's to initialise.

        Args:
            encoder: stand-alone; becomes part of the model.
            image_processor: its own.
            processor: the model's, changed to count this encoder's patches.
            layer: hidden state that the projector is to read.

        Raises:
            EncoderError: if the family cannot, or this encoder does not suit it; nothing is changed then.
        """
        raise EncoderError(
            f"A {type(self.model).__name__} (family {self.family}) takes no tower of another class or size: its "
            "language model was built around its own.",
            "Graft an encoder of the same architecture, or use a LLaVA-like model.",
        )

    @property
    def projector_first_layer(self) -> str | None:
        """Path of the projector's first linear layer where another model's projector can begin with it, else None."""
        return None

    # To assemble

    def assemble(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: object,
        feature_layer: int,
    ) -> Assembled | None:
        """The MLLM that this stand-alone encoder makes with a language model; None leaves it to the next adapter.

        Args:
            decoder: causal language model, whose weights become the MLLM's.
            tokenizer: its own, to which tokens may be added.
            image_processor: the encoder's.
            feature_layer: hidden state that the projector is to read, where the family leaves a choice.

        Raises:
            EncoderError: for an encoder or a language model that the family cannot have.
        """
        return None

    def projector_layers(self) -> list[str]:
        """Paths of the projector's linear layers, from the tower to the language model."""
        return [
            path
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and any(_inside(path, outer) for outer in self.projector_paths)
        ]

    def begin_projector(self, tuned: Mapping[str, torch.Tensor], count: int) -> list[nn.Linear]:
        """Have the projector begin with the first layers of another one, and go on with as many new ones.

        Args:
            tuned: weights of the projector that the encoder was trained with, as they lie beside it.
            count: layers to take of it.

        Returns:
            the new layers whose weights are the caller's to draw; none where the projector's own serve.

        Raises:
            EncoderError: if the family cannot, or the layers do not fit; nothing is changed then.
        """
        raise EncoderError(
            f"The projector of a {type(self.model).__name__} (family {self.family}) cannot begin with the layers of "
            "another.",
            'Use the projector variant "0", or an encoder that a LLaVA reads.',
        )

    def load(self, folder: Path) -> PreTrainedModel:
        """A saved model of this family, with a projector as `begin_projector` leaves it.

        Args:
            folder: written by the model's `save_pretrained`.
        """
        return type(self.model).from_pretrained(folder, dtype="auto")


def is_of_class(model: PreTrainedModel, *names: str) -> bool:
    """Whether a model is of one of some classes of transformers, which not every release has.

    Args:
        model: any.
        names: of the classes.
    """
    return any(
        kind.__name__ in names and kind.__module__.partition(".")[0] == "transformers" for kind in type(model).__mro__
    )


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether a model is an encoder by itself: one that is never given token ids."""
    return "input_ids" not in inspect.signature(model.forward).parameters


def _inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _whole_rows(views: Sequence[int], end: End) -> list[int]:
    """Of each image's views, one image after the other, the row of its first or last."""
    ends = list(itertools.accumulate(views))
    return [stop - (1 if end == "last" else count) for stop, count in zip(ends, views, strict=True)]


def _argument(parameter: str, inputs: ImageInputs) -> TowerArgument | None:
    """The processor's output that a parameter of a tower means: of its name, or else of the same two last words."""
    if parameter in ("hidden_states", "pixel_values"):
        name = next((name for name in inputs if name.startswith("pixel_values")), None)
        if name is None:
            return None
        tiles = ".flatten(0, 1)" if has_tile_axis(inputs[name]) else ""
        return TowerArgument(stacked_views(inputs[name]), f'inputs["{name}"]{tiles}')
    ending = parameter.split("_")[-2:]
    alike = (name for name in inputs if name.split("_")[-2:] == ending)
    name = parameter if parameter in inputs else next(alike, None)
    return None if name is None else TowerArgument(inputs[name], f'inputs["{name}"]')


def _patch_mask(inputs: ImageInputs, tower: PreTrainedModel) -> TowerArgument | None:
    """(V, rows, columns) which patches show anything of their picture, of a mask that says so of pixels."""
    name = next((name for name in ("pixel_attention_mask", "pixel_mask") if name in inputs), None)
    patch, pixels = patch_size(tower.config), pixels_of(inputs)
    if name is None or patch is None or pixels is None or inputs[name].shape[-2:] != pixels.shape[-2:]:
        return None
    has_tiles = has_tile_axis(pixels)
    mask = inputs[name][real_tiles(pixels)] if has_tiles else inputs[name]
    down, across = patch
    shown = mask.unfold(1, down, down).unfold(2, across, across).sum((-1, -2)) > 0
    tiles = ".flatten(0, 1)" if has_tiles else ""
    code = f'inputs["{name}"]{tiles}.unfold(1, {down}, {down}).unfold(2, {across}, {across}).sum((-1, -2)) > 0'
    return TowerArgument(shown, code)
