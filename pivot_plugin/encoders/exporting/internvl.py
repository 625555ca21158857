"""InternVL: the repository's own InternVisionModel, for --vision_path."""

from transformers import PreTrainedModel

from pivot_plugin.adapters.base import FEATURE_LAYER

from .form import INTERN_BLOCK, Form, edge, intern_blocks, intern_problems, refuse_unless

_INTERNVL = {
    rf"{INTERN_BLOCK}\.layernorm_before\.(weight|bias)": r"encoder.layers.\1.norm1.\2",
    rf"{INTERN_BLOCK}\.layernorm_after\.(weight|bias)": r"encoder.layers.\1.norm2.\2",
    rf"{INTERN_BLOCK}\.attention\.projection_layer\.(weight|bias)": r"encoder.layers.\1.attn.proj.\2",
    rf"{INTERN_BLOCK}\.attention\.([qk])_norm\.weight": r"encoder.layers.\1.attn.\2_norm.weight",
    rf"{INTERN_BLOCK}\.mlp\.fc([12])\.(weight|bias)": r"encoder.layers.\1.mlp.fc\2.\3",
    rf"{INTERN_BLOCK}\.lambda_([12])": r"encoder.layers.\1.ls\2",
    r"embeddings\.patch_embeddings\.projection\.(weight|bias)": r"embeddings.patch_embedding.\1",
    r"embeddings\.cls_token": "embeddings.class_embedding",
    r"embeddings\.position_embeddings": "embeddings.position_embedding",
}


def for_internvl(encoder: PreTrainedModel, image_processor: object) -> Form:
    """An InternViT as the repository's InternVisionModel."""
    config = encoder.config
    problems = (
        intern_problems(encoder)
        if config.model_type == "internvl_vision"
        else [f"its InternVisionModel is an InternViT, this is of type {config.model_type}"]
    )
    refuse_unless(
        "InternVL",
        encoder,
        problems,
        "Give it the tower of an InternVL; any other encoder goes into a new MLLM by `pivot assemble`.",
    )
    layer = getattr(config, FEATURE_LAYER, None)
    return Form(
        intern_blocks(dict(encoder.state_dict()), _INTERNVL, "encoder.layers.{}.attn.qkv"),
        {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "attention_dropout": config.attention_dropout,
            "drop_path_rate": 0.0,
            "dropout": config.hidden_dropout_prob,
            "hidden_act": config.hidden_act,
            "hidden_size": config.hidden_size,
            "image_size": edge(config.image_size),
            "initializer_factor": 1.0,
            "initializer_range": config.initializer_range,
            "intermediate_size": config.intermediate_size,
            "layer_norm_eps": config.layer_norm_eps,
            "norm_type": config.norm_type,
            "num_attention_heads": config.num_attention_heads,
            "num_channels": config.num_channels,
            "num_hidden_layers": config.num_hidden_layers,
            "patch_size": edge(config.patch_size),
            "qk_normalization": config.use_qk_norm,
            "qkv_bias": config.attention_bias,
            "torch_dtype": str(encoder.dtype).removeprefix("torch."),
            "use_flash_attn": True,
        },
        {"vision_path": "<folder>", "vision_select_layer": -1 if layer is None else layer},
        ("Read by the repository's InternVisionModel.from_pretrained.",),
    )
