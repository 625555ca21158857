"""TRL's DPOTrainer with LoRA on the vision tower against PivotTrainer: same model, pairs, batch and settings.

    python -m benchmarks.trainer                       # mid-size models on the CPU, about ten minutes
    python -m benchmarks.trainer --preset gpu          # LLaVA-1.5-7B, Qwen2.5-VL-7B, InternVL3-8B, one GPU, 8 minutes
    python -m benchmarks.trainer --preset gpu --budget # what that takes of memory and time, computed; needs no GPU
    python -m benchmarks.trainer --preset gpu --toy    # its rehearsal: the same with tiny models, on any machine
    python -m benchmarks.trainer --shape short-answers --rounds 1

Whole trainers are timed, data loading and image processing included, in alternating rounds of one process; a step is
the time from one step's end to the next, the first of each round left out. Random weights: they cost what trained ones
do. The bare floor is a loop over the forest's own batches, collated beforehand: forward, loss, backward, optimiser.

Tokens a second are *distinct* ones, of both sides: each token of the language model once a step, padding left out, so
that a side which computes one twice is no faster by it. MFU is the same of operations (see work.py), over the device's
peak. Models of the preset for GPUs are drawn on the device, in bfloat16, one at a time. Nothing is downloaded.
"""

import argparse
import copy
import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from pivot_plugin import PivotConfig, PivotTrainer
from pivot_plugin.models.find import find_adapter
from pivot_plugin.training import forward
from pivot_plugin.training.attention import attend_by
from pivot_plugin.training.plan import plan, unwrapped

from .budget import GIB, Budget, budget
from .machine import described, peak
from .shapes import GPU_SHAPES, MAKERS, PRESETS, SHAPES, Shape, pairs_of, small
from .work import distinct, operations

RESULTS = Path(__file__).parent / "results"
EPOCHS = 3
STEPS = 4
# of the preset for GPUs, in all
MINUTES = 8.0


class StepTimes(TrainerCallback):
    """Seconds from one step's end to the next; the first step of a run is left out."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._device = device
        self._last: float | None = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


@dataclass
class Bench:
    """One shape, ready to be measured by either side.

    Attributes:
        shape: to measure.
        model: that every side gets a copy of; its sizes alone count, and it may lie on the meta device, with `build`.
        processor: the model's.
        device: to run on.
        checkpointing: whether layers are computed again in the backward pass.
        folder: of the trainers.
        build: makes the model anew, always with the same weights, where it is too large for copies.
    """

    shape: Shape
    model: PreTrainedModel
    processor: ProcessorMixin
    device: torch.device
    checkpointing: bool
    folder: Path
    build: Callable[[], PreTrainedModel] | None = None

    def fresh(self) -> PreTrainedModel:
        """The model as it was before any training, for one side."""
        return copy.deepcopy(self.model) if self.build is None else self.build()

    def settings(self) -> dict[str, Any]:
        """Settings that both sides share."""
        return {
            "output_dir": str(self.folder),
            "use_cpu": self.device.type == "cpu",
            "bf16": self.device.type == "cuda",
            "max_length": None,
            "max_steps": STEPS,
            "per_device_train_batch_size": self.shape.pairs,
            "gradient_checkpointing": self.checkpointing,
            "learning_rate": 1e-4,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": self.device.type == "cuda",
            "logging_steps": 1000,
        }

    def trl(self) -> DPOTrainer:
        """What a user writes without us, the LoRA targets already right."""
        model = self.fresh()
        rows = [
            {
                "images": row["images"],
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in pairs_of(self.shape, STEPS)
        ]
        return DPOTrainer(
            model=model,
            args=DPOConfig(remove_unused_columns=False, **self.settings()),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.processor,
            peft_config=plan(find_adapter(model), "encoder", 16).lora,
        )

    def pivot(self) -> tuple[PivotTrainer, float]:
        """Ours, and the seconds its reference pass took per pair."""
        spent = []

        class Timed(PivotTrainer):
            def _fill(self, *args: Any) -> None:
                begun = time.perf_counter()
                super()._fill(*args)
                spent.append(time.perf_counter() - begun)

        with tempfile.TemporaryDirectory() as cache:
            trainer = Timed(
                self.fresh(),
                PivotConfig(reference_cache=cache, **self.settings()),
                pairs_of(self.shape, STEPS),
                processing_class=self.processor,
            )
        return trainer, sum(spent) / (self.shape.pairs * STEPS)

    def bare(self, trainer: PivotTrainer) -> list[float]:
        """Seconds of each step of a loop over the trainer's own batches, without a trainer."""
        # before there is a second model beside the trainer's
        batches = [batch["forest"].to(self.device) for batch in trainer.get_train_dataloader()]
        model = self.fresh().to(self.device).train()
        adapter = find_adapter(model)
        lora = plan(adapter, "encoder", 16).lora
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        attend_by(model, unwrapped(trainer.model).config.get_text_config()._attn_implementation)
        forward.install(model, adapter, trainer.reading)
        peft = get_peft_model(model, lora)
        if self.checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            peft.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-4)
        seconds = []
        for batch in batches:
            begun = time.perf_counter()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                chosen, rejected = peft(forest=batch).log_probs.sum(dim=1).chunk(2)
            loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        return seconds[1:]


def timed(trainer: DPOTrainer, device: torch.device) -> list[float]:
    """Seconds per step of a trainer's run."""
    times = StepTimes(device)
    trainer.add_callback(times)
    trainer.train()
    return times.seconds


def flops(trainer: DPOTrainer) -> int:
    """Floating-point operations of one training step, counted."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    return counter.get_total_flops()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """How much more memory is resident at the peak of a run than before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # hand what earlier runs freed back to the system, or it hides what this one takes; 5 resets the high-water mark
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def release() -> None:
    """Give back what models that are gone have left in memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(bench: Bench, rounds: int, peak_flops: float, until: float = float("inf")) -> dict[str, Any]:
    """Measure both sides and the floor in alternating rounds.

    Args:
        bench: the shape.
        rounds: how many; the first counts memory and operations, too.
        peak_flops: of the device, a second.
        until: when to begin no further round that would end later, by `time.monotonic`.
    """
    found: dict[str, list[float]] = {"trl": [], "pivot": [], "bare": [], "reference": []}
    memory: dict[str, dict[str, int]] = {}
    counted: dict[str, int] = {}
    taken = 0.0
    for turn in range(rounds):
        begun = time.monotonic()
        if turn and begun + taken > until:
            break
        trainer: DPOTrainer = bench.trl()
        found["trl"] += timed(trainer, bench.device)
        if not turn:
            memory["trl"], counted["trl"] = peaks(trainer, bench.device), flops(trainer)
        del trainer
        release()
        trainer, reference = bench.pivot()
        found["reference"].append(reference)
        found["pivot"] += timed(trainer, bench.device)
        if not turn:
            memory["pivot"], counted["pivot"] = peaks(trainer, bench.device), flops(trainer)
            batch = trainer._collator(list(trainer.train_dataset.select(range(bench.shape.pairs))))["forest"]
        found["bare"] += bench.bare(trainer)
        del trainer
        release()
        taken = time.monotonic() - begun
    step = {name: statistics.median(values) for name, values in found.items()}
    pairs, forest = bench.shape.pairs, batch.forest
    needed = operations(bench.model, distinct(bench.model, batch))
    # TRL computes its reference in every step, ours once for all epochs
    ours = step["pivot"] + step["reference"] * pairs / EPOCHS
    sides = {"trl": step["trl"], "pivot": step["pivot"], "bare": step["bare"]}
    return {
        **asdict(bench.shape),
        "checkpointing": bench.checkpointing,
        "rounds": len(found["reference"]),
        "steps_timed": len(found["pivot"]),
        "seconds_per_step": step,
        "pairs_per_second": {"trl": pairs / step["trl"], "pivot": pairs / ours},
        "speed_ratio": step["trl"] / ours,
        "step_ratio": step["trl"] / step["pivot"],
        "overhead_over_bare": step["pivot"] / step["bare"] - 1,
        "peak_bytes": {name: measured["above"] for name, measured in memory.items()},
        "peak_bytes_in_all": {name: measured["all"] for name, measured in memory.items()},
        "memory_ratio": memory["pivot"]["above"] / memory["trl"]["above"],
        "tokens_per_step": {"trl": 2 * forest.sequence_token_count, "pivot": forest.node_count},
        "distinct_tokens_per_second": {name: forest.node_count / seconds for name, seconds in sides.items()},
        "flops_per_step": counted,
        "needed_flops_per_step": needed,
        "mfu": {name: needed / seconds / peak_flops for name, seconds in sides.items()},
        "spread": {name: [min(values), max(values)] for name, values in found.items()},
    }


def peaks(trainer: DPOTrainer, device: torch.device) -> dict[str, int]:
    """Bytes at the peak of a training step: above what was there before it, and in all."""
    above = peak_bytes(lambda: _one_step(trainer), device)
    return {"above": above, "all": torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")}


def _one_step(trainer: DPOTrainer) -> None:
    trainer.training_step(trainer.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    trainer.model.zero_grad()


def table(results: list[dict[str, Any]]) -> Table:
    """The results, a row per shape."""
    shown = Table(title=f"PivotTrainer against TRL's DPOTrainer, {EPOCHS} epochs, reference pass included")
    heads = ("shape", "TRL pairs/s", "ours", "ratio", "step alone", "over bare", "distinct tokens/s: TRL", "ours")
    for column in (*heads, "TFLOP a step", "MFU: TRL", "ours", "peak GiB: TRL", "ours", "memory", "tokens", "FLOPs"):
        shown.add_column(column, justify="left" if column == "shape" else "right")
    for row in results:
        if "failed" in row:
            shown.add_row(row["name"], row["failed"])
            continue
        tokens, counted, speed = row["tokens_per_step"], row["flops_per_step"], row["distinct_tokens_per_second"]
        shown.add_row(
            row["name"],
            f"{row['pairs_per_second']['trl']:.2f}",
            f"{row['pairs_per_second']['pivot']:.2f}",
            f"{row['speed_ratio']:.2f}",
            f"{row['step_ratio']:.2f}",
            f"{row['overhead_over_bare']:+.1%}",
            f"{speed['trl']:,.0f}",
            f"{speed['pivot']:,.0f}",
            f"{row['needed_flops_per_step'] / 1e12:.3g}",
            f"{row['mfu']['trl']:.1%}",
            f"{row['mfu']['pivot']:.1%}",
            f"{row['peak_bytes_in_all']['trl'] / GIB:.2f}",
            f"{row['peak_bytes_in_all']['pivot'] / GIB:.2f}",
            f"{row['memory_ratio']:.2f}",
            f"{tokens['pivot'] / tokens['trl']:.2f}",
            f"{counted['pivot'] / counted['trl']:.2f}",
        )
    return shown


def builder(shape: Shape, sizes: dict[str, Any], device: torch.device, attention: str) -> Callable[[], PreTrainedModel]:
    """Makes a shape's model where it will live, in the precision it will have, always with the same weights."""

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        try:
            with device:
                model, _ = MAKERS[shape.model](sizes)
        finally:
            torch.set_default_dtype(torch.float32)
        model.set_attn_implementation(attention)
        return model

    return build


def budgets(shapes: list[Shape], checkpointing: bool, rounds: int) -> list[Budget]:
    """What the preset for GPUs takes of memory and time, computed from its configurations."""
    made = []
    for shape in shapes:
        with torch.device("meta"):
            model = MAKERS[shape.model](PRESETS["gpu"][shape.model])[0].to(torch.bfloat16).requires_grad_(False)
        # a processor has no weights, but makes pictures, which are on no meta device
        _, processor = MAKERS[shape.model](PRESETS["toy"][shape.model])
        made.append(budget(shape, model, processor, checkpointing, rounds * STEPS))
    return made


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--shape", choices=[shape.name for shape in (*SHAPES, *GPU_SHAPES)], action="append")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--attention", choices=["sdpa", "eager", "flex_attention"], default="sdpa")
    parser.add_argument("--toy", action="store_true", help="rehearse the preset for GPUs with tiny models")
    parser.add_argument("--budget", action="store_true", help="compute what the preset for GPUs takes, and end")
    parser.add_argument("--minutes", type=float, help=f"begin no round after these; {MINUTES:g} on a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if (options.toy or options.budget) and options.preset != "gpu":
        parser.error("--toy and --budget are of --preset gpu.")
    began, gpu = time.monotonic(), options.preset == "gpu"
    shapes = [s for s in (GPU_SHAPES if gpu else SHAPES) if not options.shape or s.name in options.shape]
    if not shapes:
        parser.error(f"No shape of that name in --preset {options.preset}.")
    if gpu:
        print("\n".join(one.told() for one in budgets(shapes, options.checkpointing, options.rounds)), flush=True)
        if options.budget:
            return
        if not (options.toy or torch.cuda.is_available()):
            raise SystemExit("There is no GPU here: --toy rehearses the preset, --budget computes what it takes.")
    device = torch.device("cuda" if torch.cuda.is_available() and gpu else "cpu")
    minutes = options.minutes or (MINUTES if gpu else None)
    peak_flops, known_from = peak(device)
    record = {
        **described(device.type),
        "torch": torch.__version__,
        "attention": options.attention,
        "peak_flops": peak_flops,
        "peak_known_from": known_from,
    }
    kind = f"{options.preset}{'-toy' if options.toy else ''}{'-checkpointing' if options.checkpointing else ''}"
    file = options.out / f"trainer-{kind}.json"
    print(f"{record['device']}: at most {peak_flops / 1e12:.3g} TFLOP/s ({known_from})", flush=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, shape in enumerate(shapes):
            sizes = PRESETS["toy" if options.toy else options.preset][shape.model]
            build = builder(shape, sizes, device, options.attention)
            sketch = builder(shape, sizes, torch.device("meta"), options.attention)()
            _, processor = MAKERS[shape.model](PRESETS["toy" if gpu else "cpu"][shape.model])
            shape = small(shape) if options.toy else shape
            bench = Bench(shape, sketch, processor, device, options.checkpointing, Path(folder), build)
            # what is left is shared by the shapes that are left
            left = began + 60 * minutes - time.monotonic() if minutes else float("inf")
            try:
                row = measure(bench, options.rounds, peak_flops, time.monotonic() + left / (len(shapes) - number))
            except torch.OutOfMemoryError as error:
                row = {"name": shape.name, "failed": f"out of memory: {error}".split(". ")[0]}
                release()
            results.append(row)
            # after every shape: what is measured is kept whatever comes
            _write(file, record, results)
            Console(width=220).print(table(results[-1:]))
    Console(width=220).print(table(results))
    print(f"Written to {file}, {time.monotonic() - began:.0f} s")
    if any("failed" in row for row in results):
        sys.exit(1)


def _write(file: Path, record: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """The record of a benchmark; shapes that were not measured this time keep their rows from the same machine."""
    rows = {row["name"]: row for row in results}
    if file.exists():
        earlier = json.loads(file.read_text())
        if all(earlier.get(key) == record[key] for key in ("device", "torch", "attention")):
            rows = {row["name"]: row for row in earlier["results"]} | rows
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**record, "results": [*rows.values()]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
