"""What a run would take of a machine's memory, told before anything is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import PivotConfig, Train
from pivot_plugin.errors import SettingsError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import empty_model
from pivot_plugin.training.memory import (
    ENGINES,
    Batch,
    MemoryPlan,
    ModelSizes,
    activations_of,
    gigabytes,
    memory_of,
    sizes_of,
    table_of,
)
from pivot_plugin.training.plan import plan as training_plan

# of a question with two answers
TEXT_TOKENS = 512
# of a picture, where a tower takes any size
PIXELS = 1_000_000
# of a picture of about so many pixels, where it is cut into tiles
TILES = 5
# of a pixel as processors give it: three colours in full precision
BYTES_PER_PIXEL = 12


@dataclass(frozen=True)
class RunPlan:
    """What a run would take of the memory of each GPU, under each engine.

    Attributes:
        model: its name.
        sizes: of the model.
        processes: of the run, a GPU each.
        batch: that each computes at once, as far as it is told or guessed.
        plans: of the engines.
        gpu_memory: bytes of a GPU, None where that is not known.
    """

    model: str
    sizes: ModelSizes
    processes: int
    batch: Batch
    plans: tuple[MemoryPlan, ...]
    gpu_memory: int | None

    def fits(self, engine: str) -> bool | None:
        """Whether the run fits into a GPU under an engine, by this estimate; None where the GPU is not known."""
        peak = next(plan.peak for plan in self.plans if plan.engine == engine)
        return None if self.gpu_memory is None else peak <= self.gpu_memory

    def rows(self) -> list[list[str]]:
        """Of the table: parts, and an engine a column."""
        rows = table_of(self.plans)
        if self.gpu_memory is not None:
            rows.append(
                [f"fits into {gigabytes(self.gpu_memory)}", *("yes" if self.fits(e) else "no" for e in ENGINES)]
            )
        return rows

    def __str__(self) -> str:
        trained = self.sizes.trained + self.sizes.lora
        lines = [
            f"{self.model}: {self.sizes.parameters / 1e9:.2f} billion parameters, {trained / 1e6:,.1f} million train, "
            f"{self.processes} process(es) of one GPU each. GB (10^9 bytes) a GPU:"
        ]
        rows = self.rows()
        width = max(len(row[0]) for row in rows)
        lines += ["  ".join([row[0].ljust(width), *(cell.rjust(8) for cell in row[1:])]) for row in rows]
        lines.append(
            f"A batch of {self.batch.nodes:,} tokens in the language model and {self.batch.patches:,} patches in the "
            f"tower, activations {'computed again' if self.batch.checkpointed else 'kept'} for the backward pass. "
            "Until its first step every process holds the whole model: on the host while it loads it, then on its GPU "
            "for the reference pass."
        )
        return "\n".join(lines)


def plan(
    model: PreTrainedModel | str | Path,
    *,
    train: Train = "encoder",
    lora: int | LoraConfig | None = 16,
    processes: int | None = None,
    gpu_memory: int | None = None,
    pairs: int | None = None,
    nodes: int | None = None,
    patches: int | None = None,
    gradient_checkpointing: bool = True,
) -> RunPlan:
    """Tell what `optimize` would take of the memory of each GPU under each engine; no weights are loaded.

    Args:
        model: folder or Hub id of an MLLM, of which the configuration is read; or one that is loaded.
        train, lora: as for `optimize`.
        processes: of the run, one for each GPU; those of this machine where None.
        gpu_memory: bytes of a GPU; this machine's where None, and unknown where it has none.
        pairs: of a batch in one process; `per_device_train_batch_size` where None.
        nodes: tokens of one pair in the language model, image and both answers; guessed where None, from a picture of
            about a million pixels and 512 tokens of text.
        patches: of one pair's pictures in the tower; guessed likewise.
        gradient_checkpointing: whether activations are computed again for the backward pass.

    Returns:
        the plan; printed, it is a table.

    Raises:
        ModelError: if there is no such model, or nothing of it would train.
        SettingsError: for numbers that cannot be.
    """
    for name, value in (("processes", processes), ("pairs", pairs), ("nodes", nodes), ("patches", patches)):
        if value is not None and value < 1:
            raise SettingsError(f"{name} is {value}.", "Give 1 or more.")
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    adapter = find_adapter(empty_model(str(model)) if isinstance(model, str | Path) else model)
    if torch.cuda.is_available():
        processes = processes or torch.cuda.device_count()
        gpu_memory = gpu_memory or torch.cuda.get_device_properties(0).total_memory
    sizes = sizes_of(adapter, training_plan(adapter, train, lora))
    count = pairs or PivotConfig.per_device_train_batch_size
    guessed_patches, tokens = picture_of(adapter)
    of_tower = count * (patches or guessed_patches)
    size = _first(getattr(adapter.tower.config, "patch_size", 14))
    batch = Batch(
        count * (nodes or tokens + TEXT_TOKENS),
        of_tower,
        of_tower * size**2 * BYTES_PER_PIXEL,
        gradient_checkpointing,
    )
    activations = activations_of(adapter, batch, 2)
    plans = tuple(memory_of(engine, sizes, processes or 1, batch, activations) for engine in ENGINES)
    return RunPlan(name, sizes, processes or 1, batch, plans, gpu_memory)


def picture_of(adapter: VisionAdapter) -> tuple[int, int]:
    """Patches and image tokens that a picture of about a million pixels becomes.

    Args:
        adapter: of the model.
    """
    config, tower = adapter.model.config, adapter.tower.config
    patch = _first(getattr(tower, "patch_size", 14))
    merged = getattr(tower, "spatial_merge_size", None) or 1 / (getattr(config, "downsample_ratio", None) or 1)
    side = getattr(tower, "image_size", None)
    if side is None:
        patches = math.ceil(PIXELS / patch**2)
    else:
        tiled = hasattr(config, "downsample_ratio") or getattr(config, "image_grid_pinpoints", None)
        patches = (_first(side) // patch) ** 2 * (TILES if tiled else 1)
    return patches, math.ceil(patches / merged**2)


def _first(size: int | list[int] | tuple[int, ...]) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)
