"""What a step must compute, and what it takes of memory, by the shape of model and batch: no pass is run for it.

Operations are those of a frozen model with a LoRA on its vision tower: a matrix of N weights costs a token 2N
operations forward and 2N backward, for the gradient of its input alone; the two products of attention cost twice as
much backward as forward, and are counted between tokens that see each other. Counted is what the distinct tokens of a
batch need: no padding, nothing twice, no forward pass repeated by checkpointing, and the LoRA itself, below one in a
hundred, left out. Divided by time and by what the device can do, that is the model FLOPs utilisation (MFU, PaLM, arXiv
2204.02311, appendix B).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from pivot_plugin.models.find import find_adapter
from pivot_plugin.training.batch import ForestBatch


@dataclass(frozen=True)
class Work:
    """What goes through a model in one step.

    Attributes:
        tokens: of the language model.
        attended: (query, key) pairs of tokens that see each other there.
        scored: tokens whose probability is computed.
        image_tokens: of the projector.
        images: for each picture or tile the patches (and class tokens) of its sequence in the tower.
        windows: for each the pairs of patches that see each other in a layer of windows; as in the others where a tower
            has none.
    """

    tokens: int
    attended: int
    scored: int
    image_tokens: int
    images: tuple[int, ...]
    windows: tuple[int, ...]


def distinct(model: PreTrainedModel, batch: ForestBatch) -> Work:
    """What a batch needs where nothing is computed twice.

    Args:
        model: that will compute it; its weights are not read.
        batch: collated.
    """
    forest = batch.forest
    images, windows = _images(model, batch.image_inputs)
    return Work(
        tokens=forest.node_count,
        attended=int((forest.depth[forest.is_node] + 1).sum()),
        scored=len(forest.edge_parent),
        image_tokens=sum(batch.image_tokens),
        images=images,
        windows=windows,
    )


def repeated(model: PreTrainedModel, batch: ForestBatch) -> Work:
    """What the same pairs need where every answer is a sequence of its own, with its pictures: TRL's way.

    Args:
        model, batch: as for `distinct`.
    """
    forest = batch.forest
    lengths = [len(path) for path in forest.paths]
    images, windows = _images(model, batch.image_inputs)
    # the pictures of a tree, for each of its sequences
    times = forest.sequence_tree.numel() / len(batch.tree_images)
    copies = round(times * sum(map(len, batch.tree_images)) / max(1, len(batch.image_tokens)))
    return Work(
        tokens=sum(lengths),
        attended=sum(length * (length + 1) // 2 for length in lengths),
        scored=int((forest.edge_of >= 0).sum()),
        image_tokens=copies * sum(batch.image_tokens),
        images=images * copies,
        windows=windows * copies,
    )


def _images(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each picture its patches, and the pairs of patches within windows."""
    config = model.config.vision_config
    if "image_grid_thw" in inputs:
        grids = inputs["image_grid_thw"].tolist()
        window = getattr(config, "window_size", 0) // config.patch_size
        sizes = tuple(frames * height * width for frames, height, width in grids)
        if not window:
            return sizes, tuple(size**2 for size in sizes)
        return sizes, tuple(
            frames * sum(n**2 for n in _parts(height, window)) * sum(n**2 for n in _parts(width, window))
            for frames, height, width in grids
        )
    count = inputs["pixel_values"].shape[0]
    side, patch = (size if isinstance(size, int) else size[0] for size in (config.image_size, config.patch_size))
    patches = (side // patch) ** 2 + 1
    return (patches,) * count, (patches**2,) * count


def _parts(length: int, window: int) -> list[int]:
    """A length in windows; the last is what is left."""
    return [min(window, length - start) for start in range(0, length, window)]


def operations(model: PreTrainedModel, work: Work, forwards: int = 1, backwards: int = 1) -> int:
    """Floating-point operations that some work needs.

    Args:
        model: its sizes count; it may lie on the meta device.
        work: what goes through it.
        forwards, backwards: how many passes of each kind.
    """
    adapter = find_adapter(model)
    towers = {id(module) for module in adapter.tower.modules()}
    layers = {id(module) for module in _decoder_layers(model).modules()}
    head = model.get_output_embeddings()
    unused = _unused_layers(model, adapter.tower)
    patches, total = sum(work.images), 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) or "lora_" in name or id(module) in unused:
            continue
        # patches are embedded from pixels, which need no gradient
        passes = forwards + (0 if isinstance(module, nn.Conv2d | nn.Conv3d) else backwards)
        if module is head:
            count = work.scored
        elif id(module) in layers:
            count = work.tokens
        elif id(module) in towers and "merger" not in name:
            count = patches
        else:
            # a merger or projector; its first layer takes several patches as one row
            count = work.image_tokens
        total += 2 * module.weight.numel() * count * passes
    text = model.config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    passes = forwards + 2 * backwards
    total += 4 * width * work.attended * text.num_hidden_layers * passes
    vision = model.config.vision_config
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers - len(unused_depth(model))
    indexes = getattr(vision, "fullatt_block_indexes", range(depth))
    whole = sum(index < depth for index in indexes)
    between = whole * sum(size**2 for size in work.images) + (depth - whole) * sum(work.windows)
    return total + 4 * vision.hidden_size * between * passes


def _decoder_layers(model: PreTrainedModel) -> nn.Module:
    layers = model.get_decoder().layers
    assert isinstance(layers, nn.Module)
    return layers


def unused_depth(model: PreTrainedModel) -> range:
    """Tower layers above the one whose features are taken."""
    layer = getattr(model.config, "vision_feature_layer", -1)
    depth = getattr(model.config.vision_config, "num_hidden_layers", 0)
    return range(depth + 1 + layer, depth) if isinstance(layer, int) and layer < 0 else range(0)


def _unused_layers(model: PreTrainedModel, tower: nn.Module) -> set[int]:
    """Modules of tower layers that no feature comes from."""
    for module in tower.modules():
        blocks = [*module.children()] if isinstance(module, nn.ModuleList) else []
        if len(blocks) == getattr(model.config.vision_config, "num_hidden_layers", 0):
            return {id(part) for index in unused_depth(model) for part in blocks[index].modules()}
    return set()


def kept_per_token(model: PreTrainedModel, tokens: int = 61) -> float:
    """Bytes that the decoder keeps of a token for the backward pass, tensors of all tokens by all tokens left out.

    Args:
        model: frozen, on any device, the meta device too: the pass is run there.
        tokens: of the pass; a number that no width of the model is, for tensors are told apart by it.
    """
    decoder = model.get_decoder()
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # kernels of GPUs keep no square of tokens
        if tokens in tensor.shape and tensor.shape[-2:] != (tokens, tokens):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
        return tensor

    width = model.config.get_text_config().hidden_size
    embeddings = torch.zeros(1, tokens, width, dtype=model.dtype, device=model.device, requires_grad=True)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=model.device).tril()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # what is kept lives as long as the result; a whole mask, for the meta device cannot be asked for positions
        output = decoder(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
    if not output.requires_grad:
        raise ValueError("The decoder keeps nothing: gradients are switched off.")
    return sum(storage.nbytes() for storage in kept.values()) / tokens


def activation_bytes(model: PreTrainedModel, work: Work, checkpointing: bool) -> int:
    """Bytes that the forward pass keeps for the backward one, with frozen weights and a LoRA on the tower.

    What the decoder keeps is counted on a short pass. A layer of the tower keeps, in the model's precision, the inputs
    of its norms and, for the LoRA, of its matrices, queries, keys and values, what goes into the activation of its MLP,
    and inputs of the LoRA in its own. With checkpointing the inputs of layers are kept, and the largest layer. Logits
    are computed in parts and are not counted.

    Args:
        model: frozen; it may lie on the meta device.
        work: what goes through it.
        checkpointing: whether a layer is computed again in the backward pass.
    """
    text, vision, size = model.config.get_text_config(), model.config.vision_config, model.dtype.itemsize
    of_decoder = work.tokens * kept_per_token(model)
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    of_block = size * sum(work.images) * (12 * vision.hidden_size + 3 * vision.intermediate_size)
    if not checkpointing:
        return round(of_decoder + depth * of_block)
    inputs = work.tokens * text.hidden_size * text.num_hidden_layers + sum(work.images) * vision.hidden_size * depth
    return round(size * inputs + max(of_decoder / text.num_hidden_layers, of_block))
