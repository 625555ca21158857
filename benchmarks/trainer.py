"""TRL's DPOTrainer with LoRA on the vision tower against PivotTrainer: same model, pairs, batch and settings.

    python -m benchmarks.trainer                       # mid-size models on the CPU, about ten minutes
    python -m benchmarks.trainer --preset gpu          # LLaVA-1.5-7B and Qwen2.5-VL-3B shapes in bfloat16
    python -m benchmarks.trainer --shape short-answers --rounds 1

Whole trainers are timed, data loading and image processing included, in alternating rounds of one process; a step is
the time from one step's end to the next, the first of each round left out. Random weights: they cost what trained ones
do. The bare floor is a loop over the forest's own batches, collated beforehand: forward, loss, backward, optimiser.
"""

import argparse
import copy
import ctypes
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from pivot_plugin import PivotConfig, PivotTrainer
from pivot_plugin.models.find import find_adapter
from pivot_plugin.testing.families import TOKEN, byte_tokenizer, chat_template
from pivot_plugin.training import forward
from pivot_plugin.training.attention import attend_by
from pivot_plugin.training.plan import plan, unwrapped

RESULTS = Path(__file__).parent / "results"
EPOCHS = 3
STEPS = 4


@dataclass(frozen=True)
class Shape:
    """One situation to measure: which model, how large its images, how many questions on each, how long the answers."""

    name: str
    model: str
    pairs: int
    questions: int
    answer: int
    sizes: tuple[tuple[int, int], ...]


SHAPES = [
    Shape("short-answers", "llava", pairs=2, questions=1, answer=8, sizes=((336, 336),)),
    Shape("eight-questions", "llava", pairs=8, questions=8, answer=8, sizes=((336, 336),)),
    Shape("long-answers", "llava", pairs=2, questions=1, answer=512, sizes=((336, 336),)),
    Shape("variable-resolution", "qwen", pairs=3, questions=1, answer=16, sizes=((448, 336), (224, 560), (336, 336))),
]


def llava(sizes: dict[str, dict[str, int]]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A LLaVA-1.5 of the given widths and depths: 576 image tokens, features of layer -2."""
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **sizes["vision"]),
            text_config=LlamaConfig(max_position_embeddings=4096, pad_token_id=0, **sizes["text"]),
            image_token_id=TOKEN["<image>"],
            vision_feature_layer=-2,
            image_seq_length=576,
            tie_word_embeddings=False,
        )
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(),
        tokenizer=byte_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("llava"),
    )
    processor.image_processor.size, processor.image_processor.crop_size = (
        {"shortest_edge": 336},
        {"height": 336, "width": 336},
    )
    return model, processor


def qwen(sizes: dict[str, dict[str, int]]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A Qwen2.5-VL of the given widths and depths."""
    width = sizes["text"]["hidden_size"] // sizes["text"]["num_attention_heads"]
    section = [width // 8, width // 2 - width // 8 - (width // 2 - width // 8) // 2, (width // 2 - width // 8) // 2]
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={**sizes["qwen_vision"], "out_hidden_size": sizes["text"]["hidden_size"]},
            text_config={
                **sizes["text"],
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 1e6},
                "pad_token_id": 0,
            },
            image_token_id=TOKEN["<|image_pad|>"],
            video_token_id=TOKEN["<|video_pad|>"],
            vision_start_token_id=TOKEN["<|vision_start|>"],
            vision_end_token_id=TOKEN["<|vision_end|>"],
            tie_word_embeddings=False,
        )
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}),
        tokenizer=byte_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=chat_template("qwen2_5_vl"),
    )
    return model, processor


MAKERS: dict[str, Callable[..., tuple[PreTrainedModel, ProcessorMixin]]] = {"llava": llava, "qwen": qwen}
PRESETS: dict[str, dict[str, dict[str, dict[str, int]]]] = {
    "cpu": {
        name: {
            "vision": {
                "hidden_size": 256,
                "intermediate_size": 1024,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
            },
            "qwen_vision": {"hidden_size": 256, "intermediate_size": 1024, "depth": 6, "num_heads": 4},
            "text": {
                "vocab_size": 16_000,
                "hidden_size": 512,
                "intermediate_size": 1536,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
            },
        }
        for name in MAKERS
    },
    "gpu": {
        "llava": {
            "vision": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
            },
            "text": {
                "vocab_size": 32_064,
                "hidden_size": 4096,
                "intermediate_size": 11_008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
            },
        },
        "qwen": {
            "qwen_vision": {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16},
            "text": {
                "vocab_size": 151_936,
                "hidden_size": 2048,
                "intermediate_size": 11_008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
            },
        },
    },
}


def pairs_of(shape: Shape, steps: int) -> list[dict[str, Any]]:
    """Preference pairs of a shape: random pictures, questions and answers of the wanted lengths."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(shape.pairs * steps):
        group = index // shape.questions
        width, height = shape.sizes[group % len(shape.sizes)]
        image = Image.fromarray(np.random.default_rng(group).integers(0, 255, (height, width, 3), dtype=np.uint8))
        letters = [chr(97 + n) for n in rng.integers(0, 26, 2 * shape.answer + 24)]
        rows.append(
            {
                "images": [image],
                "prompt": "".join(letters[:24]),
                "chosen": "".join(letters[24 : 24 + shape.answer]),
                "rejected": "".join(letters[24 + shape.answer :]),
            }
        )
    return rows


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
    """One shape, ready to be measured by either side."""

    shape: Shape
    model: PreTrainedModel
    processor: ProcessorMixin
    device: torch.device
    checkpointing: bool
    folder: Path

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
        model = copy.deepcopy(self.model)
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
                copy.deepcopy(self.model),
                PivotConfig(reference_cache=cache, **self.settings()),
                pairs_of(self.shape, STEPS),
                processing_class=self.processor,
            )
        return trainer, sum(spent) / (self.shape.pairs * STEPS)

    def bare(self, trainer: PivotTrainer) -> list[float]:
        """Seconds of each step of a loop over the trainer's own batches, without a trainer."""
        model = copy.deepcopy(self.model).to(self.device).train()
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
        batches = [batch["forest"].to(self.device) for batch in trainer.get_train_dataloader()]
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


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    """Measure both sides and the floor in alternating rounds."""
    found: dict[str, list[float]] = {"trl": [], "pivot": [], "bare": [], "reference": []}
    for _ in range(rounds):
        trl = bench.trl()
        found["trl"] += timed(trl, bench.device)
        pivot, reference = bench.pivot()
        found["reference"].append(reference)
        found["pivot"] += timed(pivot, bench.device)
        found["bare"] += bench.bare(pivot)
    forest = pivot._collator(list(pivot.train_dataset.select(range(bench.shape.pairs))))["forest"].forest
    step = {name: statistics.median(values) for name, values in found.items()}
    pairs = bench.shape.pairs
    # TRL computes its reference in every step, ours once for all epochs
    ours = step["pivot"] + step["reference"] * pairs / EPOCHS
    memory = {
        "trl": peak_bytes(lambda: _one_step(trl), bench.device),
        "pivot": peak_bytes(lambda: _one_step(pivot), bench.device),
    }
    return {
        **asdict(bench.shape),
        "checkpointing": bench.checkpointing,
        "steps_timed": len(found["pivot"]),
        "seconds_per_step": step,
        "pairs_per_second": {"trl": pairs / step["trl"], "pivot": pairs / ours},
        "speed_ratio": step["trl"] / ours,
        "step_ratio": step["trl"] / step["pivot"],
        "overhead_over_bare": step["pivot"] / step["bare"] - 1,
        "peak_bytes": memory,
        "memory_ratio": memory["pivot"] / memory["trl"],
        "tokens_per_step": {"trl": 2 * forest.sequence_token_count, "pivot": forest.node_count},
        "flops_per_step": {"trl": flops(trl), "pivot": flops(pivot)},
        "spread": {name: [min(values), max(values)] for name, values in found.items()},
    }


def _one_step(trainer: DPOTrainer) -> None:
    trainer.training_step(trainer.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    trainer.model.zero_grad()


def table(results: list[dict[str, Any]]) -> Table:
    """The results, a row per shape."""
    shown = Table(title=f"PivotTrainer against TRL's DPOTrainer, {EPOCHS} epochs, reference pass included")
    for column in ("shape", "TRL pairs/s", "ours", "ratio", "step alone", "over bare", "memory", "tokens", "FLOPs"):
        shown.add_column(column, justify="left" if column == "shape" else "right")
    for row in results:
        tokens, operations = row["tokens_per_step"], row["flops_per_step"]
        shown.add_row(
            row["name"],
            f"{row['pairs_per_second']['trl']:.2f}",
            f"{row['pairs_per_second']['pivot']:.2f}",
            f"{row['speed_ratio']:.2f}",
            f"{row['step_ratio']:.2f}",
            f"{row['overhead_over_bare']:+.1%}",
            f"{row['memory_ratio']:.2f}",
            f"{tokens['pivot'] / tokens['trl']:.2f}",
            f"{operations['pivot'] / operations['trl']:.2f}",
        )
    return shown


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--shape", choices=[shape.name for shape in SHAPES], action="append")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--attention", choices=["sdpa", "eager", "flex_attention"], default="sdpa")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cuda" if options.preset == "gpu" else "cpu")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            if options.shape and shape.name not in options.shape:
                continue
            torch.manual_seed(0)
            # a model of billions of weights is made where it will live, in the precision it will have
            torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
            with device:
                model, processor = MAKERS[shape.model](PRESETS[options.preset][shape.model])
            torch.set_default_dtype(torch.float32)
            model.set_attn_implementation(options.attention)
            bench = Bench(shape, model, processor, device, options.checkpointing, Path(folder))
            results.append(measure(bench, options.rounds))
            Console(width=120).print(table(results[-1:]))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {torch.get_num_threads()}"
    record = {
        "device": name if device.type == "cuda" else f"CPU ({name} threads)",
        "torch": torch.__version__,
        "attention": options.attention,
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"trainer-{options.preset}{'-checkpointing' if options.checkpointing else ''}.json"
    if file.exists():
        # shapes that were not measured this time keep their rows, if they were measured on the same machine
        earlier = json.loads(file.read_text())
        if all(earlier[key] == record[key] for key in ("device", "torch", "attention")):
            fresh = {row["name"]: row for row in results}
            old = {row["name"]: row for row in earlier["results"]}
            record["results"] = [*{**old, **fresh}.values()]
    file.write_text(json.dumps(record, indent=1) + "\n")
    Console(width=120).print(table(results))
    print(f"Written to {file}")


if __name__ == "__main__":
    main()
