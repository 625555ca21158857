"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: a CLIP or SigLIP tower, one of its hidden states, an MLP projector.

Also every vision transformer by itself: what it makes with a language model is a LLaVA.
"""

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from PIL import Image
from safetensors import safe_open
from tokenizers import AddedToken
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils import ModelOutput

from pivot_plugin.errors import EncoderError
from pivot_plugin.hooks import hookimpl

from .base import Assembled, ImageInputs, VisionAdapter, is_encoder
from .grids import ImageFeatures
from .views import plain_processor

IMAGE_TOKEN = "<image>"
# where transformers' own projector has linear_1 and linear_2, one with more layers is a row of them: 0, 2, 4, ...
_DEEP_LAYER = re.compile(r".*multi_modal_projector\.(\d+)\.(weight|bias)")
LinearWeights = tuple[torch.Tensor, torch.Tensor | None]


class LlavaAdapter(VisionAdapter):
    """LLaVA-1.5: one square image, features of layer -2, so the last block and the closing norm are never used."""

    family = "llava"
    lmms_eval_name = "llava_hf"

    @property
    def projector_first_layer(self) -> str | None:
        return f"{self.projector_paths[0]}.linear_1"

    def replace_tower(self, encoder: PreTrainedModel, image_processor: object, processor: object, layer: int) -> None:
        patches, others = _tokens(encoder, image_processor, layer)
        self._check_replacement(encoder, processor)
        config, backbone = self.model.config, self.model.base_model
        strategy = "default" if others else "full"
        device, dtype = self.model.device, self.model.dtype
        config.vision_config = encoder.config
        config.vision_feature_layer = layer
        config.vision_feature_select_strategy = strategy
        config.image_seq_length = patches + others - bool(others)
        backbone.vision_tower = encoder.to(device=device, dtype=dtype)
        projector_cls = type(backbone.multi_modal_projector)
        backbone.multi_modal_projector = projector_cls(config).to(device=device, dtype=dtype)
        self._teach(processor, image_processor, patches, others, strategy)
        self.__dict__.pop("projector_paths", None)

    def begin_projector(self, tuned: Mapping[str, torch.Tensor], count: int) -> list[nn.Linear]:
        layers = _linear_layers(tuned)
        takes, gives = layers[0][0].shape[1], self.tower.config.hidden_size
        if takes != gives:
            raise EncoderError(
                f"The tuned projector takes {takes} numbers per patch, the encoder gives {gives}.",
                'Use the projector variant "0".',
            )
        layers = layers[:count]
        projector = self.model.base_model.multi_modal_projector
        if count == 1 and layers[0][0].shape == projector.linear_1.weight.shape:
            # what plain transformers have is what is written
            _fill(projector.linear_1, layers[0])
            return []
        width = self.model.config.get_text_config().hidden_size
        sizes = [(weight.shape[1], weight.shape[0]) for weight, _ in layers]
        sizes += [(layers[-1][0].shape[0], width), *[(width, width)] * (count - 1)]
        weight = projector.linear_1.weight
        deep = _deep_projector(sizes).to(device=weight.device, dtype=weight.dtype)
        linear = [module for module in deep if isinstance(module, nn.Linear)]
        for module, layer in zip(linear, layers, strict=False):
            _fill(module, layer)
        self.model.base_model.multi_modal_projector = deep
        return linear[count:]

    def load(self, folder: Path) -> PreTrainedModel:
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                deep = [name for name in sorted(tensors.keys()) if _DEEP_LAYER.fullmatch(name)]
                weights |= {name: tensors.get_tensor(name) for name in deep}
        if not weights:
            return super().load(folder)
        # transformers' loader knows LLaVA's own projector alone, and would tell at length what it does not find
        with _only_errors():
            model = super().load(folder)
        own = {name.partition("multi_modal_projector.")[2]: tensor for name, tensor in weights.items()}
        numbers = sorted(int(name.removesuffix(".weight")) for name in own if name.endswith(".weight"))
        shapes = [own[f"{number}.weight"].shape for number in numbers]
        projector = _deep_projector([(takes, gives) for gives, takes in shapes])
        projector.load_state_dict(own, assign=True)
        model.base_model.multi_modal_projector = projector
        return model.eval()

    def _check_replacement(self, encoder: PreTrainedModel, processor: object) -> None:
        """Refuse an encoder that the family cannot take."""

    def _teach(self, processor: object, image_processor: object, patches: int, others: int, strategy: str) -> None:
        """Have the model's processor prepare images for another encoder, and count its tokens."""
        config = self.model.config.vision_config
        processor.image_processor = image_processor  # type: ignore[attr-defined]
        processor.patch_size = _edge(config.patch_size)  # type: ignore[attr-defined]
        processor.num_additional_image_tokens = others  # type: ignore[attr-defined]
        processor.vision_feature_select_strategy = strategy  # type: ignore[attr-defined]


class TiledLlavaAdapter(LlavaAdapter):
    """LLaVA-NeXT and LLaVA-OneVision: an image is its small version followed by tiles of the large one."""

    family = "llava-next"
    lmms_eval_name = "llava_hf"

    def run_tower(self, tower: PreTrainedModel, inputs: ImageInputs) -> ModelOutput:
        pixels = inputs["pixel_values"]
        return super().run_tower(tower, {"pixel_values": pixels[:, 0] if pixels.ndim == 5 else pixels})

    def whole_views(self, inputs: ImageInputs, image_tokens: Sequence[int]) -> list[int]:
        # the small version comes first, then the tiles that the model finds by the image's size
        pinpoints, side = self.model.config.image_grid_pinpoints, self.tower.config.image_size
        tiles = [image_size_to_num_patches(size, pinpoints, side) for size in inputs["image_sizes"].tolist()]
        return [0, *itertools.accumulate(tiles[:-1])]

    def shown_box(self, processor: object, size: tuple[int, int]) -> tuple[float, float, float, float]:
        return 0.0, 0.0, 1.0, 1.0

    def tokens_on_grid(self, tokens: torch.Tensor, inputs: ImageInputs) -> ImageFeatures:
        side = self.tower.config.image_size // self.tower.config.patch_size
        return ImageFeatures(tokens[: side * side], (side, side))

    def _check_replacement(self, encoder: PreTrainedModel, processor: object) -> None:
        ours, theirs = _edge(self.tower.config.image_size), _edge(encoder.config.image_size)
        if ours != theirs:
            raise EncoderError(
                f"The encoder takes images of {theirs} px, the tiles of this {type(self.model).__name__} have {ours}.",
                "Use an encoder of the same image size, or a LlavaForConditionalGeneration, which cuts no tiles.",
            )

    def _teach(self, processor: object, image_processor: object, patches: int, others: int, strategy: str) -> None:
        # it goes on cutting tiles, and colours them as the encoder knows them
        tiling = processor.image_processor  # type: ignore[attr-defined]
        for name in ("image_mean", "image_std", "resample", "rescale_factor"):
            if hasattr(image_processor, name):
                setattr(tiling, name, getattr(image_processor, name))
        super()._teach(processor, tiling, patches, others, strategy)

    def image_processor(self, processor: object) -> BaseImageProcessor:
        # the tiling processor gives 5-D pixels, which the stand-alone tower refuses
        tiling = processor.image_processor  # type: ignore[attr-defined]
        side = int(self.tower.config.image_size)
        return plain_processor(tiling, side, side, "clip" in self.tower.config.model_type)


class LlavaOnevisionAdapter(TiledLlavaAdapter):
    """LLaVA-OneVision: tiles for a single image, one view each where a prompt has several."""

    family = "llava-onevision"

    def whole_views(self, inputs: ImageInputs, image_tokens: Sequence[int]) -> list[int]:
        counts = inputs.get("batch_num_images")
        if counts is not None and len(image_tokens) > 1 and counts.tolist() == [len(image_tokens)]:
            return list(range(len(image_tokens)))
        return super().whole_views(inputs, image_tokens)

    def _teach(self, processor: object, image_processor: object, patches: int, others: int, strategy: str) -> None:
        super()._teach(processor, image_processor, patches, others, strategy)
        processor.num_image_tokens = patches  # type: ignore[attr-defined]

    def select_images(self, inputs: ImageInputs, start: int, stop: int) -> dict[str, torch.Tensor]:
        per_image = {name: value for name, value in inputs.items() if name != "batch_num_images"}
        return super().select_images(per_image, start, stop)


class EncoderAdapter(VisionAdapter):
    """A vision transformer by itself, of any class that no other adapter knows."""

    def assemble(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: object,
        feature_layer: int,
    ) -> Assembled | None:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model = _around(decoder, tokenizer)
        processor = LlavaProcessor(
            image_processor=image_processor, tokenizer=tokenizer, patch_size=1, image_token=IMAGE_TOKEN
        )
        encoder = copy.deepcopy(self.model)
        LlavaAdapter(model).replace_tower(encoder, image_processor, processor, feature_layer)

        def with_template(template: str) -> ProcessorMixin:
            processor.chat_template = template
            return processor

        return Assembled(model, f"{IMAGE_TOKEN}\\n", with_template)


def _around(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    """A LLaVA around a language model, with a stand-in for the tower and the projector."""
    if len(tokenizer) > decoder.get_input_embeddings().num_embeddings:
        decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    stand_in = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=14, patch_size=14
    )
    config = LlavaConfig(
        vision_config=stand_in,
        text_config=decoder.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=bool(decoder.config.tie_word_embeddings),
        pad_token_id=tokenizer.pad_token_id,
    )
    with init_empty_weights():
        model = LlavaForConditionalGeneration(config)
    model.model.language_model = decoder.base_model
    model.lm_head = decoder.get_output_embeddings()
    device, dtype = decoder.device, decoder.dtype
    model.model.vision_tower = CLIPVisionModel(stand_in).to(device=device, dtype=dtype)
    projector_cls = type(model.model.multi_modal_projector)
    model.model.multi_modal_projector = projector_cls(config).to(device=device, dtype=dtype)
    # what was made on the meta device and replaced must not be what the model believes to be tied
    model.tie_weights()
    model.generation_config = copy.deepcopy(decoder.generation_config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _linear_layers(tensors: Mapping[str, torch.Tensor]) -> list[LinearWeights]:
    """Weights and biases of the two layers of a saved LLaVA projector."""
    layers = []
    for name in ("linear_1", "linear_2"):
        path = next((key for key in tensors if key.endswith(f"{name}.weight")), None)
        if path is None:
            raise EncoderError(f"The tuned projector has no layer {name}.", 'Use the projector variant "0".')
        layers.append((tensors[path], tensors.get(path.replace(".weight", ".bias"))))
    return layers


def _deep_projector(sizes: Sequence[tuple[int, int]]) -> nn.Sequential:
    """Linear layers that take and give so many numbers, with LLaVA's GELU between them."""
    modules: list[nn.Module] = []
    for takes, gives in sizes:
        modules += [nn.Linear(takes, gives), nn.GELU()]
    return nn.Sequential(*modules[:-1])


@torch.no_grad()
def _fill(module: nn.Linear, layer: LinearWeights) -> None:
    module.weight.copy_(layer[0])
    module.bias.copy_(torch.zeros_like(module.bias) if layer[1] is None else layer[1])


@contextmanager
def _only_errors() -> Iterator[None]:
    """Have transformers say nothing but errors meanwhile."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _edge(size: int | Sequence[int]) -> int:
    """Pixels of a square's edge, which some configurations give twice."""
    return int(size if isinstance(size, int) else size[0])


@torch.no_grad()
def _tokens(encoder: PreTrainedModel, image_processor: object, layer: int) -> tuple[int, int]:
    """Patches that an encoder makes of an image, and tokens beside them (class, registers).

    Raises:
        EncoderError: if it does not work like a vision transformer that LLaVA can read.
    """
    try:
        inputs = image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")  # type: ignore[operator]
        pixels = inputs["pixel_values"].to(device=encoder.device, dtype=encoder.dtype)
        tokens = encoder.eval()(pixels, output_hidden_states=True).hidden_states[layer].shape[1]
        patch = _edge(encoder.config.patch_size)
        patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise EncoderError(
            f"{type(encoder).__name__} cannot be read as LLaVA reads a tower, hidden state {layer} of square images in "
            f"one piece: {type(error).__name__}: {error}.",
            "Use a vision transformer of the CLIP, SigLIP, DINO or ViT kind with its own image processor.",
        ) from error
    if not 0 <= tokens - patches <= 16:
        raise EncoderError(
            f"{type(encoder).__name__} makes {tokens} tokens of {patches} patches.", "Use an encoder with patch tokens."
        )
    return patches, tokens - patches


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    if isinstance(model, LlavaForConditionalGeneration):
        return LlavaAdapter(model)
    if isinstance(model, LlavaNextForConditionalGeneration):
        return TiledLlavaAdapter(model)
    if isinstance(model, LlavaOnevisionForConditionalGeneration):
        return LlavaOnevisionAdapter(model)
    return EncoderAdapter(model) if is_encoder(model) else None
