"""What the preset for GPUs takes of memory and of time, computed from configurations before anything is built."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.data.pairs import load_pairs
from pivot_plugin.models.find import find_adapter
from pivot_plugin.training.batch import ForestCollator

from .machine import PEAKS
from .shapes import Shape, pairs_of
from .work import activation_bytes, distinct, operations, repeated

GIB = 2**30
RANK = 16
# what the estimate of time takes for granted: the card, the share of its peak that either side reaches, and what
# building a model and its first steps take, in seconds, for each of three sides
CARD, SHARE, BUILDING = "H100", 0.2, 10.0


@dataclass(frozen=True)
class Budget:
    """One shape, computed.

    Attributes:
        shape: which.
        parameters: of the model.
        weights: bytes of it in bfloat16, and of the LoRA with gradients and Adam's moments in float32.
        activations: bytes that a step keeps: ours, TRL's.
        flops: operations of a training step: ours, TRL's with its reference.
        seconds: of the whole shape, estimated.
        nodes: distinct tokens of a batch.
        sequence_tokens: tokens of its answers as sequences of their own.
    """

    shape: Shape
    parameters: int
    weights: int
    activations: tuple[int, int]
    flops: tuple[int, int]
    seconds: float
    nodes: int
    sequence_tokens: int

    @property
    def peak(self) -> int:
        """Bytes at the peak, of the larger side."""
        return self.weights + max(self.activations)

    def told(self) -> str:
        """In two lines."""
        ours, trl = (size / GIB for size in self.activations)
        mine, theirs = (count / 1e12 for count in self.flops)
        return (
            f"{self.shape.name}: {self.parameters / 1e9:.2f} B parameters, {self.weights / GIB:.1f} GiB with the LoRA; "
            f"a step keeps {ours:.1f} GiB, TRL's {trl:.1f}: peak about {self.peak / GIB:.0f} GiB\n"
            f"  {self.shape.pairs} pairs are {self.nodes:,} distinct tokens of {self.sequence_tokens:,}: "
            f"{mine:.0f} TFLOP a step, TRL's {theirs:.0f}; about {self.seconds:.0f} s in all at {SHARE:.0%} of a {CARD}"
        )


def budget(shape: Shape, model: PreTrainedModel, processor: ProcessorMixin, checkpointing: bool, steps: int) -> Budget:
    """Compute what measuring a shape takes.

    Args:
        shape: to measure.
        model: of its sizes and in its precision, frozen, on the meta device.
        processor: the model's.
        checkpointing: whether layers are computed again in the backward pass.
        steps: of each side, in all rounds.
    """
    pairs = load_pairs(pairs_of(shape, 1))
    adapter = find_adapter(model)
    batch = ForestCollator(processor, adapter.image_token_id)([pairs[index] for index in range(len(pairs))])["forest"]
    once, twice = distinct(model, batch), repeated(model, batch)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lora = RANK * sum(sum(m.weight.shape) for m in adapter.tower.modules() if isinstance(m, nn.Linear))
    ours, trl = operations(model, once), operations(model, twice, forwards=2)
    reference = operations(model, once, backwards=0)
    # trainer and bare loop, and what counts memory and operations once more
    in_all = (steps + 2) * (trl + ours) + steps * (ours + reference)
    return Budget(
        shape=shape,
        parameters=parameters,
        weights=2 * parameters + 16 * lora,
        activations=(activation_bytes(model, once, checkpointing), activation_bytes(model, twice, checkpointing)),
        flops=(ours, trl),
        seconds=in_all / (SHARE * PEAKS[CARD] * 1e12) + 3 * BUILDING,
        nodes=once.tokens,
        sequence_tokens=twice.tokens,
    )
