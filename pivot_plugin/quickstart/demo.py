"""The demonstration: a small MLLM's vision encoder made better, taken out, put into another model, and measured."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import pivot_plugin as pivot
from pivot_plugin.probes import ProbeTask

from . import scenes, world

SCENES = 500
SEGMENTED = 300
LOCATED = 60


def examination() -> dict[str, object]:
    """The probes of the demonstration, on scenes that no training has seen."""
    rows, masks = world.located_pairs(LOCATED, seed=940_000)
    return {
        "vqa": ProbeTask("vqa", world.question_rows(world.questions(SCENES, seed=930_000)), world.VQA_OPTIONS),
        "segmentation": ProbeTask(
            "segmentation",
            (world.segmented(SEGMENTED, 910_000), world.segmented(SEGMENTED, 920_000)),
            {"labels": "majority", "classes": 1 + len(scenes.SHAPES), "epochs": 10, "seeds": 2},
        ),
        "saliency": ProbeTask("saliency", rows, {"masks": masks}),
    }


def run(output_dir: Path, pairs: int = 5000, steps: int = 500) -> None:
    """Run the demonstration, print its table and write its report.

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
    console.print(f"[bold]1.[/] pivot.optimize on {pairs} preference pairs about scenes at dusk")
    console.print(f"   ({model.num_parameters():,} parameters, of which the vision tower trains by LoRA)")
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
        logging_steps=50,
        save_strategy="no",
        eval_strategy="no",
    )
    console.print("[bold]2.[/] the encoder: saved, loaded back, grafted into a second model")
    folder = result.output_dir / "encoder"
    encoder = pivot.load_encoder(folder)
    second = pivot.graft(world.model(), encoder)
    same = all(
        torch.equal(a, b) for a, b in zip(second.state_dict().values(), model.state_dict().values(), strict=True)
    )
    console.print("[bold]3.[/] pivot.compare: the model before, and the second model, which has the new encoder alone")
    comparison = pivot.compare(
        {"before": world.model(), "after": second}, examination(), processor=processor, output=output_dir
    )
    console.print(_table(result.metrics, comparison))
    console.print(
        f"Encoder: {folder} (AutoModel.from_pretrained loads it). Second model equals the trained one: {same}."
    )
    console.print(
        "A miniature: it shows the machinery at work, and claims nothing about models ten thousand times larger."
    )
    console.print(f"Report: {result.report(output_dir / 'report.html', comparison)}")


def _table(metrics: dict[str, dict[str, float]], comparison: pivot.Comparison) -> Table:
    table = Table(title="What changed (* beyond noise)")
    for column in ("measure", "before", "after", "change", "95 % interval"):
        table.add_column(column, justify="left" if column == "measure" else "right", no_wrap=True)
    first, second = (metrics[when]["preference_accuracy"] for when in ("before", "after"))
    table.add_row("preference accuracy", f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}  ", "")
    contrasts = {(c.probe, c.score): c for c in comparison.contrasts()}
    for label, score in comparison.rows():
        if (label, score) not in contrasts:
            continue
        cells = [f"{comparison.results[name][label].scores[score].value:.3f}" for name in comparison.names]
        contrast = contrasts[label, score]
        star = " *" if contrast.beyond_noise else "  "
        gap = contrast.difference
        interval = "" if gap.low is None or gap.high is None else f"{gap.low:+.3f} {gap.high:+.3f}"
        table.add_row(f"{label}: {score}", *cells, f"{gap.value:+.3f}{star}", interval)
    return table
