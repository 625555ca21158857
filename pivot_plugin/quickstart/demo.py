"""The demonstration: a small MLLM's vision encoder made better, taken out, put into another model, and measured."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import pivot_plugin as pivot
from pivot_plugin.probes.patches import PatchProbe, patch_matrix, probe_patches
from pivot_plugin.training.tower import find_adapter

from . import scenes, world


@dataclass(frozen=True)
class Examination:
    """What the demonstration measures of one model: VQA accuracy by kind of question, and a linear patch probe."""

    vqa: dict[str, float]
    probe: PatchProbe


def examine(model: LlavaForConditionalGeneration, processor: LlavaProcessor, size: int = 500) -> Examination:
    """Examine a model of the embedded world on scenes that no training has seen.

    Args:
        model: the tiny LLaVA.
        processor: its processor.
        size: number of questions, and of scenes to fit the probe on and to score it on.
    """
    adapter = find_adapter(model)
    fitting, testing = (scenes.render_many(size, seed, dusk=True) for seed in (910_000, 920_000))
    features = [
        patch_matrix(adapter, processor.image_processor, [scene.image for scene in drawn])
        for drawn in (fitting, testing)
    ]
    labels = [np.stack([scene.patch_labels().ravel() for scene in drawn]) for drawn in (fitting, testing)]
    return Examination(
        vqa=world.vqa_accuracy(model, processor, world.questions(size, seed=930_000)),
        probe=probe_patches(features[0], labels[0], features[1], labels[1]),
    )


def run(output_dir: Path, pairs: int = 5000, steps: int = 500) -> None:
    """Run the demonstration and print its table.

    Args:
        output_dir: folder of the run; must not hold another one.
        pairs: preference pairs to train on.
        steps: optimiser steps of 16 pairs.

    Raises:
        PivotError: as `pivot.optimize`.
    """
    console = Console()
    processor = world.processor()
    model = world.model()
    console.print(f"[bold]1.[/] examining the model before ({model.num_parameters():,} parameters)")
    before = examine(model, processor)
    console.print(f"[bold]2.[/] pivot.optimize on {pairs} preference pairs about scenes at dusk")
    result = pivot.optimize(
        model,
        world.pairs(pairs),
        processor=processor,
        eval_prefs=world.pairs(400, seed=77),
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        logging_steps=100,
        save_strategy="no",
        eval_strategy="no",
    )
    console.print("[bold]3.[/] the encoder: saved, loaded back, grafted into a second model")
    folder = result.output_dir / "encoder"
    encoder = pivot.load_encoder(folder)
    second = pivot.graft(world.model(), encoder)
    same = all(
        torch.equal(a, b) for a, b in zip(second.state_dict().values(), model.state_dict().values(), strict=True)
    )
    console.print("[bold]4.[/] examining the second model, which has the new encoder and nothing else")
    after = examine(second, processor)
    console.print(_table(result.metrics, before, after))
    console.print(
        f"Encoder: {folder} (AutoModel.from_pretrained loads it). Second model equals the trained one: {same}."
    )
    console.print(
        "A miniature: it shows the machinery at work. Differences within the interval are noise, and the paper's "
        "claims are about models ten thousand times larger."
    )


def _table(metrics: dict[str, dict[str, float]], before: Examination, after: Examination) -> Table:
    table = Table(title="What changed")
    for column in ("measure", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "measure" else "right", no_wrap=True)

    def row(name: str, first: float, second: float) -> None:
        table.add_row(name, f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}")

    row("preference accuracy, held-out pairs", *(metrics[when]["preference_accuracy"] for when in ("before", "after")))
    row("VQA accuracy, all questions", before.vqa["all"], after.vqa["all"])
    for kind in scenes.QUESTION_KINDS:
        row(f"  {kind}", before.vqa[kind], after.vqa[kind])
    row("linear patch probe, mean IoU", before.probe.mean_iou, after.probe.mean_iou)
    table.add_row("  95 % interval", *("{:.3f}-{:.3f}".format(*exam.probe.interval) for exam in (before, after)), "")
    return table
