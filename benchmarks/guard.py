"""Whether a training step has become slower: its seconds over those of a bare loop, against the ratios that are kept.

    python -m benchmarks.guard                 # four shapes at small size; exit status 1 if one has become worse
    python -m benchmarks.guard --write         # keep what is measured, with the machine

The bare loop is transformers alone: the stock forward pass of the same model with the same LoRA, on one row for each
picture that holds all questions and answers about it one after the other, which are as many tokens as are distinct;
the loss of as many words; backward; optimiser. It knows neither trees nor trainers, so that whatever the trainer, the
collator or the forward pass over the forest cost more shows in the ratio. Steps of both sides alternate in one process:
after each of the trainer's comes one of the loop, and what is compared is the median of the quotients of neighbours,
of the seconds that passed, which see whoever waits, and of those of the processor, which other work changes little.
The noise is half the width of the median's 95 % interval (bootstrap). A shape has become worse where its median is
above the kept one by more than the noise of both measurements. All of it ends within `--seconds`, if each shape gets
through its first steps in a quarter of them; on a slow machine it takes fewer steps.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, TrainerControl

from pivot_plugin import PivotConfig, PivotTrainer
from pivot_plugin.models.find import find_adapter
from pivot_plugin.training.plan import plan

from .machine import described
from .shapes import MAKERS, SHAPES, Shape, pairs_of

FILE = Path(__file__).parent / "results" / "guard.json"
STEPS = 14
# left out: what is slow once alone
WARM = 2
# before the time may end it
FEWEST = 5
SECONDS = 60.0
DRAWS = 2000
# what time is read from: the seconds that pass, and those that this process computes
CLOCKS = {"elapsed": time.perf_counter, "processor": time.process_time}
SIZES: dict[str, dict[str, Any]] = {
    "vision": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 3},
    "qwen_vision": {"hidden_size": 96, "intermediate_size": 384, "depth": 4, "num_heads": 3},
    "text": {
        "vocab_size": 2000,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}
SMALL = [replace(shape, answer=min(shape.answer, 128)) for shape in SHAPES]


@dataclass(frozen=True)
class Ratio:
    """A trainer's step over the bare loop's.

    Attributes:
        shape: its name.
        clock: whose seconds, a key of `CLOCKS`.
        ratio: median of the quotients of neighbouring steps.
        noise: half the width of that median's 95 % interval.
        trainer, bare: median seconds of a step.
        steps: how many of each.
    """

    shape: str
    clock: str
    ratio: float
    noise: float
    trainer: float
    bare: float
    steps: int

    def worse_than(self, kept: "Ratio") -> bool:
        """Whether this is above another by more than the noise of both."""
        return self.ratio - self.noise > kept.ratio + kept.noise


def ratio_of(shape: str, clock: str, trainer: list[float], bare: list[float]) -> Ratio:
    """The ratio of two sides whose steps alternated.

    Args:
        shape: its name.
        clock: whose seconds.
        trainer, bare: seconds of each step, in their order.
    """
    quotients = np.array(trainer) / np.array(bare)
    drawn = np.random.default_rng(0).choice(quotients, (DRAWS, len(quotients)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Ratio(
        shape=shape,
        clock=clock,
        ratio=float(np.median(quotients)),
        noise=float(high - low) / 2,
        trainer=statistics.median(trainer),
        bare=statistics.median(bare),
        steps=len(quotients),
    )


class Bare:
    """A loop that trains without us: transformers' model, PEFT's LoRA, torch's optimiser."""

    def __init__(self, shape: Shape, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model = get_peft_model(model, plan(find_adapter(model), "encoder", 16).lora).train()
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-4)
        rows = pairs_of(shape, 1)
        texts, images = [], []
        for first in range(0, len(rows), shape.questions):
            about = rows[first : first + shape.questions]
            images.append(about[0]["images"])
            turns = [[row["prompt"], row["chosen"] + row["rejected"]] for row in about]
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}]}
                for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
            messages[0]["content"] = [{"type": "image"}, *messages[0]["content"]]  # type: ignore[misc]
            texts.append(processor.apply_chat_template(messages, tokenize=False))
        self.inputs = dict(processor(text=texts, images=images, return_tensors="pt", padding=True))
        self.scored = 2 * shape.answer * shape.questions
        self.labels = self.inputs["input_ids"][:, -self.scored :].flatten()

    def step(self) -> None:
        """A training step."""
        logits = self.model(**self.inputs, logits_to_keep=self.scored).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _now() -> np.ndarray:
    """What each clock shows."""
    return np.array([read() for read in CLOCKS.values()])


class Alternates(TrainerCallback):
    """After each step of a trainer one of the bare loop; of both the seconds by every clock."""

    def __init__(self, bare: Bare, until: float) -> None:
        self.trainer: list[np.ndarray] = []
        self.bare: list[np.ndarray] = []
        self._bare = bare
        self._until = until
        self._last: np.ndarray | None = None

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        ended = _now()
        if self._last is not None:
            self.trainer.append(ended - self._last)
            self._bare.step()
            self.bare.append(_now() - ended)
            if len(self.bare) >= WARM + FEWEST and time.monotonic() > self._until:
                control.should_training_stop = True
        self._last = _now()


def compare(shape: Shape, steps: int = STEPS, seconds: float = float("inf")) -> list[Ratio]:
    """Measure one shape, by every clock.

    Args:
        shape: to measure.
        steps: of each side.
        seconds: after which no further step is taken, if there are a few.
    """
    until = time.monotonic() + seconds
    torch.manual_seed(0)
    models = [MAKERS[shape.model](SIZES) for _ in range(2)]
    sides = Alternates(Bare(shape, *models[0]), until)
    with tempfile.TemporaryDirectory() as folder:
        config = PivotConfig(
            output_dir=folder,
            reference_cache=folder,
            use_cpu=True,
            bf16=False,
            max_length=None,
            max_steps=steps + WARM + 1,
            per_device_train_batch_size=shape.pairs,
            gradient_checkpointing=False,
            learning_rate=1e-4,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_steps=1000,
        )
        model, processor = models[1]
        # as many batches as fit into two epochs: their pictures are decoded and processed again
        rows = pairs_of(shape, (steps + WARM) // 2 + 1)
        trainer = PivotTrainer(model, config, rows, processing_class=processor, callbacks=[sides])
        trainer.train()
    columns = [np.array(seconds[WARM:]).T.tolist() for seconds in (sides.trainer, sides.bare)]
    return [ratio_of(shape.name, clock, *both) for clock, *both in zip(CLOCKS, *columns, strict=True)]


def verdict(now: Ratio, kept: dict[str, Any]) -> tuple[str, bool]:
    """What is to be said of a ratio, and whether it has become worse.

    Args:
        now: as measured.
        kept: the record of an earlier measurement.
    """
    line = f"{now.shape}, {now.clock}: {now.ratio:.2f} ± {now.noise:.2f} bare steps of {now.bare:.2f} s ({now.steps})"
    before = next((Ratio(**row) for row in kept["ratios"] if _key(row) == _key(asdict(now))), None)
    if before is None:
        return f"{line}; none is kept", False
    worse = now.worse_than(before)
    return f"{line}; kept {before.ratio:.2f} ± {before.noise:.2f}: {'WORSE' if worse else 'no worse'}", worse


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["shape"], row["clock"]


def main() -> None:
    """Measure, compare, and exit with 1 if a shape has become worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[shape.name for shape in SMALL], action="append")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all shapes")
    parser.add_argument("--write", action="store_true", help="keep what is measured")
    parser.add_argument("--file", type=Path, default=FILE, help="of the ratios that are kept")
    options = parser.parse_args()
    machine = described("cpu")
    kept = json.loads(options.file.read_text()) if options.file.exists() else {"ratios": []}
    shapes = [shape for shape in SMALL if not options.shape or shape.name in options.shape]
    measured, worse = [], []
    for shape in shapes:
        for ratio in compare(shape, options.steps, options.seconds / len(shapes)):
            measured.append(ratio)
            line, bad = verdict(ratio, kept)
            worse += [f"{ratio.shape} ({ratio.clock})"] * bad
            print(line, flush=True)
    if kept["ratios"] and kept["device"] != machine["device"]:
        print(f"The kept ratios are those of another machine: {kept['device']}, not {machine['device']}.")
    if options.write:
        rows = {_key(row): row for row in (*kept["ratios"], *map(asdict, measured))}
        options.file.write_text(json.dumps({**machine, "ratios": [*rows.values()]}, indent=1) + "\n")
        print(f"Written to {options.file}")
    elif worse:
        raise SystemExit(f"A training step has become slower: {', '.join(worse)}.")


if __name__ == "__main__":
    main()
