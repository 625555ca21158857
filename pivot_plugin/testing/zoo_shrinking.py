"""A family's own configuration made tiny: its defaults, walked, with every size replaced and everything else kept.

What a family is, its layer kinds, rotary embeddings, experts, scalings, stays as transformers has it; only how large it
is changes. A list with one entry for each layer keeps one layer of every kind.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

WIDTH = 64
HEADS = 4
HEAD = WIDTH // HEADS
LAYERS = 3
WINDOW = 16
# settings that say how large something is, whatever they are called, by what they are set to
_SIZES: tuple[tuple[int, str], ...] = (
    (
        WIDTH,
        "d_model, decoder_hidden_size, embed_dim, encoder_hidden_size, hidden_dim, hidden_size, "
        "image_text_hidden_size, image_token_embed_dim, moe_hidden_size, out_hidden_size, output_dim, "
        "patch_embed_hidden_size, projection_dim, projection_hidden_dim, projection_hidden_size, "
        "projector_hidden_size, projector_input_dim, projector_output_dim, text_hidden_size, vision_hidden_size, "
        "word_embed_proj_dim, num_position_embeddings, adapter_in_dim, adapter_input_size, adapter_out_dim, "
        "codebook_dim, hc_lowrank, ple_embed_dim",
    ),
    (
        2 * WIDTH,
        "alignment_intermediate_size, d_ff, decoder_ffn_dim, decoder_intermediate_size, dense_intermediate_size, "
        "encoder_ffn_dim, ffn_dim, intermediate_size, intermediate_size_mlp, mlp_dim, projection_intermediate_size, "
        "shared_intermediate_size",
    ),
    (4 * WIDTH, "merged_hidden_size"),
    (
        WIDTH // 2,
        "moe_intermediate_size, moe_shared_expert_intermediate_size, output_channels, share_expert_dim, "
        "shared_expert_intermediate_size, shared_experts_intermediate_size",
    ),
    (
        LAYERS,
        "conf_num_hidden_layers, decoder_layers, decoder_num_layers, depth, encoder_layers, layers, n_layers, "
        "num_decoder_layers, num_hidden_layers, num_layers, resampler_depth",
    ),
    (
        HEADS,
        "attention_heads, conf_num_attention_heads, decoder_attention_heads, encoder_attention_heads, "
        "linear_num_heads, linear_num_key_heads, linear_num_value_heads, num_attention_heads, num_heads, "
        "num_sliding_attention_heads, resampler_heads, resampler_n_heads, swa_num_attention_heads, mamba_num_heads",
    ),
    (
        HEAD,
        "d_kv, head_dim, hidden_size_per_layer_input, index_head_dim, kv_lora_rank, linear_head_dim, "
        "linear_key_head_dim, linear_value_head_dim, mamba_head_dim, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, "
        "query_pre_attn_scalar, resampler_dim_head, resampler_head_dim, rotary_dim, ssm_state_size, swa_head_dim, "
        "v_head_dim, image_seq_length, num_query_tokens, latent_query_num, mm_tokens_per_image, num_image_tokens, "
        "loop_gate_rank, laurel_rank, index_topk",
    ),
    (
        4,
        "moe_num_experts, n_routed_experts, num_experts, num_local_experts, resampler_n_latents, resampler_num_latents",
    ),
    (2, "moe_k, moe_topk, num_experts_per_tok, top_k_experts"),
    (1, "n_group, topk_group, topk_groups, first_k_dense_replace, num_global_layers"),
    (WINDOW, "sliding_window, sliding_window_size"),
    (2048, "max_position_embeddings"),
)
SIZES = {name.strip(): size for size, names in _SIZES for name in names.split(",")}
_KEY_VALUE_HEADS = {
    "num_key_value_heads": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
}
# what a configuration class works out by itself, from the sizes
_DERIVED = {
    "architectures",
    "dtype",
    "full_attn_idxs",
    "model_type",
    "moe_layers",
    "per_layer_config",
    "qk_head_dim",
    "rope_scaling_layers",
    "transformers_version",
}
_INDEXES = {
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
}


def tiny_config(
    config_class: type[PreTrainedConfig],
    overrides: Mapping[str, Any],
    vocabulary: int,
    token_ids: Mapping[str, int],
) -> PreTrainedConfig:
    """A configuration of a family with its defaults, but tiny.

    Args:
        config_class: the family's configuration class.
        overrides: settings that the family needs otherwise than the rules make them, nested as the configuration is;
            `...` drops a setting, so that the class decides, and "id:TOKEN" stands for that token's id.
        vocabulary: number of token embeddings.
        token_ids: id of every special token, by its text; and by its role, as in "image_token".

    Returns:
        The configuration, ready for the model class.
    """
    settings = _shrunk(config_class().to_dict(), vocabulary, token_ids, vision=False)
    return config_class(**_merged(settings, _resolved(overrides, token_ids)))


def _shrunk(settings: dict[str, Any], vocabulary: int, token_ids: Mapping[str, int], vision: bool) -> dict[str, Any]:
    made: dict[str, Any] = {}
    layers = _kept_layers(settings)
    for name, value in settings.items():
        if name in _DERIVED:
            continue
        if isinstance(value, dict) and "model_type" in value:
            of_vision = vision or "vision" in name or "sam" in name
            made[name] = {
                **_shrunk(value, vocabulary, token_ids, of_vision),
                "model_type": value["model_type"],
            }
        elif name in _KEY_VALUE_HEADS and value is not None:
            every_head = value == settings.get(_KEY_VALUE_HEADS[name])
            made[name] = HEADS if every_head else HEADS // 2
        elif isinstance(value, list) and layers and len(value) == len(layers[0]):
            made[name] = [_size(name, value[layer]) for layer in layers[1]]
        else:
            made[name] = _value(name, value, vocabulary, token_ids)
    if vision:
        made |= _patches(made)
    return made


def _kept_layers(settings: Mapping[str, Any]) -> tuple[range, list[int]] | None:
    """All layers, and the few to keep: one of every kind, in their order."""
    number = settings.get("num_hidden_layers")
    if not isinstance(number, int):
        return None
    every_layer = [value for value in settings.values() if isinstance(value, list) and len(value) == number]
    kinds: dict[str, int] = {}
    for layer in range(number):
        kinds.setdefault(repr([values[layer] for values in every_layer]), layer)
    first_of_kind = list(kinds.values())[:LAYERS]
    others = [layer for layer in range(number) if layer not in first_of_kind]
    return range(number), sorted(first_of_kind + others[: LAYERS - len(first_of_kind)])


def _value(name: str, value: Any, vocabulary: int, token_ids: Mapping[str, int]) -> Any:
    if name.endswith(("token_id", "token_index", "token_ids")) and not isinstance(value, list):
        return token_ids.get(name.removesuffix("_id").removesuffix("_index"), _stand_in(name, value, token_ids))
    if "vocab_size" in name and isinstance(value, int):
        return 0 if value == 0 else vocabulary
    if name in _INDEXES:
        return _INDEXES[name]
    return _size(name, value)


def _stand_in(name: str, value: int | None, token_ids: Mapping[str, int]) -> int | None:
    """An id for a special token that the family's record does not name."""
    if value is None:
        return None
    if name.startswith("pad"):
        return token_ids["<pad>"]
    if name.startswith(("eos", "eod", "sep")):
        return token_ids["<|im_end|>"]
    if name.startswith("bos"):
        return token_ids["<|im_start|>"]
    # one that no prompt about pictures has
    return token_ids["<video>"]


def _size(name: str, value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(entry, int) for entry in value) and name in SIZES:
        return [SIZES[name]] * len(value)
    return SIZES[name] if name in SIZES and isinstance(value, int) and not isinstance(value, bool) else value


def _patches(vision: Mapping[str, Any]) -> dict[str, Any]:
    """A grid of 4 x 4 patches, for a tower of one image size."""
    patch = vision.get("patch_size")
    if not isinstance(patch, (int, list)):
        return {}
    side = min(patch[0] if isinstance(patch, list) else patch, 16)
    made: dict[str, Any] = {"patch_size": [side, side] if isinstance(patch, list) else side}
    if "image_size" in vision:
        made["image_size"] = [4 * side, 4 * side] if isinstance(vision["image_size"], list) else 4 * side
    if "num_patches" in vision:
        made["num_patches"] = 16
    if "window_size" in vision:
        # in pixels where it is larger than any grid, in patches elsewhere
        made["window_size"] = 4 * side if vision["window_size"] > 100 else 2
    return made


def _resolved(value: Any, token_ids: Mapping[str, int]) -> Any:
    if isinstance(value, Mapping):
        return {name: _resolved(inner, token_ids) for name, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, token_ids) for inner in value]
    if isinstance(value, str) and value.startswith("id:"):
        return token_ids[value.removeprefix("id:")]
    return value


def _merged(settings: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(settings)
    for name, value in overrides.items():
        if value is ...:
            made.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(made.get(name), dict):
            made[name] = _merged(made[name], value)
        else:
            made[name] = value
    return made
