"""The forward and backward pass over a forest, in each way that it can be computed, against each other in one process.

    python -m benchmarks.core                          # all shapes of benchmarks.trainer, a few minutes
    python -m benchmarks.core --shape long-answers --rounds 5
    python -m benchmarks.core --padding                # padding of batches of variable resolution alone, seconds
    python -m benchmarks.core --overhead               # a trainer's step over a bare loop, without and with workers

    rows      a row per tree, padded to the largest, one mask of all nodes by all nodes, the head at once
    packed    all trees in one row, attention in runs of queries, the head in slices: what training does

One step is the forward pass, a DPO loss and the backward pass into LoRA on the tower, on a batch collated beforehand.
Sides alternate; medians. Peak memory is that of one step above what was resident before it.
"""

import argparse
import copy
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image
from trl.trainer.utils import add_fused_lm_head

from benchmarks.trainer import MAKERS, PRESETS, RESULTS, SHAPES, Bench, Shape, pairs_of, peak_bytes, timed
from pivot_plugin.data.pairs import load
from pivot_plugin.models.find import find_adapter
from pivot_plugin.training import forward, scored_head
from pivot_plugin.training.attention import TREE_SDPA, attend_by
from pivot_plugin.training.batch import ForestCollator
from pivot_plugin.training.forest import RowLayout
from pivot_plugin.training.plan import plan
from pivot_plugin.training.workers import VARIABLE, default_workers

SIDES = ("rows", "packed")
# sides of pictures as they come: photographs and screenshots of many sizes
SMALLEST, LARGEST = 196, 1092


@contextmanager
def head_at_once(wanted: bool) -> Iterator[None]:
    """Have the head score all edges together meanwhile."""
    sliced = scored_head.slice_of
    if wanted:
        scored_head.slice_of = lambda model, own_head: None  # type: ignore[assignment]
    try:
        yield
    finally:
        scored_head.slice_of = sliced


class Side:
    """A model with LoRA on its tower, and a batch as this side computes it."""

    def __init__(self, shape: Shape, name: str, model: Any, processor: Any) -> None:
        self.name = name
        model = copy.deepcopy(model).train()
        adapter = find_adapter(model)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        layout = RowLayout(packed=name == "packed")
        reading = replace(forward.reading_of(model), layout=layout)
        if layout.packed:
            attend_by(model, TREE_SDPA)
        forward.install(model, adapter, reading)
        self.model = get_peft_model(model, plan(adapter, "encoder", 16).lora)
        pairs = load(pairs_of(shape, 1))
        collator = ForestCollator(processor, adapter.image_token_id, reading.shared, layout=layout)
        self.batch = collator([pairs[index] for index in range(len(pairs))])["forest"]

    def step(self) -> float:
        """Seconds of a forward and backward pass."""
        begun = time.perf_counter()
        with head_at_once(self.name == "rows"):
            chosen, rejected = self.model(forest=self.batch).log_probs.sum(dim=1).chunk(2)
            loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
            loss.backward()
        self.loss = loss.item()
        self.gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad()
        return time.perf_counter() - begun


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Both sides of one shape, in alternating rounds."""
    torch.manual_seed(0)
    model, processor = MAKERS[shape.model](PRESETS["cpu"][shape.model])
    sides = {}
    for name in SIDES:
        torch.manual_seed(0)
        sides[name] = Side(shape, name, model, processor)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            seconds[name].append(side.step())
    # the same numbers, or there is nothing to compare
    losses, gradients = ([getattr(side, what) for side in sides.values()] for what in ("loss", "gradients"))
    scale = max(float(gradient.abs().max()) for gradient in gradients[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4 * scale)
    memory = {name: peak_bytes(side.step, torch.device("cpu")) for name, side in sides.items()}
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {
        "shape": shape.name,
        "seconds": median,
        "spread": {name: [min(values[1:]), max(values[1:])] for name, values in seconds.items()},
        "peak_bytes": memory,
        "padding": {name: padding(side.batch.forest) for name, side in sides.items()},
    }


def padding(forest: Any) -> float:
    """Share of the computed nodes that are none."""
    return 1 - forest.node_count / forest.tokens.numel()


def padded_shares(pairs: int, batches: int) -> dict[str, float]:
    """Padding of batches of pairs about pictures of many sizes, in each layout; every picture has one question."""
    _, processor = MAKERS["qwen"](PRESETS["cpu"]["qwen"])
    marker = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    shares: dict[str, float] = {}
    layouts = {"rows": RowLayout(), "packed": RowLayout(True), "packed, in multiples of 128": RowLayout(True, 128)}
    nodes = dict.fromkeys(layouts, 0)
    computed = dict.fromkeys(layouts, 0)
    for _ in range(batches):
        rows = []
        for _ in range(pairs):
            size = (rng.randrange(SMALLEST, LARGEST), rng.randrange(SMALLEST, LARGEST))
            texts = ["".join(rng.choices(letters, k=rng.randrange(20, 300))) for _ in range(3)]
            picture = Image.fromarray(np.zeros((size[1], size[0], 3), dtype=np.uint8) + rng.randrange(255))
            rows.append({"images": [picture], "prompt": texts[0], "chosen": texts[1], "rejected": texts[2]})
        loaded = load(rows)
        normal = [loaded[index] for index in range(len(loaded))]
        for name, layout in layouts.items():
            forest = ForestCollator(processor, marker, layout=layout)(normal)["forest"].forest
            nodes[name] += forest.node_count
            computed[name] += forest.tokens.numel()
    for name in layouts:
        shares[name] = 1 - nodes[name] / computed[name]
    return shares


def overhead(shape: Shape, rounds: int) -> dict[str, Any]:
    """A trainer's step over a bare loop on its own batches, without workers and with the default ones."""
    torch.manual_seed(0)
    model, processor = MAKERS[shape.model](PRESETS["cpu"][shape.model])
    workers = {"no workers": "0", f"{default_workers()} worker(s)": str(default_workers())}
    seconds: dict[str, list[float]] = {name: [] for name in (*workers, "bare")}
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(shape, model, processor, device, False, Path(folder))
        for _ in range(rounds):
            for name, count in workers.items():
                os.environ[VARIABLE] = count
                trainer, _ = bench.pivot()
                seconds[name] += timed(trainer, device)
            seconds["bare"] += bench.bare(trainer)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "shape": shape.name,
        "seconds": median,
        "spread": {name: [min(values), max(values)] for name, values in seconds.items()},
        "over_bare": {name: median[name] / median["bare"] - 1 for name in workers},
    }


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[shape.name for shape in SHAPES], action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--padding", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    record: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    chosen = [shape for shape in SHAPES if not options.shape or shape.name in options.shape]
    if options.overhead:
        record["overhead"] = []
        for shape in chosen:
            row = overhead(shape, options.rounds)
            record["overhead"].append(row)
            over = ", ".join(f"{name} {value:+.1%}" for name, value in row["over_bare"].items())
            print(f"{shape.name}: bare {row['seconds']['bare']:.2f} s; over it {over}", flush=True)
    else:
        record["padding"] = {f"{pairs} pairs": padded_shares(pairs, 16 // pairs + 4) for pairs in (2, 8, 16)}
        for name, shares in record["padding"].items():
            print(f"padding, batches of {name}: " + ", ".join(f"{side} {share:.1%}" for side, share in shares.items()))
    if not (options.padding or options.overhead):
        record["shapes"] = []
        for shape in chosen:
            row = measure(shape, options.rounds)
            record["shapes"].append(row)
            seconds, peaks = (row[what]["packed"] / row[what]["rows"] for what in ("seconds", "peak_bytes"))
            print(
                f"{shape.name}: seconds {row['seconds']['rows']:.2f} -> {row['seconds']['packed']:.2f} "
                f"({seconds:.2f}), peak {row['peak_bytes']['rows'] / 2**20:.0f} -> "
                f"{row['peak_bytes']['packed'] / 2**20:.0f} MiB ({peaks:.2f}), padding "
                f"{row['padding']['rows']:.1%} -> {row['padding']['packed']:.1%}",
                flush=True,
            )
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "core.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**earlier, **record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
