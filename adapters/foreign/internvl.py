"""InternVLChatModel, 1.5 to 3.5: InternVisionModel with fused projections, `mlp1`, and a decoder in `language_model`.

Source:
    OpenGVLab/InternVL, internvl_chat; arXiv 2404.16821, 2412.05271, 2504.10479, 2508.18265.
"""

from collections.abc import Mapping
from typing import Any

from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2Config,
    Qwen3Config,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

from pivot_plugin.errors import ModelError

from .building import Plan
from .names import THIRDS, NameTable, Rule, grouped, rename
from .tokens import PromptForm, chatml, name_tokens, ready, started_as
from .weights import Weights

CONTEXT, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
DECODERS: dict[str, type[PreTrainedConfig]] = {
    "InternLM2ForCausalLM": LlamaConfig,
    "LlamaForCausalLM": LlamaConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}
_BLOCK, _OURS = "vision_model.encoder.layers.{n}.", "model.vision_tower.encoder.layer.{n}."
_VISION = (
    rename("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
    rename("vision_model.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    rename(
        "vision_model.embeddings.patch_embedding.{rest}",
        "model.vision_tower.embeddings.patch_embeddings.projection.{rest}",
    ),
    Rule(
        _BLOCK + "attn.qkv.{rest}",
        tuple(f"{_OURS}attention.{part}_proj.{{rest}}" for part in ("q", "k", "v")),
        THIRDS,
    ),
    rename(_BLOCK + "attn.proj.{rest}", _OURS + "attention.projection_layer.{rest}"),
    rename(_BLOCK + "attn.q_norm.{rest}", _OURS + "attention.q_norm.{rest}"),
    rename(_BLOCK + "attn.k_norm.{rest}", _OURS + "attention.k_norm.{rest}"),
    rename(_BLOCK + "mlp.{rest}", _OURS + "mlp.{rest}"),
    rename(_BLOCK + "norm1.{rest}", _OURS + "layernorm_before.{rest}"),
    rename(_BLOCK + "norm2.{rest}", _OURS + "layernorm_after.{rest}"),
    rename(_BLOCK + "ls1", _OURS + "lambda_1"),
    rename(_BLOCK + "ls2", _OURS + "lambda_2"),
    rename("mlp1.0.{rest}", "model.multi_modal_projector.layer_norm.{rest}"),
    rename("mlp1.1.{rest}", "model.multi_modal_projector.linear_1.{rest}"),
    rename("mlp1.3.{rest}", "model.multi_modal_projector.linear_2.{rest}"),
)
_DECODER = (
    rename("language_model.lm_head.{rest}", "lm_head.{rest}"),
    rename("language_model.model.{rest}", "model.language_model.{rest}"),
)
_SIDES = {"InternVisionModel", "InternVisionPatchModel"}
# what InternVL says of itself where nobody else does, by the name of its prompt form (internvl/conversation.py)
_EARLY = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
_LATER = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
PROMPT_FORMS: dict[str, PromptForm] = {
    "internlm2-chat": chatml(_EARLY, after=""),
    "Hermes-2": chatml(_EARLY, after=""),
    "internvl2_5": chatml(_LATER),
}
REMEDY = "Convert it with the repository's own means, or write a plugin with the hook pivot_model."


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is an InternVLChatModel's."""
    return config.get("model_type") == "internvl_chat" or "InternVLChatModel" in (config.get("architectures") or ())


def plan(weights: Weights) -> Plan:
    """What a checkpoint or object is in transformers' words.

    Raises:
        ModelError: for a decoder, tower or projector that transformers has no equal of.
    """
    config = weights.config
    vision, architecture = _vision(weights), _architecture(weights)
    text = _decoder(config, architecture)
    side = vision.image_size[0] // vision.patch_size[0]
    ratio = float(config.get("downsample_ratio", 0.5))
    ours = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_seq_length=int((side * ratio) ** 2),
        downsample_ratio=ratio,
        vision_feature_layer=int(config.get("select_layer", -1)),
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(text.tie_word_embeddings),
        dtype=config.get("torch_dtype") or config.get("dtype"),
    )
    table = NameTable((*_VISION, *(_internlm2(text) if architecture == "InternLM2ForCausalLM" else ()), *_DECODER))
    return Plan(InternVLForConditionalGeneration, ours, table)


def _architecture(weights: Weights) -> str:
    inner = weights.config.get("llm_config") or {}
    architecture = str(next(iter(inner.get("architectures") or ()), "unknown"))
    if architecture not in DECODERS:
        raise ModelError(
            f"The decoder of {weights.label!r} is of class {architecture!r} (llm_config); known are "
            f"{', '.join(DECODERS)}.",
            REMEDY,
        )
    return architecture


def _vision(weights: Weights) -> InternVLVisionConfig:
    """The tower's configuration, or a refusal of what transformers' class does not have."""
    config, label = weights.config, weights.label
    inner = config.get("vision_config") or {}
    if config.get("ps_version", "v1") != "v2":
        raise ModelError(
            f"{label!r} shuffles pixels by ps_version={config.get('ps_version', 'v1')!r}, which leaves the picture "
            "transposed; transformers' InternVL has v2 alone.",
            REMEDY,
        )
    architecture = next(iter(inner.get("architectures") or ()), "InternVisionModel")
    if architecture not in _SIDES:
        raise ModelError(
            f"The vision tower of {label!r} is of class {architecture!r}; known is InternVisionModel.", REMEDY
        )
    normed = bool(inner.get("qk_normalization", False))
    epsilon = float(inner.get("layer_norm_eps", 1e-6))
    if normed and epsilon != 1e-6:
        raise ModelError(
            f"The tower of {label!r} norms queries and keys with layer_norm_eps={epsilon}; transformers' InternVL does "
            "with 1e-06 alone.",
            REMEDY,
        )
    side = config.get("force_image_size") or inner.get("image_size", 448)
    if side != inner.get("image_size", 448):
        raise ModelError(
            f"{label!r} has force_image_size={side}, and its tower position embeddings for "
            f"{inner.get('image_size', 448)} px, which its class resizes when it loads.",
            "Save it once with its own code, so that both are the same.",
        )
    return InternVLVisionConfig(
        hidden_size=inner.get("hidden_size", 3200),
        intermediate_size=inner.get("intermediate_size", 12800),
        num_hidden_layers=inner.get("num_hidden_layers", 48),
        num_attention_heads=inner.get("num_attention_heads", 25),
        num_channels=inner.get("num_channels", 3),
        patch_size=[inner.get("patch_size", 14)] * 2,
        image_size=[side] * 2,
        attention_bias=bool(inner.get("qkv_bias", False)),
        use_qk_norm=normed,
        norm_type=inner.get("norm_type", "rms_norm"),
        hidden_act=inner.get("hidden_act", "gelu"),
        layer_norm_eps=epsilon,
        attention_dropout=inner.get("attention_dropout", 0.0),
        layer_scale_init_value=inner.get("initializer_factor", 0.1),
    )


def _decoder(config: Mapping[str, Any], architecture: str) -> PreTrainedConfig:
    inner = dict(config["llm_config"])
    if architecture == "InternLM2ForCausalLM":
        # its one switch is about all projections of the attention
        inner["attention_bias"] = bool(inner.get("bias", False))
        if inner.get("num_key_value_heads") is None:
            inner["num_key_value_heads"] = inner["num_attention_heads"]
    kind = DECODERS[architecture]
    other = {"architectures", "model_type", "transformers_version", "_name_or_path", "dtype", "torch_dtype"}
    fields = (set(kind().to_dict()) | {"rope_theta", "rope_scaling"}) - other
    return kind(**{name: value for name, value in inner.items() if name in fields})


def _internlm2(text: PreTrainedConfig) -> tuple[Rule, ...]:
    """InternLM2's names for what is a Llama otherwise."""
    theirs, ours = "language_model.model.layers.{n}.", "model.language_model.layers.{n}."
    heads = tuple(f"{ours}self_attn.{part}_proj.{{rest}}" for part in ("q", "k", "v"))
    return (
        rename("language_model.model.tok_embeddings.{rest}", "model.language_model.embed_tokens.{rest}"),
        rename("language_model.output.{rest}", "lm_head.{rest}"),
        Rule(theirs + "attention.wqkv.{rest}", heads, grouped(text.num_attention_heads, text.num_key_value_heads)),
        rename(theirs + "attention.wo.{rest}", ours + "self_attn.o_proj.{rest}"),
        rename(theirs + "feed_forward.w1.{rest}", ours + "mlp.gate_proj.{rest}"),
        rename(theirs + "feed_forward.w3.{rest}", ours + "mlp.up_proj.{rest}"),
        rename(theirs + "feed_forward.w2.{rest}", ours + "mlp.down_proj.{rest}"),
        rename(theirs + "attention_norm.{rest}", ours + "input_layernorm.{rest}"),
        rename(theirs + "ffn_norm.{rest}", ours + "post_attention_layernorm.{rest}"),
    )


def _prompt_form(weights: Weights) -> PromptForm:
    """The form that the checkpoint names, with the system message that its code would use.

    Raises:
        ModelError: for a name that is not known.
    """
    name = weights.config.get("template")
    if name not in PROMPT_FORMS:
        raise ModelError(
            f"{weights.label!r} writes its prompts by template={name!r}; known are {', '.join(PROMPT_FORMS)}.",
            "Look whether config.json has its template, or pass processor=, a processor with its chat template.",
        )
    return PROMPT_FORMS[str(name)]


def processor(weights: Weights, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """transformers' processor around the checkpoint's tokenizer; the plan's configuration gets its image token.

    Args:
        weights: of the model.
        plan: of it.
        tokenizer: of it, which has the three tokens of an image.

    Raises:
        ModelError: if it has not, or tiles are cut in another way.
    """
    settings, config = weights.config, plan.config
    vocabulary = tokenizer.get_vocab()
    missing_tokens = [token for token in (CONTEXT, START, END) if token not in vocabulary]
    if missing_tokens:
        raise ModelError(
            f"The tokenizer of {weights.label!r} ({type(tokenizer).__name__}, {len(tokenizer)} tokens) has no "
            f"{' and no '.join(missing_tokens)}, by which InternVL shows an image.",
            "Use the tokenizer the checkpoint was published with; its added_tokens.json has these tokens.",
        )
    ready(tokenizer)
    config.image_token_id = vocabulary[CONTEXT]
    tiled = bool(settings.get("dynamic_image_size", False))
    max_tiles = int(settings.get("max_dynamic_patch", 6)) if tiled else 1
    if max_tiles > 1 and not settings.get("use_thumbnail", False):
        raise ModelError(
            f"{weights.label!r} cuts tiles and adds no thumbnail (use_thumbnail is false); transformers' InternVL "
            "always adds one.",
            REMEDY,
        )
    # the processor wants a token for videos, none is ever passed, and none may be added to a full vocabulary: one that
    # no prompt contains stands in
    video = next((token for token in ("<video>", "<|video_pad|>") if token in vocabulary), END)
    name_tokens(
        tokenizer,
        {
            "start_image_token": START,
            "end_image_token": END,
            "context_image_token": CONTEXT,
            "video_token": video,
        },
    )
    height, width = config.vision_config.image_size
    colours = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    form = started_as(tokenizer, _prompt_form(weights))
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": height, "width": width},
            crop_to_patches=True,
            min_patches=int(settings.get("min_dynamic_patch", 1)) if tiled else 1,
            max_patches=max_tiles,
            **colours,
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size={"height": height, "width": width}, **colours),
        image_seq_length=config.image_seq_length,
        chat_template=form.template(CONTEXT),
    )
