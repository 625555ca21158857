"""TRL's GRPOTrainer with LoRA on the vision tower against PivotGRPOTrainer: the phases after generation.

    python -m benchmarks.rollouts              # a LLaVA of 50 M parameters with 576 image tokens, a few minutes

Two prompts of G=8 roll-outs a batch, an image each, the same fixed roll-outs for both trainers; rounds alternate in one
process. "Training" is what one batch costs once its roll-outs are there: image processing, log-probabilities of old
policy and reference where there are any, loss, backward, optimiser. "Plain" has neither (TRL's default: beta 0, one
update a batch), "KL" both (beta 0.04, two updates a batch).

"Generation" draws 32 tokens for every roll-out of a batch, three ways: TRL's own, which gives the model a row per
roll-out; `generate` with `num_return_sequences=8`, which encodes an image once and prefills its prompt eight times; and
ours, which prefills it once. Peak memory is what a forked process grows by while it draws one batch.
"""

import argparse
import copy
import ctypes
import gc
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from trl import GRPOConfig, GRPOTrainer

from pivot_plugin import PivotGRPOConfig, PivotGRPOTrainer
from pivot_plugin.generation.shared_prefill import Layout, SharedPrefill
from pivot_plugin.models.find import find_adapter
from pivot_plugin.training.plan import plan

from .shapes import PRESETS, llava
from .trainer import RESULTS

GENERATIONS, PROMPTS = 8, 2
CASES: dict[str, dict[str, Any]] = {
    "plain, 8 tokens": {"tokens": 8},
    "plain, 32 tokens": {"tokens": 32},
    "KL, 32 tokens": {"tokens": 32, "beta": 0.04, "num_iterations": 2},
}


def by_length(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def questions() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "prompt": [{"role": "user", "content": f"what is in picture {number}?"}],
            "images": [Image.fromarray(rng.integers(0, 255, (336, 336, 3), dtype=np.uint8))],
        }
        for number in range(PROMPTS)
    ]


def rollouts(tokens: int) -> list[list[int]]:
    """Fixed roll-outs of equal length; half of each group begin alike, as samples of one model do."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(PROMPTS):
        shared = rng.integers(20, 200, tokens // 4).tolist()
        for number in range(GENERATIONS):
            begin = shared if number % 2 else rng.integers(20, 200, tokens // 4).tolist()
            made.append(begin + rng.integers(20, 200, tokens - len(begin)).tolist())
    return made


def trainers(base: Any, processor: Any, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": PROMPTS * GENERATIONS,
        "num_generations": GENERATIONS,
        "max_completion_length": 32,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "max_steps": 10_000,
        **{name: value for name, value in case.items() if name != "tokens"},
    }
    made: dict[str, Any] = {}
    for name in ("trl", "ours"):
        model = copy.deepcopy(base)
        lora = plan(find_adapter(model), "encoder", 16).lora
        if name == "trl":
            config = GRPOConfig(output_dir=str(folder / name), **settings)
            rows = Dataset.from_list(questions())
            made[name] = GRPOTrainer(
                model, by_length, config, rows, processing_class=copy.deepcopy(processor), peft_config=lora
            )
        else:
            own = PivotGRPOConfig(output_dir=str(folder / name), **settings)
            made[name] = PivotGRPOTrainer(model, by_length, own, questions(), processing_class=processor, lora=lora)
        made[name].create_optimizer()
        made[name].model.train()
        made[name].current_gradient_accumulation_steps = 1
    return made


def training(trainer: Any, tokens: int) -> float:
    """Seconds for one batch of roll-outs, all of its updates."""
    made = rollouts(tokens)
    trainer._generate_single_turn = lambda *args, **kwargs: (made, None)
    batch = [trainer.train_dataset[number // GENERATIONS] for number in range(len(made))]
    trainer._step, trainer._buffered_inputs = 0, None
    began = time.perf_counter()
    for _ in range(trainer.num_iterations):
        trainer.training_step(trainer.model, batch, None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    spent = time.perf_counter() - began
    del trainer._generate_single_turn
    return spent


def generation(trainer: Any, layout: Layout | None = None) -> float:
    """Seconds for drawing one batch of roll-outs; in another layout than the trainer's own, where one is given."""
    if layout is not None:
        own, trainer._prefill = trainer._prefill, SharedPrefill(trainer._prefill.model, layout)
        try:
            return generation(trainer)
        finally:
            trainer._prefill = own
    batch = [trainer.train_dataset[number // GENERATIONS] for number in range(PROMPTS * GENERATIONS)]
    score = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (torch.zeros(16, 32), None, None)
    began = time.perf_counter()
    trainer._generate_and_score_completions(batch)
    spent = time.perf_counter() - began
    trainer._get_per_token_logps_and_entropies = score
    return spent


def peak_memory(draw: Callable[[], float]) -> float:
    """MiB by which a process grows at most while it draws, beside what it had before."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def measured() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        draw()
        sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    process = multiprocessing.get_context("fork").Process(target=measured)
    # what earlier rounds have freed would be used again unseen
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    process.start()
    grown: float = receiver.recv()
    process.join()
    return grown


def ways(pair: dict[str, Any]) -> dict[str, Callable[[], float]]:
    """The ways of drawing a batch."""
    return {
        "trl": lambda: generation(pair["trl"]),
        "num_return_sequences": lambda: generation(pair["ours"], Layout.PLAIN),
        "ours": lambda: generation(pair["ours"]),
        "ours, copies": lambda: generation(pair["ours"], Layout.COPIES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--generation-only", action="store_true", help="leave out the phases after generation")
    asked = parser.parse_args()
    torch.manual_seed(0)
    base, processor = llava(PRESETS["cpu"]["llava"])
    processor.tokenizer.padding_side = "left"
    file = RESULTS / "rollouts.json"
    results: dict[str, Any] = json.loads(file.read_text()) if asked.generation_only else {}
    with tempfile.TemporaryDirectory() as folder:
        pair = trainers(base, processor, {}, Path(folder) / "generation")
        results["generation"] = drawn(ways(pair), asked.rounds)
        if not asked.generation_only:
            results["training"] = []
            for number, (name, case) in enumerate(CASES.items()):
                pair = trainers(base, processor, case, Path(folder) / str(number))
                spent: dict[str, list[float]] = {"trl": [], "ours": []}
                for turn in range(asked.rounds + 1):
                    for who, trainer in pair.items():
                        seconds = training(trainer, case["tokens"])
                        if turn:
                            spent[who].append(seconds)
                results["training"].append(_row(name, spent))
                print(results["training"][-1], flush=True)
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}"
    measured = ["generation"] if asked.generation_only else ["generation", "training"]
    results["machine"] = results.get("machine", {}) | dict.fromkeys(measured, machine)
    show(results)
    file.write_text(json.dumps(results, indent=1) + "\n")


def drawn(sides: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, Any]]:
    """Seconds and memory of each way of drawing, rounds interleaved; the first round warms up and is left out."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, draw in sides.items():
            seconds = draw()
            if turn:
                spent[name].append(seconds)
    made = [
        {"way": name, "seconds": statistics.median(spent[name]), "MiB": peak_memory(draw), "rounds": spent[name]}
        for name, draw in sides.items()
    ]
    print(made, flush=True)
    return made


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    machine = results["machine"]
    drawing = Table(
        title=f"Generation: {PROMPTS} prompts of {GENERATIONS} x 32 tokens, 576 image tokens; {machine['generation']}"
    )
    for column in ("way", "seconds", "ratio to ours", "peak MiB"):
        drawing.add_column(column, justify="left" if column == "way" else "right")
    ours = next(row["seconds"] for row in results["generation"] if row["way"] == "ours")
    for row in results["generation"]:
        drawing.add_row(row["way"], f"{row['seconds']:.2f}", f"{row['seconds'] / ours:.1f}", f"{row['MiB']:.0f}")
    after = Table(title=f"After generation: {GENERATIONS} roll-outs a prompt; {machine['training']}")
    for column in ("case", "TRL s", "ours s", "ratio"):
        after.add_column(column, justify="left" if column == "case" else "right")
    for row in results["training"]:
        after.add_row(row["case"], f"{row['trl']:.2f}", f"{row['ours']:.2f}", f"{row['ratio']:.1f}")
    Console(width=110).print(drawing)
    Console(width=110).print(after)


def _row(name: str, spent: dict[str, list[float]]) -> dict[str, Any]:
    trl, ours = (statistics.median(spent[who]) for who in ("trl", "ours"))
    return {"case": name, "trl": trl, "ours": ours, "ratio": trl / ours, "rounds": spent}


if __name__ == "__main__":
    main()
