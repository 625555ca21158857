"""Memory a GPU, by part and engine, of models of 7 to 72 billion parameters, from their configurations alone.

    python -m benchmarks.memory            # a minute; nothing is loaded

The configurations are those that the models were published with; `pivot optimize MODEL PREFS --plan` reads your
model's.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
)

from pivot_plugin.runs.planning import plan

PROCESSES, PAIRS = 8, 2
GPU = 80_000_000_000


def qwen2_5_vl(
    hidden: int, inner: int, layers: int, heads: int, key_value_heads: int, vocabulary: int
) -> PreTrainedConfig:
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": 152064,
        "rope_parameters": {"type": "mrope", "mrope_section": [16, 24, 24], "rope_type": "default"},
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3456,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def llava() -> PreTrainedConfig:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
        vocab_size=32000,
    )
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)
    return LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2)


def internvl() -> PreTrainedConfig:
    vision = InternVLVisionConfig(image_size=[448, 448], patch_size=[14, 14])
    text = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=151674,
    )
    return InternVLConfig(vision_config=vision, text_config=text)


MODELS = {
    "LLaVA-1.5-7B": llava,
    "InternVL3-8B": internvl,
    "Qwen2.5-VL-7B": lambda: qwen2_5_vl(3584, 18944, 28, 28, 4),
    "Qwen2.5-VL-72B": lambda: qwen2_5_vl(8192, 29568, 80, 64, 8),
}
WHAT: dict[str, dict[str, Any]] = {
    "LoRA": {"train": "encoder", "lora": 16},
    "all": {"train": "all", "lora": None},
}


def empty(config: PreTrainedConfig) -> Any:
    """A model of a configuration, without weights, in bfloat16."""
    config.dtype = torch.bfloat16
    with init_empty_weights():
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def main() -> None:
    for name, configuration in MODELS.items():
        model = empty(configuration())
        plans = [plan(model, processes=PROCESSES, pairs=PAIRS, gpu_memory=GPU, **options) for options in WHAT.values()]
        print(f"\n**{name}**, {plans[0].sizes.parameters / 1e9:.2f} billion parameters\n")
        engines = plans[0].rows()[0][1:]
        print(f"| GB a GPU | {' | '.join(f'{what}: {engine}' for what in WHAT for engine in engines)} |")
        print(f"|---|{'---:|' * len(WHAT) * len(engines)}")
        for rows in zip(*(made.rows()[1:] for made in plans), strict=True):
            print("| " + " | ".join([rows[0][0], *(cell for row in rows for cell in row[1:])]) + " |")


if __name__ == "__main__":
    main()
