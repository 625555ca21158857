"""Models as the LLaVA and InternVL repositories have them: their names, settings and forward passes, written anew.

Tiny, random, and independent of what is tested: the towers, InternLM2 and the way images get into the language model
are plain torch here. Decoders that the repositories take from transformers, and CLIP, are transformers' own.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WIDTH, SIDE, PATCH = 32, 56, 14
IMAGE_TOKEN_INDEX = -200
ROWS = 300
PINPOINTS = [(56, 112), (112, 56), (112, 112), (168, 56), (56, 168), (168, 168)]
TEXT = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these special tokens beside <pad>, <unk> and <|im_end|>."""
    tokens = list(dict.fromkeys(["<pad>", "<unk>", "<|im_end|>", *special]))
    vocabulary = {token: index for index, token in enumerate([*tokens, *sorted(ByteLevel.alphabet())])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>"
    )


def random_weights(model: nn.Module, seed: int = 0) -> None:
    """Weights large enough that a wrong feature shows in the logits."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0, 0.08)


# LLaVA


class SigLipEmbeddings(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        count = (config.image_size // config.patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(count, config.hidden_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class Attention(nn.Module):
    """Attention with four projections, over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2))


class SigLipMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


class SigLipLayer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.mlp = SigLipMLP(config.hidden_size, config.intermediate_size)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class SigLipTransformer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.embeddings = SigLipEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(SigLipLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-6)


class SigLipVisionModel(nn.Module):
    """The repository's own SigLIP; its configuration goes on counting the block that the tower deletes."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.vision_model = SigLipTransformer(config)


class SigLipVisionTower(nn.Module):
    """The last block deleted, the last of the hidden states that are left."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.vision_tower = SigLipVisionModel(config)
        del self.vision_tower.vision_model.encoder.layers[-1:]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.vision_tower.vision_model.embeddings(pixels)
        for layer in self.vision_tower.vision_model.encoder.layers:
            hidden = layer(hidden)
        return hidden


class CLIPVisionTower(nn.Module):
    """A chosen hidden state, without the class token."""

    def __init__(self, config: CLIPVisionConfig, layer: int) -> None:
        super().__init__()
        self.vision_tower, self.layer = CLIPVisionModel(config), layer

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vision_tower(pixels, output_hidden_states=True).hidden_states[self.layer][:, 1:]


CLIP_SETTINGS = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
}
SIGLIP_SETTINGS = {**CLIP_SETTINGS, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


class LlavaMeta:
    """What LLaVA adds to a decoder: tower, projector, newline, and images put in where -200 stands."""

    def add_vision(self, config: Any) -> None:
        tower = (
            SigLipVisionTower(SimpleNamespace(**SIGLIP_SETTINGS))
            if "siglip" in config.mm_vision_tower
            else CLIPVisionTower(CLIPVisionConfig(**CLIP_SETTINGS), config.mm_vision_select_layer)
        )
        self.model.vision_tower = tower
        self.model.mm_projector = nn.Sequential(nn.Linear(24, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        if "unpad" in config.mm_patch_merge_type:
            self.model.image_newline = nn.Parameter(torch.empty(WIDTH))

    def image_embeddings(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Embeddings of one image: a picture, or its small version followed by tiles; size is (width, height)."""
        tiled = self.config.image_aspect_ratio or ""
        features = self.model.mm_projector(self.model.vision_tower(image if image.ndim == 4 else image[None]))
        if not tiled.startswith("anyres"):
            return features[0]
        base, tiles, side = features[0], features[1:], SIDE // PATCH
        across, down = (edge // SIDE for edge in best_size(size, self.config.image_grid_pinpoints))
        grid = tiles.view(down, across, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        grid = unpad(grid, size)
        if "max" in tiled:
            limit, (_, high, wide) = int(tiled.rpartition("_")[2]), grid.shape
            times = math.sqrt(high * wide / (limit * side**2))
            if times > 1.1:
                grid = F.interpolate(grid[None], [int(high // times), int(wide // times)], mode="bilinear")[0]
        newline = self.model.image_newline[:, None, None].expand(*grid.shape[:-1], 1)
        return torch.cat((base, torch.cat((grid, newline), dim=-1).flatten(1, 2).T))

    def prepare(self, ids: Sequence[int], images: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> Any:
        """(1, L, D) embeddings of token ids with -200 for each image."""
        table, parts, left = self.get_input_embeddings(), [], iter(zip(images, sizes, strict=True))
        for token in ids:
            if token == IMAGE_TOKEN_INDEX:
                parts.append(self.image_embeddings(*next(left)))
            else:
                parts.append(table(torch.tensor([token])))
        return torch.cat(parts)[None]

    def answer(self, ids: Sequence[int], images: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> Any:
        """(L, vocabulary) logits."""
        return self(inputs_embeds=self.prepare(ids, images, sizes)).logits[0]


def best_size(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size to tile to that keeps most of a picture and wastes least; all sizes are (width, height)."""

    def merit(candidate: tuple[int, int]) -> tuple[int, int]:
        scale = min(candidate[0] / size[0], candidate[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - candidate[0] * candidate[1]

    return max((tuple(pair) for pair in pinpoints), key=merit)


def unpad(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Features (D, rows, columns) without the bars beside or above a picture of this (width, height)."""
    high, wide = grid.shape[1:]
    if size[0] / size[1] > wide / high:
        bar = (high - int(size[1] * wide / size[0])) // 2
        return grid[:, bar : high - bar]
    bar = (wide - int(size[0] * high / size[1])) // 2
    return grid[:, :, bar : wide - bar]


class LlavaLlamaForCausalLM(LlavaMeta, LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.add_vision(config)


class LlavaQwenForCausalLM(LlavaMeta, Qwen2ForCausalLM):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.add_vision(config)


class LlavaMistralForCausalLM(LlavaMeta, MistralForCausalLM):
    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.add_vision(config)


LLAVA_KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "llava_llama": (LlavaLlamaForCausalLM, LlamaConfig),
    "llava_qwen": (LlavaQwenForCausalLM, Qwen2Config),
    "llava_mistral": (LlavaMistralForCausalLM, MistralConfig),
}


def llava_settings(kind: str = "llava_qwen", tower: str = "clip-tiny", **changed: Any) -> dict[str, Any]:
    """config.json of a LLaVA: the decoder's settings, and those of the vision beside them."""
    settings = {
        **TEXT,
        "architectures": [LLAVA_KINDS[kind][0].__name__],
        "model_type": kind,
        "rope_theta": 50000.0,
        "torch_dtype": "float32",
        "mm_vision_tower": tower,
        "mm_hidden_size": 24,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": [list(pair) for pair in PINPOINTS],
        "tokenizer_model_max_length": 2048,
    }
    return settings | changed


def llava(settings: dict[str, Any], seed: int = 0) -> Any:
    """The repository's model with these settings and random weights, in eval mode."""
    model_class, config_class = LLAVA_KINDS[settings["model_type"]]
    config = config_class(
        **{name: value for name, value in settings.items() if name not in ("model_type", "torch_dtype")}
    )
    model = model_class(config)
    random_weights(model, seed)
    return model.float().eval()


# InternVL


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)


class InternAttention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.qkv = nn.Linear(width, 3 * width, bias=config["qkv_bias"])
        self.normed = config["qk_normalization"]
        if self.normed:
            self.q_norm, self.k_norm = RMSNorm(width), RMSNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # (batch, tokens, 3, heads, head width)
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.normed:
            query = self.q_norm(query.flatten(-2)).view_as(query)
            key = self.k_norm(key.flatten(-2)).view_as(key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        weights = (query / math.sqrt(query.shape[-1]) @ key.transpose(-1, -2)).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class InternMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


class InternBlock(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        norm = RMSNorm if config["norm_type"] == "rms_norm" else nn.LayerNorm
        self.attn = InternAttention(config)
        self.mlp = InternMLP(width, config["intermediate_size"])
        self.norm1, self.norm2 = norm(width, eps=1e-6), norm(width, eps=1e-6)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm1(hidden)) * self.ls1
        return hidden + self.mlp(self.norm2(hidden)) * self.ls2


class InternEmbeddings(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, side = config["hidden_size"], config["image_size"] // config["patch_size"]
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, config["patch_size"], config["patch_size"])
        self.position_embedding = nn.Parameter(torch.empty(1, side * side + 1, width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(pixels), -1, -1), patches], 1) + self.position_embedding


class InternVisionModel(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings = InternEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(InternBlock(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        states = [self.embeddings(pixels)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states


def rotated(states: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions on (batch, heads, tokens, head width)."""
    half = states.shape[-1] // 2
    angles = torch.arange(states.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    cosine, sine = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return states * cosine + torch.cat((-states[..., half:], states[..., :half]), -1) * sine


class InternLM2Attention(nn.Module):
    """Queries of a key head, its key and its value lie side by side in one projection."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.theta, width = config["rope_theta"], config["hidden_size"]
        head = width // self.heads
        self.wqkv = nn.Linear(width, (self.heads + 2 * self.groups) * head, bias=config["bias"])
        self.wo = nn.Linear(width, width, bias=config["bias"])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        per = self.heads // self.groups
        states = self.wqkv(hidden).unflatten(-1, (self.groups, per + 2, -1))
        query = states[..., :per, :].flatten(2, 3).transpose(1, 2)
        key, value = (states[..., index, :].transpose(1, 2).repeat_interleave(per, 1) for index in (-2, -1))
        query, key = rotated(query, self.theta), rotated(key, self.theta)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.wo((weights @ value).transpose(1, 2).flatten(2))


class InternLM2MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(hidden)) * self.w3(hidden))


class InternLM2Block(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.attention = InternLM2Attention(config)
        self.feed_forward = InternLM2MLP(width, config["intermediate_size"])
        self.attention_norm = RMSNorm(width, config["rms_norm_eps"])
        self.ffn_norm = RMSNorm(width, config["rms_norm_eps"])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.feed_forward(self.ffn_norm(hidden))


class InternLM2ForCausalLM(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, rows = config["hidden_size"], config["vocab_size"]
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(rows, width)
        self.model.layers = nn.ModuleList(InternLM2Block(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = RMSNorm(width, config["rms_norm_eps"])
        self.output = nn.Linear(width, rows, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.tok_embeddings

    def forward(self, inputs_embeds: torch.Tensor) -> SimpleNamespace:
        hidden = inputs_embeds
        for layer in self.model.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.output(self.model.norm(hidden)))


INTERN_DECODERS: dict[str, tuple[Any, Any]] = {
    "InternLM2ForCausalLM": (InternLM2ForCausalLM, dict),
    "LlamaForCausalLM": (LlamaForCausalLM, LlamaConfig),
    "Qwen2ForCausalLM": (Qwen2ForCausalLM, Qwen2Config),
    "Qwen3ForCausalLM": (Qwen3ForCausalLM, Qwen3Config),
}


class Settings(dict[str, Any]):
    """A configuration as an object and as a dictionary."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


class InternVLChatModel(nn.Module):
    """Tiles into tokens by a pixel shuffle of version 2, put where the context token stands."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.config = Settings(settings)
        self.vision_model = InternVisionModel(settings["vision_config"])
        inner = settings["llm_config"]
        model_class, config_class = INTERN_DECODERS[inner["architectures"][0]]
        self.language_model = model_class(
            config_class(**{name: value for name, value in inner.items() if name != "architectures"})
        )
        ratio, seen = settings["downsample_ratio"], settings["vision_config"]["hidden_size"]
        merged, width = seen * int(1 / ratio) ** 2, inner["hidden_size"]
        self.mlp1 = nn.Sequential(nn.LayerNorm(merged), nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width))

    def extract_feature(self, pixels: torch.Tensor) -> torch.Tensor:
        """(tiles, tokens, D) of pixels."""
        hidden = self.vision_model(pixels)[self.config["select_layer"]][:, 1:]
        side = int(hidden.shape[1] ** 0.5)
        step = int(1 / self.config["downsample_ratio"])
        blocks = hidden.view(len(hidden), side // step, step, side // step, step, -1)
        # a token is a block of patches, row by row
        merged = blocks.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        return self.mlp1(merged)

    def answer(self, ids: torch.Tensor, pixels: torch.Tensor, context: int) -> torch.Tensor:
        """(L, vocabulary) logits of token ids with as many context tokens as the tiles give."""
        embeddings = self.language_model.get_input_embeddings()(ids).clone()
        embeddings[ids == context] = self.extract_feature(pixels).flatten(0, 1)
        return self.language_model(inputs_embeds=embeddings[None]).logits[0]


def internvl_settings(
    decoder: str = "Qwen2ForCausalLM", vision: dict[str, Any] | None = None, **changed: Any
) -> dict[str, Any]:
    """config.json of an InternVL."""
    inner: dict[str, Any] = {**TEXT, "architectures": [decoder], "rope_theta": 50000.0}
    if decoder == "InternLM2ForCausalLM":
        inner["bias"] = False
    if decoder == "Qwen3ForCausalLM":
        inner["head_dim"] = 8
    settings = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "torch_dtype": "float32",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE,
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "llm_config": inner,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": SIDE,
            "patch_size": PATCH,
            "qkv_bias": True,
            "qk_normalization": False,
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            **(vision or {}),
        },
    }
    return settings | changed


def internvl(settings: dict[str, Any], seed: int = 0) -> InternVLChatModel:
    """The repository's model with these settings and random weights, in eval mode."""
    model = InternVLChatModel(settings)
    random_weights(model, seed)
    return model.float().eval()


# Pictures


def pixels(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(3, height, width) of a picture, with mean and deviation of each colour taken off."""
    colours = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 255
    return (colours - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def padded(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """A picture in the middle of a square of the mean colour, at the tower's size."""
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), tuple(int(colour * 255) for colour in mean))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def cut(image: Image.Image) -> list[Image.Image]:
    """Tiles of the tower's size, row by row."""
    corners = [(left, top) for top in range(0, image.height, SIDE) for left in range(0, image.width, SIDE)]
    return [image.crop((left, top, left + SIDE, top + SIDE)) for left, top in corners]


def anyres_tiles(image: Image.Image) -> list[Image.Image]:
    """The whole of a picture, then tiles of it as it stands in the middle of black at the best size."""
    wide, high = best_size(image.size, PINPOINTS)
    scale = min(wide / image.width, high / image.height)
    new = min(math.ceil(image.width * scale), wide), min(math.ceil(image.height * scale), high)
    canvas = Image.new("RGB", (wide, high))
    canvas.paste(image.resize(new, Image.Resampling.BICUBIC), ((wide - new[0]) // 2, (high - new[1]) // 2))
    return [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), *cut(canvas)]


def dynamic_tiles(image: Image.Image, least: int, most: int) -> list[Image.Image]:
    """InternVL's tiles: a grid of the shape nearest the picture's, and the whole of it last if they are several."""
    grids = sorted(
        {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if least <= i * j <= most},
        key=lambda grid: grid[0] * grid[1],
    )
    shape, best, nearest = image.width / image.height, (1, 1), math.inf
    for grid in grids:
        distance = abs(shape - grid[0] / grid[1])
        roomy = image.width * image.height > 0.5 * SIDE * SIDE * grid[0] * grid[1]
        if distance < nearest or (distance == nearest and roomy):
            best, nearest = grid, distance
    wide, high = best[0] * SIDE, best[1] * SIDE
    large = image.resize((wide, high), Image.Resampling.BICUBIC)
    tiles = cut(large)
    return tiles if len(tiles) == 1 else [*tiles, image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)]


# Folders


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's tensors as its checkpoint has them: CLIP under the names of older releases, tied ones once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        head, tower, tail = name.partition("vision_tower.vision_tower.")
        if tower and not tail.startswith("vision_model."):
            name = f"{head}{tower}vision_model.{tail}"
        tensors[name] = tensor.detach().clone().contiguous()
    return tensors


def write(
    folder: Path,
    settings: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    tokens: PreTrainedTokenizerFast | None = None,
    shards: int = 2,
) -> Path:
    """Write a checkpoint folder, in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    names = list(tensors)
    files: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        share = names[shard::shards]
        save_file({name: tensors[name] for name in share}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(share, file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokens is not None:
        tokens.save_pretrained(folder)
    return folder


def write_tower(folder: Path, kind: str) -> Path:
    """Write the folder that mm_vision_tower names, with its configuration alone."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = SIGLIP_SETTINGS if kind == "siglip" else CLIP_SETTINGS
    (folder / "config.json").write_text(json.dumps({"model_type": f"{kind}_vision_model", **settings}))
    return folder


def with_marks(ids: torch.Tensor, marker: int, mark: int = IMAGE_TOKEN_INDEX) -> list[int]:
    """Token ids in which every run of a marker is one mark, as the repository has it."""
    kept: list[int] = []
    for index, token in enumerate(ids.tolist()):
        if token != marker:
            kept.append(token)
        elif index == 0 or ids[index - 1] != marker:
            kept.append(mark)
    return kept
