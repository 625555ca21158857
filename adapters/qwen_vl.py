"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: any resolution, M-RoPE, and a projector ("merger") that lives in the tower."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from tokenizers import AddedToken
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.utils import ModelOutput

from pivot_plugin.errors import EncoderError
from pivot_plugin.hooks import hookimpl

from .base import Assembled, ImageInputs, VisionAdapter
from .grids import ImageFeatures

TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


class QwenVLAdapter(VisionAdapter):
    """Qwen2-VL. Patches come in blocks of merge x merge, one row of `pixel_values` per patch."""

    family = "qwen2-vl"
    lmms_eval_name = "qwen2_vl"
    projector_names = ("merger", "deepstack_merger_list")
    mllm: ClassVar[Any] = (Qwen2VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLProcessor, Qwen2VLVideoProcessor)
    language_model: ClassVar[type[PreTrainedModel]] = Qwen2ForCausalLM
    # what the vision configuration calls the width of the language model
    out_width: ClassVar[str] = "hidden_size"
    # of the rotary frequencies, in sixteenths: those of time; the others are shared by height and width
    time_share: ClassVar[int] = 4

    def assemble(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: object,
        feature_layer: int,
    ) -> Assembled | None:
        model_cls, config_cls, processor_cls, video_cls = self.mllm
        if not isinstance(decoder, self.language_model):
            raise EncoderError(
                f"A {type(self.model).__name__} cuts its patches as no LLaVA does, and its own family, {self.family}, "
                f"has language models of class {self.language_model.__name__}; this is a {type(decoder).__name__}.",
                f"Give a {self.language_model.__name__}, or another encoder.",
            )
        tokenizer.add_tokens([AddedToken(token, special=True) for token in TOKENS.values()], special_tokens=True)
        if len(tokenizer) > decoder.get_input_embeddings().num_embeddings:
            decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        text, tower = decoder.config, copy.deepcopy(self.model)
        half = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        time = max(1, half // 2 * self.time_share // 16)
        height = (half // 2 - time) // 2
        rope = {**text.rope_parameters, "mrope_section": [time, height, half // 2 - time - height]}
        fields = config_cls.sub_configs["text_config"]().to_dict()
        shared = {name: value for name, value in text.to_dict().items() if name in fields and name != "model_type"}
        config = config_cls(
            vision_config={**tower.config.to_dict(), self.out_width: text.hidden_size},
            text_config={**shared, "rope_parameters": rope},
            tie_word_embeddings=bool(text.tie_word_embeddings),
            **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()},
        )
        with init_empty_weights():
            model = model_cls(config)
        # positions in three directions are those of a text where they are equal: what was learnt stays true
        model.model.language_model.load_state_dict(decoder.base_model.state_dict(), assign=True)
        model.lm_head = decoder.get_output_embeddings()
        visual, weights = model.model.visual, tower.state_dict()
        for name, parameter in visual.named_parameters():
            if weights[name].shape != parameter.shape:
                # the merger's last layer, as wide as the language model
                weights[name] = torch.empty(parameter.shape)
        device, dtype = decoder.device, decoder.dtype
        visual.load_state_dict({n: weight.to(device=device, dtype=dtype) for n, weight in weights.items()}, assign=True)
        visual.to(decoder.device)
        model.tie_weights()
        model.generation_config = copy.deepcopy(decoder.generation_config)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        marker = f"{TOKENS['vision_start_token']}{TOKENS['image_token']}{TOKENS['vision_end_token']}"
        return Assembled(
            model,
            marker,
            lambda template: processor_cls(
                image_processor=image_processor,
                tokenizer=tokenizer,
                video_processor=video_cls(),
                chat_template=template,
            ),
        )

    def run_tower(self, tower: PreTrainedModel, inputs: ImageInputs) -> ModelOutput:
        return tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])

    def whole_views(self, inputs: ImageInputs, image_tokens: Sequence[int]) -> list[int]:
        return list(range(len(inputs["pixel_values"])))

    def project(self, features: ImageFeatures, tower: PreTrainedModel | None = None) -> ImageFeatures:
        tower = tower or self.tower
        merge = tower.config.spatial_merge_size
        rows, columns = features.grid[0] // merge, features.grid[1] // merge
        blocks = features.values.reshape(rows, merge, columns, merge, -1).transpose(1, 2)
        return ImageFeatures(tower.merger(blocks.reshape(rows * columns * merge * merge, -1)), (rows, columns))

    def tokens_on_grid(self, tokens: torch.Tensor, inputs: ImageInputs) -> ImageFeatures:
        merge = self.tower.config.spatial_merge_size
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        return ImageFeatures(tokens, (rows // merge, columns // merge))


class Qwen2_5_VLAdapter(QwenVLAdapter):
    """Qwen2.5-VL, whose tower works, and leaves its last hidden state, in the order of its attention windows."""

    family = "qwen2.5-vl"
    lmms_eval_name = "qwen2_5_vl"
    mllm = (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
    out_width = "out_hidden_size"


class Qwen3VLAdapter(QwenVLAdapter):
    """Qwen3-VL; what it hands on from deeper blocks ("deepstack") is not part of its patch features."""

    family = "qwen3-vl"
    lmms_eval_name = "qwen3_vl"
    mllm = (Qwen3VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor)
    language_model = Qwen3ForCausalLM
    out_width = "out_hidden_size"
    time_share = 6


@hookimpl
def pivot_adapter(model: PreTrainedModel) -> VisionAdapter | None:
    if isinstance(model, Qwen2_5_VLForConditionalGeneration | Qwen2_5_VisionTransformerPretrainedModel):
        return Qwen2_5_VLAdapter(model)
    if isinstance(model, Qwen2VLForConditionalGeneration | Qwen2VisionTransformerPretrainedModel):
        return QwenVLAdapter(model)
    if isinstance(model, Qwen3VLForConditionalGeneration | Qwen3VLVisionModel):
        return Qwen3VLAdapter(model)
    return None
