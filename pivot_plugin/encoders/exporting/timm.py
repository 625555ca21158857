"""timm: a folder for timm.create_model("local-dir:<folder>", pretrained=True)."""

from typing import Any

from transformers import PreTrainedModel

from pivot_plugin.adapters.base import FEATURE_LAYER

from ..contract import is_put_on_square
from .form import (
    CLIP_BLOCK,
    INTERN_BLOCK,
    Form,
    Settings,
    Tensors,
    edge,
    fused,
    intern_blocks,
    intern_problems,
    refuse_unless,
    renamed,
    used_blocks,
)

# timm's names of activations
_TIMM_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
_TIMM_CLIP = {
    rf"{CLIP_BLOCK}\.layer_norm([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
    rf"{CLIP_BLOCK}\.self_attn\.out_proj\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    rf"{CLIP_BLOCK}\.mlp\.fc([12])\.(weight|bias)": r"blocks.\1.mlp.fc\2.\3",
    r"embeddings\.patch_embedding\.(weight|bias)": r"patch_embed.proj.\1",
    r"pre_layrnorm\.(weight|bias)": r"norm_pre.\1",
    r"post_layernorm\.(weight|bias)": r"norm.\1",
    r"head\.attention\.out_proj\.(weight|bias)": r"attn_pool.proj.\1",
    r"head\.layernorm\.(weight|bias)": r"attn_pool.norm.\1",
    r"head\.mlp\.fc([12])\.(weight|bias)": r"attn_pool.mlp.fc\1.\2",
}
_TIMM_INTERN = {
    rf"{INTERN_BLOCK}\.layernorm_before\.(weight|bias)": r"blocks.\1.norm1.\2",
    rf"{INTERN_BLOCK}\.layernorm_after\.(weight|bias)": r"blocks.\1.norm2.\2",
    rf"{INTERN_BLOCK}\.attention\.projection_layer\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    rf"{INTERN_BLOCK}\.mlp\.fc([12])\.(weight|bias)": r"blocks.\1.mlp.fc\2.\3",
    rf"{INTERN_BLOCK}\.lambda_([12])": r"blocks.\1.ls\2.gamma",
    r"embeddings\.patch_embeddings\.projection\.(weight|bias)": r"patch_embed.proj.\1",
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.position_embeddings": "pos_embed",
}
# by model type: generic architecture, epsilon that it has built in
_TIMM_KINDS = {
    "clip_vision_model": ("vit_base_patch16_clip_224", 1e-5),
    "siglip_vision_model": ("vit_base_patch16_siglip_224", 1e-6),
    "internvl_vision": ("vit_intern300m_patch14_448", 1e-6),
}


def for_timm(encoder: PreTrainedModel, image_processor: object) -> Form:
    """An encoder as a timm model: weights by its names, arguments, preprocessing."""
    config = encoder.config
    kind, tensors = config.model_type, dict(encoder.state_dict())
    problems = []
    architecture, epsilon = _TIMM_KINDS.get(kind, ("", 0.0))
    if not architecture:
        problems.append(f"a {kind} has no counterpart there ({', '.join(_TIMM_KINDS)} have)")
    else:
        if abs(config.layer_norm_eps - epsilon) > 1e-12:
            problems.append(f"layer_norm_eps is {config.layer_norm_eps}, {architecture} has {epsilon}")
        if config.hidden_act not in _TIMM_ACTIVATIONS:
            problems.append(f"its activation {config.hidden_act!r} is none of {', '.join(_TIMM_ACTIVATIONS)}")
        if kind == "internvl_vision":
            problems += intern_problems(encoder)
            if config.use_qk_norm:
                problems.append("its queries and keys are normed over all heads together, timm's head by head")
    refuse_unless("timm", encoder, problems, "Use the encoder by transformers: AutoModel.from_pretrained.")
    depth, size = config.num_hidden_layers, edge(config.image_size)
    arguments: Settings = {
        "img_size": size,
        "patch_size": edge(config.patch_size),
        "embed_dim": config.hidden_size,
        "depth": depth,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "act_layer": _TIMM_ACTIVATIONS[config.hidden_act],
        "num_classes": 0,
    }
    if kind == "internvl_vision":
        arguments |= {"qkv_bias": config.attention_bias, "init_values": 0.1}
        written = intern_blocks(tensors, _TIMM_INTERN, "blocks.{}.attn.qkv")
    else:
        written = _timm_clip(tensors, depth)
        if kind == "siglip_vision_model" and "attn_pool.latent" not in written:
            architecture = "vit_base_patch16_siglip_gap_224"
    pooled = {"vit_base_patch16_siglip_224": "map", "vit_base_patch16_siglip_gap_224": "avg"}.get(architecture, "token")
    block = used_blocks(encoder, depth) - 1
    # SigLIP's own output has passed its closing norm
    normed = kind == "siglip_vision_model" and getattr(config, FEATURE_LAYER, None) is None
    reading = (
        f'model.forward_intermediates(images, indices=[{block}], norm={normed}, output_fmt="NLC", '
        "intermediates_only=True)[0]"
    )
    return Form(
        written,
        {
            "architecture": architecture,
            "num_classes": 0,
            "num_features": config.hidden_size,
            "global_pool": pooled,
            "model_args": arguments,
            "pretrained_cfg": _timm_preprocessing(image_processor, size),
        },
        {"model": 'timm.create_model("local-dir:<folder>", pretrained=True)', "features": reading},
        ("The class token is left out of these features, as it is by LLaVA.",) if kind != "siglip_vision_model" else (),
        preprocessor=False,
    )


def _timm_clip(tensors: Tensors, depth: int) -> Tensors:
    written = renamed(tensors, _TIMM_CLIP)
    for index in range(depth):
        for kind in ("weight", "bias"):
            path = f"encoder.layers.{index}.self_attn"
            together = fused(tensors, path, ("q_proj", "k_proj", "v_proj"), kind)
            if together is not None:
                written[f"blocks.{index}.attn.qkv.{kind}"] = together
    written["pos_embed"] = tensors["embeddings.position_embedding.weight"][None]
    if "embeddings.class_embedding" in tensors:
        written["cls_token"] = tensors["embeddings.class_embedding"][None, None]
    if "head.probe" in tensors:
        written["attn_pool.latent"] = tensors["head.probe"]
        for kind in ("weight", "bias"):
            joint = tensors[f"head.attention.in_proj_{kind}"]
            third = joint.shape[0] // 3
            written[f"attn_pool.q.{kind}"], written[f"attn_pool.kv.{kind}"] = joint[:third], joint[third:]
    return written


def _timm_preprocessing(image_processor: Any, size: int) -> Settings:
    names = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    # stretched where the whole image is shown, cut where its middle is, with a border where it is put on a square
    mode = "center" if getattr(image_processor, "do_center_crop", False) else "squash"
    if is_put_on_square(image_processor):
        mode = "border"
    return {
        "input_size": [3, size, size],
        "fixed_input_size": True,
        "interpolation": names.get(int(getattr(image_processor, "resample", None) or 3), "bicubic"),
        "crop_pct": 1.0,
        "crop_mode": mode,
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
        "num_classes": 0,
        "custom_load": False,
    }
