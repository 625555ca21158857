"""What training takes of a GPU's memory, by part, before anything is loaded: counted on a model without weights.

Weights, gradients and the optimiser's states are counted to the byte, as accelerate's engines divide them. Activations
are an estimate: of every transformer block what goes into it, and of one what is computed in it, which is what is there
at once where activations are computed again for the backward pass; of all blocks where they are kept.

Source:
    DeepSpeed's ZeRO (arXiv 1910.02054), figure 1, for weights, gradients and states; arXiv 2205.05198 for activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from pivot_plugin.adapters import VisionAdapter

from .plan import TrainingPlan
from .sharding import decoder_blocks

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
# of full precision, in which optimisers keep what trains
FULL = 4
# of an AdamW that keeps a mean and a variance for every parameter
STATES = 2
# beside its linear layers a block keeps its two normed inputs and two sums
BESIDE_LINEAR = 4


@dataclass(frozen=True)
class Batch:
    """What a process computes at once.

    Attributes:
        nodes: of the forest, tokens of the language model.
        patches: that go through the vision tower.
        image_bytes: of the pictures as the processor gives them.
        checkpointed: whether activations are computed again for the backward pass.
    """

    nodes: int
    patches: int
    image_bytes: int
    checkpointed: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training takes of one GPU, by part.

    Attributes:
        engine: "ddp", "fsdp2", "zero2" or "zero3".
        weights: of the model, this process's share.
        gathered: weights that are whole for a moment, of two layers at once.
        gradients, optimiser: of what trains.
        reference: of a reference model; none is held, its log-probabilities are computed beforehand.
        images: of a batch.
        activations: of a batch, estimated.
        whole_model: of the model in one piece, as every process has it on its GPU until the first step.
        host: of a process on the host, while it loads the model, and beside what it keeps to put back after a failure.
    """

    engine: str
    weights: int
    gathered: int
    gradients: int
    optimiser: int
    reference: int
    images: int
    activations: int
    whole_model: int
    host: int

    @property
    def training(self) -> int:
        """Of all parts while it trains."""
        return sum(
            getattr(self, part.name) for part in fields(self) if part.name not in ("engine", "whole_model", "host")
        )

    @property
    def peak(self) -> int:
        """The most of it: while it trains, or before, when each process scores the reference on the whole model."""
        return max(self.training, self.whole_model + self.images + self.activations)


@dataclass(frozen=True)
class ModelSizes:
    """What a model holds, in numbers.

    Attributes:
        frozen, trained: parameters of its own that stay, and that train.
        lora: parameters of LoRA.
        largest_layer: parameters of the largest piece that an engine gathers by itself.
        saved: parameters kept on the host, to be put back after a failure.
        bytes_each: of a parameter as it is loaded.
    """

    frozen: int
    trained: int
    lora: int
    largest_layer: int
    saved: int
    bytes_each: int

    @property
    def parameters(self) -> int:
        """Of the model by itself."""
        return self.frozen + self.trained


def sizes_of(adapter: VisionAdapter, plan: TrainingPlan) -> ModelSizes:
    """Count what a model holds; it may have no weights.

    Args:
        adapter: of the model.
        plan: what trains.
    """
    model = adapter.model
    names = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in names.values())
    trained = sum(names[name].numel() for name in plan.parameters)
    lora = saved = 0
    if plan.lora is None:
        saved = trained
    else:
        copied = plan.lora.modules_to_save or []
        for path, module in model.named_modules():
            if any(f".{path}".endswith(f".{name}") for name in copied):
                trained += sum(parameter.numel() for parameter in module.parameters())
            elif isinstance(module, nn.Linear) and check_target_module_exists(plan.lora, path):
                lora += plan.lora.r * (module.in_features + module.out_features)
                saved += module.weight.numel()
        saved += trained
        # a copy of the projector trains, beside the one that stays
        total += trained
    blocks = [*map(model.get_submodule, adapter.blocks()), *decoder_blocks(model)]
    of_blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    rest = total - sum(of_blocks)
    each = next(iter(names.values())).element_size()
    return ModelSizes(total - trained, trained, lora, max([rest, *of_blocks]), saved, each)


def memory_of(engine: str, sizes: ModelSizes, processes: int, batch: Batch, activations: int) -> MemoryPlan:
    """Bytes that training takes of one GPU.

    Args:
        engine: one of `ENGINES`.
        sizes: of the model.
        processes: among which it is divided.
        batch: that a process computes at once.
        activations: bytes of a batch, as `activations_of` estimates them.
    """
    each = sizes.bytes_each
    trained = sizes.trained + sizes.lora
    share = {"ddp": 1, "zero2": 1, "fsdp2": processes, "zero3": processes}[engine]
    if engine == "ddp":
        # LoRA is in full precision, weights that train themselves as they were loaded
        weights = sizes.parameters * each + sizes.lora * FULL
        of_trained = sizes.trained * each + sizes.lora * FULL
        # what is sent to other processes stands in buckets of its own
        gradients, optimiser = of_trained * (2 if processes > 1 else 1), STATES * of_trained
    elif engine == "fsdp2":
        weights = (sizes.frozen * each + trained * FULL) // share
        gradients, optimiser = trained * FULL // share, STATES * trained * FULL // share
    else:
        weights = (sizes.parameters + sizes.lora) * each // share
        gradients = trained * each // processes
        # with what trains in full precision
        optimiser = (1 + STATES) * trained * FULL // processes
    return MemoryPlan(
        engine,
        weights,
        2 * sizes.largest_layer * each if share > 1 else 0,
        gradients,
        optimiser,
        0,
        batch.image_bytes,
        activations,
        sizes.parameters * each,
        sizes.parameters * each + sizes.saved * each,
    )


def activations_of(adapter: VisionAdapter, batch: Batch, bytes_each: int) -> int:
    """Bytes of the activations of a batch, estimated from the widths of linear layers.

    Args:
        adapter: of the model, which may have no weights.
        batch: to be computed.
        bytes_each: of a number in the precision that is computed in.
    """
    model = adapter.model
    parts = [(batch.patches, list(map(model.get_submodule, adapter.blocks()))), (batch.nodes, decoder_blocks(model))]
    kept = at_once = 0
    for tokens, blocks in parts:
        for block in blocks:
            linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
            width = linear[0].in_features if linear else 0
            inside = tokens * (sum(module.out_features for module in linear) + BESIDE_LINEAR * width)
            kept += tokens * width if batch.checkpointed else inside
            # with as much again for gradients
            at_once = max(at_once, 2 * inside)
    # which node sees which
    mask = batch.nodes**2
    return (kept + at_once + mask) * bytes_each


def table_of(plans: Sequence[MemoryPlan]) -> list[list[str]]:
    """Rows of a table of plans: a part a row, an engine a column, in GB (10^9 bytes).

    Args:
        plans: of several engines.
    """
    parts = [part.name for part in fields(MemoryPlan) if part.name not in ("engine", "whole_model", "host")]
    rows = [["", *(plan.engine for plan in plans)]]
    for part in [*parts, "training"]:
        rows.append([_WORDS.get(part, part), *(gigabytes(getattr(plan, part)) for plan in plans)])
    rows.append(["before the first step: whole model", *(gigabytes(plan.whole_model) for plan in plans)])
    rows.append(["host, a process", *(gigabytes(plan.host) for plan in plans)])
    return rows


def gigabytes(size: int) -> str:
    """A size in 10^9 bytes."""
    return f"{size / 1e9:,.1f}" if size >= 5e7 or not size else f"{size / 1e9:.3f}"


_WORDS = {"gathered": "weights gathered", "activations": "activations (estimate)", "training": "training, together"}
