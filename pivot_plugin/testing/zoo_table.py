"""The zoo's families, and the image-text-to-text classes of transformers that cannot be in it.

Token texts are those of the published tokenizers, where a processor or a configuration asks for them by name.
"""

from typing import Any

from .zoo_record import ZooFamily
from .zoo_shrinking import HEAD, LAYERS, WIDTH

_SQUARE_56 = {"size": {"height": 56, "width": 56}}
_SQUARE_64 = {"size": {"height": 64, "width": 64}}
_CROPPED_56 = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
_AREA_14 = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
# of towers that merge their patches by themselves, for which a picture counts twice: two of them make a moment
_AREA_MERGED = {"size": {"shortest_edge": 2 * 56 * 56, "longest_edge": 2 * 112 * 168}}
_AREA_16 = {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, "patch_size": 16}
_TILES_56 = [[56, 112], [112, 56], [112, 112]]
_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_QWEN: dict[str, Any] = {"marker": "<|vision_start|><|image_pad|><|vision_end|>", "tokens": _QWEN_TOKENS}
_OMNI = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_GLM_MARKER = "<|begin_of_image|><|image|><|end_of_image|>"
_GLM: dict[str, Any] = {
    "marker": _GLM_MARKER,
    "tokens": {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "image_start_token": "<|begin_of_image|>",
        "image_end_token": "<|end_of_image|>",
        "video_start_token": "<|begin_of_video|>",
        "video_end_token": "<|end_of_video|>",
    },
    "image_settings": _AREA_MERGED,
}
_LLAVA_TOKENS = {"image_token": "<image>"}
_LLAVA_PROCESSOR = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_GEMMA = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "audio_token": "<audio_soft_token>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
    "video_token": "<|video|>",
}
_IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
# rotary dimensions of time, height and width; together half of what rotates
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
_MROPE_HALF = {**_MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
_MROPE_QUARTER = {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
_PIXTRAL: dict[str, Any] = {
    "tokens": {"image_token": "[IMG]"},
    "unnamed_tokens": ("[IMG_BREAK]", "[IMG_END]"),
    "marker": "[IMG]",
}
_PIXTRAL_IMAGES = {"size": {"longest_edge": 112}, "patch_size": {"height": 14, "width": 14}}
_VQ = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "in_channels": 3}
# a grid of 64 x 64 patches, with attention inside windows alone
_SAM_64 = {"image_size": 256, "patch_size": 4, "window_size": 8, "global_attn_indexes": []}
_SMALL_AUDIO = {"downsample_hidden_size": 16, "num_mel_bins": 16, "n_window": 8, "max_source_positions": 32}

TABLE = (
    ZooFamily(
        "vipllava",
        tokens=_LLAVA_TOKENS,
        processor_settings=_LLAVA_PROCESSOR,
        image_settings=_CROPPED_56,
        config={"vision_feature_layer": [-2, -3, 1], "vision_config": {"patch_size": 14}},
    ),
    ZooFamily(
        "llava_pixtral",
        model_type="llava",
        processor="PixtralProcessor",
        image_processor="PixtralImageProcessor",
        processor_settings={"patch_size": 14},
        image_settings=_PIXTRAL_IMAGES,
        config={
            "vision_config": {"model_type": "pixtral", "image_size": 112, "patch_size": 14, "head_dim": HEAD},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        **_PIXTRAL,
    ),
    ZooFamily(
        "llava_next_video",
        tokens={"image_token": "<image>", "video_token": "<video>"},
        processor_settings=_LLAVA_PROCESSOR,
        image_settings={**_CROPPED_56, "image_grid_pinpoints": _TILES_56},
        config={"image_grid_pinpoints": _TILES_56},
    ),
    ZooFamily(
        "video_llava",
        tokens={"image_token": "<image>", "video_token": "<video>"},
        image_settings=_CROPPED_56,
        video_settings=_CROPPED_56,
    ),
    ZooFamily(
        "fast_vlm",
        tokens=_LLAVA_TOKENS,
        processor="LlavaProcessor",
        image_processor="CLIPImageProcessor",
        processor_settings={"patch_size": 64, "vision_feature_select_strategy": "full"},
        image_settings={"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}},
        config={
            "vision_config": {
                "model_args": {
                    "inference_mode": True,
                    "layers": [1, 1, 1, 1, 1],
                    "embed_dims": [16, 16, 16, 32, 32],
                },
            },
        },
        needs=("timm",),
    ),
    ZooFamily(
        "granite4_vision",
        tokens=_LLAVA_TOKENS,
        processor_settings={**_LLAVA_PROCESSOR, "downsample_rate": "1/2"},
        image_settings={**_CROPPED_56, "image_grid_pinpoints": _TILES_56},
        config={
            "image_grid_pinpoints": _TILES_56,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-2, 0], [-1, 1]],
            "spatial_target_layers": [0, 1, 2, 2],
            "vision_config": {"patch_size": 14, "image_size": 56},
        },
    ),
    ZooFamily(
        "deepseek_vl",
        marker="<image_placeholder>",
        tokens={"image_token": "<image_placeholder>"},
        processor_settings={"num_image_tokens": 16},
        image_settings=_SQUARE_64,
    ),
    ZooFamily(
        "deepseek_vl_hybrid",
        marker="<image_placeholder>",
        tokens={"image_token": "<image_placeholder>"},
        processor_settings={"num_image_tokens": 16},
        image_settings={**_SQUARE_64, "high_res_size": {"height": 128, "width": 128}},
        config={"high_res_vision_config": {"image_size": 128, "patch_size": 16, "num_pos_feats": 32}},
    ),
    ZooFamily(
        "janus",
        marker="<image_placeholder>",
        tokens={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
        processor_settings={"num_image_tokens": 16},
        image_settings=_SQUARE_64,
        config={"vq_config": {**_VQ, "latent_channels": 32, "embed_dim": 8, "num_embeddings": 32, "num_patches": 4}},
    ),
    ZooFamily(
        "idefics2",
        unnamed_tokens=_IDEFICS_TOKENS,
        model_tokens={"image_token": "<image>"},
        processor_settings={"image_seq_len": 4},
        image_settings={"size": {"shortest_edge": 56, "longest_edge": 84}},
        config={
            "vision_config": {"image_size": 84, "patch_size": 14},
            "perceiver_config": {"resampler_n_latents": 4, "num_key_value_heads": 2},
        },
    ),
    ZooFamily(
        "idefics3",
        unnamed_tokens=_IDEFICS_TOKENS,
        model_tokens={"image_token": "<image>"},
        processor_settings={"image_seq_len": 4},
        image_settings={"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
        config={"vision_config": {"patch_size": 14, "image_size": 56}},
    ),
    ZooFamily(
        "smolvlm",
        unnamed_tokens=_IDEFICS_TOKENS,
        model_tokens={"image_token": "<image>"},
        processor_settings={"image_seq_len": 4},
        image_settings={"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
        config={"vision_config": {"patch_size": 14, "image_size": 56}},
        needs=("num2words",),
    ),
    ZooFamily(
        "mistral3",
        **_PIXTRAL,
        processor_settings={"patch_size": 14, "spatial_merge_size": 2},
        image_settings={**_PIXTRAL_IMAGES, "patch_size": {"height": 28, "width": 28}},
        config={"vision_config": {"image_size": 112, "patch_size": 14}},
    ),
    ZooFamily(
        "lighton_ocr",
        marker="<|image_pad|>",
        tokens={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
        image_settings={**_PIXTRAL_IMAGES, "patch_size": {"height": 28, "width": 28}},
        config={"vision_config": {"image_size": 112, "patch_size": 14}},
    ),
    ZooFamily(
        "aria",
        marker="<|img|>",
        tokens={"image_token": "<|img|>"},
        # the image processor makes nothing but 490 and 980 pixels; so the patches are large
        processor_settings={"size_conversion": {490: 4, 980: 16}},
        config={
            "vision_config": {"patch_size": 70, "image_size": 980},
            "projector_patch_to_query_dict": {49: 4, 196: 16},
            "max_value_projector_patch_to_query_dict": 16,
        },
    ),
    ZooFamily(
        "lfm2_vl",
        tokens={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
        unnamed_tokens=tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),
        image_settings={
            "tile_size": 64,
            "min_image_tokens": 4,
            "max_image_tokens": 8,
            "max_tiles": 4,
            "size": {"height": 64, "width": 64},
        },
        config={"text_config": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}},
    ),
    ZooFamily(
        "cohere2_vision",
        marker="<|IMG_PATCH|>",
        tokens={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        # here a patch is an image token of one tile, and their number is its square
        image_settings={**_SQUARE_64, "max_patches": 4, "patch_size": 2},
    ),
    ZooFamily(
        "aya_vision",
        unnamed_tokens=(
            "<|START_OF_IMG|>",
            "<|END_OF_IMG|>",
            "<|IMG_PATCH|>",
            "<|IMG_LINE_BREAK|>",
            "TILE_GLOBAL",
            *(f"TILE_{tile}" for tile in range(1, 5)),
        ),
        model_tokens={"image_token": "<|IMG_PATCH|>"},
        processor_settings={"patch_size": 14, "img_size": 56, "downsample_factor": 2},
        image_settings={**_SQUARE_56, "max_patches": 4, "crop_to_patches": True},
    ),
    ZooFamily(
        "emu3",
        text_tokens={"bos_token": "<|extra_203|>"},
        tokens={
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
        },
        unnamed_tokens=("<|extra_203|>", "<|extra_200|>", *(f"<|visual token {code:06d}|>" for code in range(16))),
        image_settings={"min_pixels": 32 * 32, "max_pixels": 64 * 64},
        config={
            "vq_config": {
                **_VQ,
                "codebook_size": 16,
                "embed_dim": 4,
                "latent_channels": 4,
                "channel_multiplier": [1, 1, 1, 1],
                "num_attention_heads": 1,
                "hidden_size": 32,
            },
            "vocabulary_map": {
                "<image>": "id:<image>",
                "<|extra_200|>": "id:<|extra_200|>",
                **{f"<|visual token {code:06d}|>": f"id:<|visual token {code:06d}|>" for code in range(16)},
            },
        },
    ),
    ZooFamily(
        "chameleon",
        tokens={"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"},
        # the processor closes every text with it
        text_tokens={"sep_token": "<reserved08706>"},
        unnamed_tokens=("<reserved08706>", *(f"IMGIMG{letter}Z" for letter in "ABCDEFGHIJ")),
        processor_settings={"image_seq_length": 16},
        image_settings={"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        config={
            "vq_config": {
                **_VQ,
                "latent_channels": 32,
                "embed_dim": 8,
                "num_embeddings": 10,
                "resolution": 32,
                "channel_multiplier": [1, 1, 1, 2],
            },
            "vocabulary_map": {
                "<image>": "id:<image>",
                **{f"IMGIMG{letter}Z": f"id:IMGIMG{letter}Z" for letter in "ABCDEFGHIJ"},
            },
        },
    ),
    ZooFamily(
        "gemma3",
        marker="<start_of_image>",
        tokens={role: _GEMMA[role] for role in ("image_token", "boi_token", "eoi_token")},
        processor_settings={"image_seq_length": 4},
        image_settings=_SQUARE_64,
        config={"mm_tokens_per_image": 4},
    ),
    ZooFamily(
        "gemma4",
        marker="<image_soft_token>",
        tokens=_GEMMA,
        processor_settings={"image_seq_length": 8},
        image_settings={"max_soft_tokens": 70},
        config={
            # as the larger published ones have it
            "text_config": {"use_bidirectional_attention": "vision"},
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": WIDTH,
                "intermediate_size": 2 * WIDTH,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": HEAD,
                "position_embedding_size": 64,
            },
        },
    ),
    ZooFamily(
        "ovis2",
        unnamed_tokens=("<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        model_tokens={"image_token": "<IMG_ATOM>"},
        processor_settings={"image_seq_length": 16},
        image_settings={**_SQUARE_56, "crop_to_patches": True, "max_patches": 4},
        config={
            "vision_config": {"vocab_size": 32},
            "hidden_size": WIDTH,
            "visual_indicator_token_ids": [
                "id:<IMG_START>",
                "id:<IMG_GRID>",
                "id:<IMG_COL>",
                "id:<IMG_ROW>",
                "id:<IMG_END>",
            ],
        },
    ),
    ZooFamily(
        "molmo2",
        marker="<|image|>",
        tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
        unnamed_tokens=(
            "<im_patch>",
            "<im_col>",
            "<im_start>",
            "<low_res_im_start>",
            "<frame_start>",
            "<im_end>",
            "<frame_end>",
            "<im_low>",
        ),
        text_tokens={"bos_token": "<|im_start|>"},
        image_settings={**_SQUARE_56, "max_crops": 4, "overlap_margins": [1, 1]},
        config={
            "image_start_token_id": "id:<im_start>",
            "low_res_image_start_token_id": "id:<low_res_im_start>",
            "image_end_token_id": "id:<im_end>",
            "image_patch_id": "id:<im_patch>",
            "frame_start_token_id": "id:<frame_start>",
            "frame_end_token_id": "id:<frame_end>",
            "vision_config": {"num_position_embeddings": 16},
            "adapter_config": {"vision_feature_layer": [2, 1]},
            "text_config": {"additional_vocab_size": 8},
        },
    ),
    ZooFamily("glm4v", config={"text_config": {"rope_parameters": _MROPE}}, **_GLM),
    ZooFamily("glm46v", config={"text_config": {"rope_parameters": _MROPE}}, **_GLM),
    ZooFamily(
        "glm4v_moe",
        image_processor="Glm4vImageProcessor",
        video_processor="Glm4vVideoProcessor",
        config={"text_config": {"rope_parameters": _MROPE_HALF}},
        **_GLM,
    ),
    ZooFamily(
        "glm_ocr",
        processor="Glm46VProcessor",
        image_processor="Glm46VImageProcessor",
        video_processor="Glm46VVideoProcessor",
        config={"text_config": {"rope_parameters": _MROPE}},
        **_GLM,
    ),
    ZooFamily(
        "qwen3_vl_moe",
        image_processor="Qwen2VLImageProcessor",
        image_settings=_AREA_16,
        config={"text_config": {"rope_parameters": _MROPE}},
        **_QWEN,
    ),
    ZooFamily(
        "qwen3_5",
        image_settings=_AREA_16,
        config={"text_config": {"rope_parameters": _MROPE_QUARTER}},
        **_QWEN,
    ),
    ZooFamily(
        "qwen3_5_moe",
        image_settings=_AREA_16,
        config={"text_config": {"rope_parameters": _MROPE_QUARTER}},
        **_QWEN,
    ),
    ZooFamily(
        "paddleocr_vl",
        marker="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        tokens={
            "image_token": "<|IMAGE_PLACEHOLDER|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|IMAGE_START|>",
            "vision_end_token": "<|IMAGE_END|>",
        },
        image_settings=_AREA_14,
        config={"text_config": {"rope_parameters": _MROPE}},
    ),
    ZooFamily(
        "blip-2",
        marker="",  # the processor puts the image first
        model_tokens={"image_token": "<image>"},
        processor_settings={"num_query_tokens": 4},
        image_settings=_SQUARE_56,
        config={"num_query_tokens": 4, "image_token_index": "id:<image>"},
    ),
    ZooFamily(
        "instructblip",
        marker="",  # the processor puts the image first
        model_tokens={"image_token": "<image>"},
        processor_settings={"num_query_tokens": 4},
        image_settings=_SQUARE_56,
        config={"num_query_tokens": 4, "image_token_index": "id:<image>"},
    ),
    ZooFamily(
        "paligemma",
        tokens={"image_token": "<image>"},
        text_tokens={"bos_token": "<|im_start|>"},
        image_settings={**_SQUARE_56, "image_seq_length": 16},
        config={"text_config": {"num_image_tokens": 16}},
    ),
    ZooFamily(
        "paligemma2",
        model_type="paligemma",
        tokens={"image_token": "<image>"},
        text_tokens={"bos_token": "<|im_start|>"},
        image_settings={**_SQUARE_56, "image_seq_length": 16},
        config={
            "text_config": {
                "model_type": "gemma2",
                "num_image_tokens": 16,
                "sliding_window": 16,
                "query_pre_attn_scalar": HEAD,
            }
        },
    ),
    ZooFamily(
        "mllama",
        marker="<|image|>",
        tokens={"image_token": "<|image|>"},
        unnamed_tokens=("<|python_tag|>", "<|begin_of_text|>"),
        text_tokens={"bos_token": "<|begin_of_text|>"},
        image_settings=_SQUARE_56,
        config={
            "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 3 * WIDTH},
            "text_config": {"cross_attention_layers": [1]},
        },
    ),
    ZooFamily(
        "got_ocr2",
        marker="<imgpad>",
        unnamed_tokens=("<imgpad>",),
        model_tokens={"image_token": "<imgpad>"},
        # the processor writes 256 tokens for every image, which is 64 x 64 patches
        image_settings={"size": {"height": 256, "width": 256}},
        config={"vision_config": _SAM_64},
    ),
    ZooFamily(
        "perception_lm",
        marker="<|image|>",
        tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
        processor_settings={"patch_size": 14, "pooling_ratio": 2},
        image_settings={"tile_size": 56, "max_num_tiles": 4, **_SQUARE_56},
        config={
            "projector_pooling_ratio": 2,
            "vision_config": {
                "architecture": "vit_pe_core_large_patch14_336",
                "do_pooling": True,
                "model_args": {
                    "embed_dim": WIDTH,
                    "depth": LAYERS,
                    "num_heads": 4,
                    "img_size": [56, 56],
                    "ref_feat_shape": [4, 4],
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                },
            },
        },
        needs=("timm",),
    ),
    ZooFamily(
        "ernie4_5_vl_moe",
        marker="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        tokens={
            "image_token": "<|IMAGE_PLACEHOLDER|>",
            "image_start_token": "<|IMAGE_START|>",
            "image_end_token": "<|IMAGE_END|>",
            "video_token": "<|VIDEO_PLACEHOLDER|>",
            "video_start_token": "<|VIDEO_START|>",
            "video_end_token": "<|VIDEO_END|>",
        },
        image_settings=_AREA_14,
        # it has to be a file, to be saved beside the rest; on images nothing is drawn
        video_settings={"font": __file__},
        config={
            "text_config": {
                "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]},
                "moe_intermediate_size": [32, 16],
            }
        },
    ),
    ZooFamily(
        "florence2",
        marker="",  # the processor puts the image first
        tokens={"image_token": "<image>"},
        text_tokens={"bos_token": "<|im_start|>"},
        image_processor="CLIPImageProcessor",
        image_settings={
            "size": {"height": 64, "width": 64},
            "crop_size": {"height": 64, "width": 64},
            "image_seq_length": 5,
        },
        config={
            "vision_config": {
                "embed_dim": [16, 16, 32, 32],
                "depths": [1, 1, 1, 1],
                "num_heads": [2, 2, 2, 2],
                "num_groups": [2, 2, 2, 2],
                "patch_size": [7, 3, 3, 3],
                "window_size": 4,
            },
        },
    ),
    ZooFamily(
        "kimi_k25",
        marker="<|media_pad|>",
        tokens={"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"},
        image_settings={"max_patches": 64, "size": {"max_height": 112, "max_width": 112}},
        config={"vision_config": {"pos_emb_height": 8, "pos_emb_width": 8}},
    ),
    ZooFamily(
        "video_llama_3", marker="<|image_pad|>", tokens=_QWEN_TOKENS, image_settings={**_AREA_16, "merge_size": 2}
    ),
    ZooFamily(
        "exaone4_5",
        marker="<|image_pad|>",
        tokens=_QWEN_TOKENS,
        image_settings=_AREA_14,
    ),
    ZooFamily(
        "cohere_compass",
        marker="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
        tokens={
            "image_token": "<|IMAGE_PAD|>",
            "video_token": "<|VIDEO_PAD|>",
            "vision_start_token": "<|VISION_START|>",
            "vision_end_token": "<|VISION_END|>",
        },
        image_settings=_AREA_16,
        config={"text_config": {"rope_parameters": {"full_attention": _MROPE}}},
    ),
    ZooFamily(
        "cosmos3_edge",
        # the model asks for them, the processor's own default leaves them out
        tokenizer_settings={"return_mm_token_type_ids": True},
        image_settings=_AREA_16,
        config={"text_config": {"rope_parameters": _MROPE}},
        **_QWEN,
    ),
    ZooFamily(
        "cosmos3_omni",
        processor="Qwen3VLProcessor",
        image_settings=_AREA_16,
        config={"text_config": {"rope_parameters": _MROPE}},
        **_QWEN,
    ),
    ZooFamily(
        "deepseek_ocr2",
        tokens={"image_token": "<image>"},
        processor_settings={"patch_size": 4},
        image_settings={"size": {"height": 256, "width": 256}, "tile_size": 192},
        config={
            "vision_config": {
                "sam_config": {**_SAM_64, "downsample_channels": [32, WIDTH]},
            },
            "text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        },
    ),
    ZooFamily(
        "unlimited_ocr",
        tokens={"image_token": "<image>"},
        processor_settings={"patch_size": 4},
        image_settings={
            "size": {"height": 64, "width": 64},
            "tile_size": 64,
            "maximum_pad_value": 64,
            "max_patches": 4,
        },
        config={
            "vision_config": {
                "sam_config": {"image_size": 64, "patch_size": 4, "window_size": 8, "downsample_channels": [32, WIDTH]},
            },
        },
    ),
    ZooFamily(
        "dots3_note",
        marker="<|img|><|imgpad|><|endofimg|>",
        tokens={"image_token": "<|imgpad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_comp_pad|>"},
        unnamed_tokens=("<|img|>", "<|endofimg|>"),
        image_settings={**_AREA_14, "temporal_patch_size": 1},
        config={
            "text_config": {
                "head_dim": 2 * HEAD,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 4,
                "swa_q_lora_rank": HEAD,
                "swa_kv_lora_rank": HEAD,
                "swa_head_dim": 2 * HEAD,
                "swa_qk_nope_head_dim": HEAD,
                "swa_v_head_dim": HEAD,
            },
            "audio_config": {"downsample_hidden_size": 16},
        },
    ),
    ZooFamily(
        "gemma3n",
        marker="<image_soft_token>",
        tokens=_GEMMA,
        processor_settings={"image_seq_length": 16, "audio_seq_length": 4},
        image_settings=_SQUARE_64,
        config={
            "text_config": {"num_kv_shared_layers": 0},
            "vision_config": {
                "hidden_size": 2048,
                "model_args": {"channel_multiplier": 0.1, "msfa_output_resolution": 4},
            },
            "vision_soft_tokens_per_image": 16,
        },
        needs=("timm",),
    ),
    ZooFamily(
        "gemma4_unified",
        marker="<image_soft_token>",
        tokens=_GEMMA,
        image_settings={"max_soft_tokens": 70},
        config={
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "mm_embed_dim": WIDTH,
                "mm_posemb_size": 64,
                "output_proj_dims": WIDTH,
            },
        },
    ),
    ZooFamily(
        "git",
        marker="",
        image_settings=_CROPPED_56,
        config={"vision_config": {"image_size": 56, "patch_size": 14}},
    ),
    ZooFamily("glm5_next", config={"text_config": {"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 4}}, **_GLM),
    ZooFamily("glmga", processor="Glm46VProcessor", config={"text_config": {"rope_parameters": _MROPE}}, **_GLM),
    ZooFamily(
        "granite_docling",
        tokens={"image_token": "<image>"},
        unnamed_tokens=_IDEFICS_TOKENS,
        processor_settings={"image_seq_len": 1},
        image_settings={**_SQUARE_64, "max_patches": 4},
        config={"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    ),
    ZooFamily(
        "hunyuan_vl",
        marker="<|hy_place_image_start|><|hy_place_image|><|hy_place_image_end|>",
        tokens={
            "image_token": "<|hy_place_image|>",
            "image_start_token": "<|hy_place_image_start|>",
            "image_end_token": "<|hy_place_image_end|>",
        },
        unnamed_tokens=("<|hy_newline|>",),
        image_settings=_AREA_16,
        config={
            "im_start_id": "id:<|hy_place_image_start|>",
            "im_end_id": "id:<|hy_place_image_end|>",
            "im_newline_id": "id:<|hy_newline|>",
            "vision_config": {"max_image_size": 128, "min_image_size": 64, "img_max_token_num": 64},
            "text_config": {"rope_parameters": {**_MROPE, "mrope_section": [2, 2, 2, 2]}, "head_dim": HEAD},
        },
    ),
    ZooFamily(
        "hy_v4_vl",
        image_settings=_AREA_16,
        config={"text_config": {"rope_parameters": _MROPE}, "vision_config": {"max_image_size": 128}},
        **_QWEN,
    ),
    ZooFamily("hyperclovax_vision_v2", image_settings=_AREA_14, **_QWEN),
    ZooFamily(
        "idefics",
        tokens={"image_token": "<image>"},
        unnamed_tokens=("<fake_token_around_image>",),
        text_tokens={"bos_token": "<|im_start|>"},
        processor_settings={"image_size": 56},
        image_settings={"image_size": 56},
        config={"use_resampler": False, "perceiver_config": {"use_resampler": False}},
    ),
    ZooFamily(
        "inkling2",
        marker="<|unused_200054|>",
        tokens={"image_token": "<|unused_200054|>"},
        image_settings={"size": {"height": 40, "width": 40}},
        config={
            "vision_config": {"patch_size": 20, "posemb_grid_size": 8},
            "text_config": {"n_layers_per_attn_res_block": 1},
        },
    ),
    ZooFamily(
        "inkling2_loop",
        marker="<|unused_200054|>",
        tokens={"image_token": "<|unused_200054|>"},
        image_settings={"size": {"height": 40, "width": 40}},
        config={
            "vision_config": {"patch_size": 20, "posemb_grid_size": 8},
            "text_config": {
                "n_layers_per_attn_res_block": 1,
                "loop_layer_index_start": 1,
                "loop_layer_index_end": 2,
            },
        },
    ),
    ZooFamily(
        "inkling_mm_model",
        marker="<|content_image|><|unused_200054|>",
        tokens={"image_token": "<|unused_200054|>", "audio_token": "<|unused_200053|>"},
        unnamed_tokens=("<|content_image|>", "<|content_audio_input|>"),
        image_settings={"size": {"height": 20, "width": 20}},
        config={"vision_config": {"patch_size": 20}, "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 16}},
    ),
    ZooFamily(
        "kosmos-2",
        processor="Kosmos2Processor",
        marker="",  # the processor puts the image first
        text_tokens={"bos_token": "<|im_start|>", "unk_token": "<unk>"},
        # an image is the 64 ids after the unknown token's
        unnamed_tokens=("<unk>", *(f"<image_{index}>" for index in range(64)), "</image>"),
        image_settings=_CROPPED_56,
        config={"latent_query_num": 64, "vision_config": {"image_size": 56}},
    ),
    ZooFamily(
        "kosmos-2.5",
        processor="Kosmos2_5Processor",
        marker="",  # the processor puts the image first
        text_tokens={"bos_token": "<|im_start|>"},
        tokens={"image_token": "<s>", "boi_token": "<image>", "eoi_token": "</image>"},
        processor_settings={"num_image_tokens": 4},
        config={"latent_query_num": 4, "vision_config": {"patch_embed_hidden_size": 768}},
    ),
    ZooFamily("lfm3_vl", image_settings=_AREA_16, **_QWEN),
    *(
        ZooFamily(
            name,
            marker="<image>",
            tokens={
                "image_token": "<image>",
                "video_token": "<video>",
                "image_start_token": "<im_start>",
                "image_end_token": "<im_end>",
                "slice_start_token": "<slice>",
                "slice_end_token": "</slice>",
                "image_id_start_token": "<image_id>",
                "image_id_end_token": "</image_id>",
            },
            image_settings={"scale_resolution": 112, "patch_size": 14, "max_slice_nums": 4},
            config={
                "vision_config": {"insert_layer_id": 1, "patch_size": 14, "image_size": 112},
                "insert_layer_id": 1,
                "patch_size": 14,
            },
        )
        for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
    ),
    ZooFamily(
        "minimax_m3_vl",
        marker="]<]image[>[",
        tokens={"image_token": "]<]image[>[", "video_token": "]<]video[>["},
        unnamed_tokens=("]<]start of image[>[", "]<]end of image[>["),
        image_settings=_AREA_14,
    ),
    ZooFamily(
        "mistral_large4",
        processor_settings={"patch_size": 14, "spatial_merge_size": 2},
        image_settings={**_PIXTRAL_IMAGES, "patch_size": {"height": 28, "width": 28}},
        config={"vision_config": {"image_size": 112, "patch_size": 14}},
        **_PIXTRAL,
    ),
    *(
        ZooFamily(
            name,
            marker="<|patch|>",
            tokens={"image_token": "<|patch|>", "video_token": "<|video|>", **audio},
            unnamed_tokens=(
                "<|image_start|>",
                "<|image_end|>",
                "<|vid_frame_separator|>",
                "<|vid_start|>",
                "<|vid_end|>",
                "<|soft_audio_start|>",
                "<|soft_audio_end|>",
            ),
            image_settings={"max_image_tokens": 16},
            config={
                "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8},
                "out_hidden_size": 4 * WIDTH,
                **audio_config,
            },
        )
        for name, audio, audio_config in (
            ("muse_glimmer", {}, {}),
            (
                "muse_spark",
                {"audio_token": "<|audio|>"},
                {
                    "audio_config": {
                        "num_hidden_layers": 4,
                        "hidden_sizes": [16, 16, 32, 32],
                        "depths": [1, 1, 1, 1],
                        "patch_sizes": [16, 6, 5, 4],
                    }
                },
            ),
        )
    ),
    ZooFamily(
        "nemotron_h_omni",
        feature_extractor="ParakeetFeatureExtractor",
        tokens={"image_token": "<image>", "video_token": "<video>", "audio_token": "<so_embedding>"},
        unnamed_tokens=("<so_start>", "<so_end>", "<img>", "</img>"),
        image_settings={"min_num_patches": 4, "max_num_patches": 16},
        config={
            "image_token_id": "id:<image>",
            "video_token_id": "id:<video>",
            "vision_config": {"patch_dim": 768, "max_img_size": 128},
            "text_config": {"n_groups": 2},
        },
    ),
    ZooFamily(
        "qianfan_ocr",
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
        model_tokens={"image_token": "<IMG_CONTEXT>"},
        processor_settings={"image_seq_length": 4},
        image_settings={**_SQUARE_56, "max_patches": 4, "crop_to_patches": True},
    ),
    ZooFamily(
        "pp_chart2table",
        # the template, not the processor, writes an image's 256 tokens
        marker="<img>" + "<imgpad>" * 256 + "</img>",
        unnamed_tokens=("<imgpad>",),
        model_tokens={"image_token": "<imgpad>"},
        image_settings={"size": {"height": 256, "width": 256}},
        config={"vision_config": _SAM_64},
    ),
    ZooFamily(
        "qwen2_5_omni_thinker",
        processor="Qwen2_5OmniProcessor",
        image_processor="Qwen2VLImageProcessor",
        video_processor="Qwen2VLVideoProcessor",
        feature_extractor="WhisperFeatureExtractor",
        marker="<|vision_bos|><|IMAGE|><|vision_eos|>",
        tokens=_OMNI,
        image_settings=_AREA_14,
        config={
            "vision_start_token_id": "id:<|vision_bos|>",
            "audio_start_token_id": "id:<|audio_bos|>",
            "audio_end_token_id": "id:<|audio_eos|>",
            "audio_config": {**_SMALL_AUDIO, "downsample_hidden_size": ...},
            "text_config": {"rope_parameters": _MROPE},
        },
    ),
    ZooFamily(
        "qwen3_omni_moe_thinker",
        processor="Qwen3OmniMoeProcessor",
        image_processor="Qwen2VLImageProcessor",
        video_processor="Qwen2VLVideoProcessor",
        feature_extractor="WhisperFeatureExtractor",
        marker="<|vision_bos|><|IMAGE|><|vision_eos|>",
        tokens=_OMNI,
        image_settings=_AREA_16,
        config={
            "vision_start_token_id": "id:<|vision_bos|>",
            "audio_start_token_id": "id:<|audio_bos|>",
            "audio_end_token_id": "id:<|audio_eos|>",
            "audio_config": _SMALL_AUDIO,
            "text_config": {"rope_parameters": _MROPE},
        },
    ),
    ZooFamily(
        "qwen4_exp",
        image_settings=_AREA_16,
        config={
            "text_config": {
                "rope_parameters": _MROPE,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": HEAD,
                "indexer_budget": 16,
                "indexer_compress_ratio": 4,
            }
        },
        **_QWEN,
    ),
    ZooFamily(
        "step3p7",
        marker="<im_patch>",
        unnamed_tokens=("<im_patch>", "<patch_start>", "<patch_end>", "<patch_newline>", "<im_start>", "<im_end>"),
        model_tokens={"image_token": "<im_patch>"},
        image_settings={"size": {"height": 112, "width": 112}, "patch_size": 56},
        config={
            "vision_config": {"image_size": 112, "patch_size": 14, "max_position_embeddings": 64},
            "text_config": {
                "sliding_window": 16,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
        },
    ),
    ZooFamily(
        "apertus1p5",
        tokens={
            "image_token": "<|image|>",
            "audio_token": "<|audio|>",
            "boi_token": "<|img_start|>",
            "eoi_token": "<|img_end|>",
            "image_wrapper_token": "<|img_token_start|>",
            "eol_token": "<|img_end_of_row|>",
            "boa_token": "<|audio_start|>",
            "eoa_token": "<|audio_end|>",
        },
        marker="<|image|>",
        image_settings={"size": {"min_pixels": 32 * 32, "max_pixels": 64 * 64}},
        # codes of pictures and of sounds are tokens behind those of text
        config={
            "text_config": {"vocab_size": 512},
            "vision_config": {**_VQ, "codebook_size": 64, "channel_multiplier": [1, 1, 1, 1, 2], "resolution": 64},
            "audio_config": {"codebook_size": 16, "num_filters": 4},
            "image_token_offset": 320,
            "audio_token_offset": 384,
        },
    ),
    ZooFamily("blip", marker="", image_settings=_SQUARE_64),
    ZooFamily(
        "t5gemma2",
        marker="<start_of_image>",
        tokens={role: _GEMMA[role] for role in ("image_token", "boi_token", "eoi_token")},
        processor_settings={"image_seq_length": 16},
        image_settings=_SQUARE_64,
    ),
)

UNSUPPORTED: dict[str, str] = {
    "llama4": "its own forward raises AttributeError: it reads image_outputs from a language model's output",
    "evolla": "reads proteins, not images",
    "fuyu": (
        "has no vision tower, patches go through one linear layer; and its processor cuts off the first token of an "
        "image, which is the underscore that a SentencePiece tokenizer puts there"
    ),
    "instructblipvideo": "reads videos, and its processor takes no image",
    "mistral4": "a language model alone: it is in the mapping as the text part of others",
    "diffusion_gemma": "denoises a block of tokens at once; it has no logits of a next token",
    "pix2struct": "a question is drawn into the picture with a font that is downloaded; the text input is the answer",
    "pp_formulanet": "writes the formula in a picture, and its processor takes no question",
    "shieldgemma2": "a gemma3 model whose processor writes the questions itself, one for each policy",
    "udop": "wants the words of a document and their boxes beside the image, from an OCR program",
    "vision-encoder-decoder": "a frame for any two models, without a processor and without a question",
    "pi0": "predicts the actions of a robot from its state; it has no logits over text",
}
