"""Kinds of run, killed at random moments and gone on with: the weights of an undisturbed run are expected each time.

`python -m tests.helpers.kills --kills 50 --seed 7` kills every kind fifty times and prints what differs; `make fuzz`
does. The suite kills a few in real processes, and cuts every kind in its own (tests/runs/test_resuming.py).
"""

import argparse
import hashlib
import random
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file

import pivot_plugin as pivot
from pivot_plugin.testing import build
from tests.helpers import picture, row
from tests.helpers.processes import ROOT, Program

COMMON = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_steps": 2,
    "save_total_limit": 2,
    "saliency": 0,
}
PAIRS = [row(f"number {n}?", f"it is {n}", "no", picture(40, 50, n // 2)) for n in range(14)]
TURNED = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS[:4]]
QUESTIONS = [{"prompt": f"number {n}?", "answer": str(n), "images": [picture(40, 50, n // 2)]} for n in range(8)]
CONVERSATIONS = [{"question": f"number {n}?", "answer": f"it is {n}", "image": picture(40, 50, n)} for n in range(10)]
ROLLOUTS = {"objective": "grpo", "num_generations": 2, "max_completion_length": 4, "eval_fraction": 0}


def _stream() -> Iterator[dict[str, Any]]:
    yield from PAIRS


def scattered(completions: list[Any], **_: object) -> list[float]:
    """A reward that differs between answers, the same in every process."""
    return [float(hashlib.sha256(str(answer).encode()).digest()[0] % 3) for answer in completions]


# by name: rows, and options beside COMMON
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "epochs": (lambda: PAIRS, {"lora": 4, "eval_fraction": 0, "num_train_epochs": 2}),
    "a fraction of an epoch": (lambda: PAIRS, {"lora": 4, "eval_fraction": 0, "num_train_epochs": 1.3}),
    "weights": (lambda: PAIRS, {"lora": None, "eval_fraction": 0, "max_steps": 5}),
    "accumulated": (
        lambda: PAIRS,
        {"lora": 4, "eval_fraction": 0, "num_train_epochs": 3, "gradient_accumulation_steps": 2},
    ),
    "stopped early": (
        lambda: PAIRS,
        {"lora": 4, "eval_prefs": TURNED, "eval_steps": 2, "num_train_epochs": 3, "patience": 3, "learning_rate": 3e-2},
    ),
    "a stream, twice": (lambda: datasets.IterableDataset.from_generator(_stream), {"lora": 4, "max_steps": 11}),
    "roll-outs": (
        lambda: QUESTIONS,
        {**ROLLOUTS, "rewards": [scattered], "lora": 4, "max_steps": 7, "per_device_train_batch_size": 4},
    ),
    "roll-outs used again": (
        lambda: QUESTIONS,
        {**ROLLOUTS, "rewards": [scattered], "lora": 4, "max_steps": 9, "num_iterations": 2, "steps_per_generation": 2}
        | {"save_steps": 1, "save_total_limit": None},
    ),
    "instruction": (
        lambda: CONVERSATIONS,
        {"lora": 4, "eval_fraction": 0.25, "eval_steps": 2, "num_train_epochs": 2, "gradient_accumulation_steps": 1},
    ),
}


def begin(kind: str, folder: Path, resume: bool) -> Any:
    """Run a kind of run in a folder, or go on with it; returns its result."""
    rows, options = KINDS[kind]
    torch.manual_seed(0)
    model, processor = build("llava")
    options = {**COMMON, **options}
    verb = pivot.optimize
    if kind == "instruction":
        verb = pivot.instruct  # type: ignore[assignment]
        options.pop("saliency")
    return verb(model, rows(), processor=processor, output_dir=folder, resume=resume, **options)


def left(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The weights that a run has left."""
    return load_file(folder / ("model" if kind == "instruction" else "encoder") / "model.safetensors")


PROGRAM = textwrap.dedent("""
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from tests.helpers.kills import begin
    print("begun", flush=True)
    begin(sys.argv[2], Path(sys.argv[3]), resume=True)
""")


def _started(kind: str, folder: Path) -> Program:
    variables = {"PIVOT_CACHE": str(folder.parent / "cache")}
    return Program(PROGRAM, [str(ROOT), kind, str(folder)], folder.parent, variables, listened=True)


def killed(kind: str, kills: int, rng: random.Random, place: Path) -> int:
    """Kill a kind of run so often, over as many runs as that takes.

    Returns:
        how many of these runs ended with other weights than an undisturbed one.
    """
    straight = _started(kind, place / "straight")
    began = time.monotonic()
    assert (ended := straight.wait()).returncode == 0, ended.stderr[-2000:]
    lasts = time.monotonic() - began
    expected, differ, number = left(place / "straight", kind), 0, 0
    while kills > 0:
        folder = place / f"run-{number}"
        for _ in range(min(kills, rng.randint(1, 4))):
            process = _started(kind, folder)
            time.sleep(rng.uniform(0, lasts))
            process.kill()
            process.wait()
            kills -= 1
        last = _started(kind, folder).wait()
        found = left(folder, kind) if last.returncode == 0 else {}
        if found.keys() != expected.keys() or not all(found[name].equal(tensor) for name, tensor in expected.items()):
            differ += 1
            print(f"  {kind}, run {number}: {'other weights' if found else last.stderr[-500:]}", flush=True)
        number += 1
    return differ


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS), action="append")
    given = parser.parse_args()
    broke = 0
    for kind in given.kind or KINDS:
        with tempfile.TemporaryDirectory() as place:
            differ = killed(kind, given.kills, random.Random(f"{given.seed} {kind}"), Path(place))
        print(f"{kind}: {given.kills} kills, {differ} runs with other weights", flush=True)
        broke += differ
    sys.exit(bool(broke))


if __name__ == "__main__":
    main()
