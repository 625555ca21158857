"""TRL's GRPOTrainer with LoRA on the vision tower against PivotGRPOTrainer: the phases after generation.

    python -m benchmarks.rollouts              # a LLaVA of 50 M parameters with 576 image tokens, a few minutes

Two prompts of G=8 roll-outs a batch, an image each, the same fixed roll-outs for both trainers; rounds alternate in one
process. "Training" is what one batch costs once its roll-outs are there: image processing, log-probabilities of old
policy and reference where there are any, loss, backward, optimiser. "Plain" has neither (TRL's default: beta 0, one
update a batch), "KL" both (beta 0.04, two updates a batch). "Generation" is one call of TRL's `_generate` that draws
32 tokens, with each distinct image encoded once or G times.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
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
from pivot_plugin.models.find import find_adapter
from pivot_plugin.training.plan import plan

from .trainer import PRESETS, RESULTS, llava

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


def generation(trainer: Any) -> float:
    """Seconds for drawing one batch of roll-outs."""
    batch = [trainer.train_dataset[number // GENERATIONS] for number in range(PROMPTS * GENERATIONS)]
    score = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (torch.zeros(16, 32), None, None)
    began = time.perf_counter()
    trainer._generate_and_score_completions(batch)
    spent = time.perf_counter() - began
    trainer._get_per_token_logps_and_entropies = score
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.manual_seed(0)
    base, processor = llava(PRESETS["cpu"]["llava"])
    processor.tokenizer.padding_side = "left"
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, case) in enumerate(CASES.items()):
            pair = trainers(base, processor, case, Path(folder) / str(number))
            spent: dict[str, list[float]] = {"trl": [], "ours": []}
            drawn: dict[str, list[float]] = {"trl": [], "ours": []}
            for turn in range(asked.rounds + 1):
                for who, trainer in pair.items():
                    seconds = training(trainer, case["tokens"])
                    if turn:
                        spent[who].append(seconds)
                    if turn and number == 0:
                        drawn[who].append(generation(trainer))
            results.append(_row(name, spent))
            if number == 0:
                results.append(_row("generation of 32 tokens", drawn))
            print(results[-1], flush=True)
    table = Table(
        title=f"{GENERATIONS} roll-outs a prompt, 576 image tokens; {platform.machine()}, torch {torch.__version__}"
    )
    for column in ("case", "TRL s", "ours s", "ratio"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in results:
        table.add_row(row["case"], f"{row['trl']:.2f}", f"{row['ours']:.2f}", f"{row['ratio']:.1f}")
    Console(width=110).print(table)
    (RESULTS / "rollouts.json").write_text(json.dumps(results, indent=1) + "\n")


def _row(name: str, spent: dict[str, list[float]]) -> dict[str, Any]:
    trl, ours = (statistics.median(spent[who]) for who in ("trl", "ours"))
    return {"case": name, "trl": trl, "ours": ours, "ratio": trl / ours, "rounds": spent}


if __name__ == "__main__":
    main()
