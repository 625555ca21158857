"""The demonstration: a small MLLM learns from its own answers, by SFT and by DPO on the same pairs.

The model learnt to see scenes by day and is shown dusk. It describes scenes at dusk, eight times each; its better
descriptions are paired with its worse ones by how many facts they have right: it is told how much is right, never what.
Two towers are trained on these pairs, by SFT and by DPO, taken out, put into the untouched model again, and measured.
"""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration

import pivot_plugin as pivot
from pivot_plugin.probes import ProbeTask
from pivot_plugin.probes.comparison import WORDS_MARK, WORDS_NOTE, mark_of
from pivot_plugin.report import write_report

from . import scenes, world

QUESTIONS = 500
DESCRIBED = 300
SEGMENTED = 300
LOCATED = 60
# each the best of 1e-4 to 3e-3 on scenes held out for that
LEARNING_RATES = {"sft": 3e-3, "dpo": 3e-4}
# what the table shows, and in which words
READABLE = {
    "captions: all": "captions, facts right",
    "captions: all/other-picture": "  to another picture",
    "captions: all/mean-colour": "  to its mean colour",
    "questions: all": "other questions, right",
    "questions: all/other-picture": "  to another picture",
    "questions: all/mean-colour": "  to its mean colour",
    "segmentation: miou": "patches: shape mIoU",
    "saliency: dpo/energy": "gradient on the object",
}


def examination() -> dict[str, object]:
    """The probes of the demonstration, on scenes that no training has seen."""
    rows, masks = world.located_pairs(LOCATED, seed=940_000)
    captions: dict[str, Any] = {
        "rewards": world.facts_right,
        "max_new_tokens": world.CAPTION_TOKENS,
        "batch_size": 64,
    }
    return {
        "captions": ProbeTask("vqa", world.caption_questions(DESCRIBED, seed=950_000), captions),
        "questions": ProbeTask("vqa", world.question_rows(world.questions(QUESTIONS, seed=930_000)), world.VQA_OPTIONS),
        "segmentation": ProbeTask(
            "segmentation",
            (world.segmented(SEGMENTED, 910_000), world.segmented(SEGMENTED, 920_000)),
            {"labels": "majority", "classes": 1 + len(scenes.SHAPES), "epochs": 10, "seeds": 2},
        ),
        "saliency": ProbeTask("saliency", rows, {"masks": masks}),
    }


def run(output_dir: Path, described: int = 2000, steps: int = 300) -> None:
    """Run the demonstration, print its table and write its report.

    Args:
        output_dir: folder of both runs; must not hold others.
        described: scenes at dusk that the model describes.
        steps: optimiser steps of 16 pairs, of each arm.

    Raises:
        PivotError: as `pivot.optimize`.
    """
    console = Console()
    processor = world.processor()
    model = world.model()
    settings: dict[str, Any] = {
        "processor": processor,
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "gradient_checkpointing": False,
        "logging_steps": 50,
        "save_strategy": "no",
        "eval_strategy": "no",
    }
    console.print(f"[bold]1.[/] the model describes {described} scenes at dusk, 8 times each; DPO on its own answers")
    console.print(f"   ({model.num_parameters():,} parameters, of which the vision tower trains by LoRA)")
    dpo = pivot.optimize(
        model,
        world.caption_questions(described, seed=1),
        rewards=[world.facts_right],
        samples=8,
        max_new_tokens=world.CAPTION_TOKENS,
        sampling_batch_size=64,
        output_dir=output_dir / "dpo",
        learning_rate=LEARNING_RATES["dpo"],
        **settings,
    )
    for line in str(dpo.answers[0]).splitlines():
        console.print(f"   {line}", markup=False, highlight=False)
    console.print("[bold]2.[/] SFT on the chosen answers of the same pairs, as many steps")
    pairs = dpo.output_dir / "own-answers"
    sft = pivot.optimize(
        world.model(),
        str(pairs / "pairs"),
        objective="sft",
        eval_prefs=str(pairs / "held-out" / "pairs"),
        output_dir=output_dir / "sft",
        learning_rate=LEARNING_RATES["sft"],
        **settings,
    )
    console.print("[bold]3.[/] both encoders: saved, loaded back, each grafted into the untouched model")
    grafted = {name: _grafted(arm) for name, arm in (("SFT", sft), ("DPO", dpo))}
    same = all(
        torch.equal(a, b)
        for a, b in zip(grafted["DPO"].state_dict().values(), dpo.model.state_dict().values(), strict=True)
    )
    console.print(f"   The model with the DPO encoder equals the one that was trained: {same}.")
    console.print("[bold]4.[/] pivot.compare: the untouched model, and the two that have a new encoder alone")
    comparison = pivot.compare(
        {"before": world.model(), **grafted}, examination(), processor=processor, output=output_dir
    )
    console.print(table(comparison))
    console.print(
        "What this is: dusk had made a tower unreadable to its language model, and a score of the model's own answers "
        "brought it back, without a label. What this is not: an encoder that sees more, which a probe or a transplant "
        "into another language model must show; nor a finding about models ten thousand times larger."
    )
    console.print(f"Encoder: {dpo.output_dir / 'encoder'} (AutoModel.from_pretrained loads it)")
    console.print(f"Report: {write_report(output_dir / 'report.html', [sft.output_dir, dpo.output_dir], comparison)}")


def _grafted(arm: pivot.PivotResult) -> LlavaForConditionalGeneration:
    """The untouched model with the encoder that an arm has saved."""
    grafted: LlavaForConditionalGeneration = pivot.graft(world.model(), pivot.load_encoder(arm.output_dir / "encoder"))
    return grafted


def table(comparison: pivot.Comparison) -> Table:
    """The main scores of the compared with their intervals."""
    contrasts = {(c.probe, c.score, c.name): c for c in comparison.contrasts()}
    note = "\u00b1 half of the 95 % interval. * differs from before, beyond noise."
    if any(c.survives_blind for c in contrasts.values() if f"{c.probe}: {c.score}" in READABLE):
        note += f" {WORDS_MARK} {WORDS_NOTE}"
    shown = Table(title="At dusk, on scenes that no training has seen", caption=note)
    for column in ("measure", *comparison.names):
        shown.add_column(column, justify="left" if column == "measure" else "right", no_wrap=True)
    for label, score in comparison.rows():
        if (row := f"{label}: {score}") not in READABLE:
            continue
        cells = []
        for name, results in comparison.results.items():
            measured = results[label].scores[score]
            wide = max(measured.high - measured.value, measured.value - measured.low)
            mark = mark_of(contrasts.get((label, score, name))).strip()
            cells.append(f"{measured.value:.3f} \u00b1{wide:.3f} {mark:<2}")
        shown.add_row(READABLE[row], *cells)
    return shown
