"""Runs in several processes on the CPU, over gloo, under each of accelerate's engines.

accelerate starts FSDP and DeepSpeed only where it finds a GPU; `on_cpu` tells it that it has found some, and both run
as they do there. Everything else is theirs and ours.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from tests.helpers import picture, row

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
# what `accelerate launch` sets of TRL's configuration files, but for their precision
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "DS_ACCELERATOR": "cpu",
}
VARIABLES: dict[str, dict[str, str]] = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": {"ACCELERATE_TORCH_DEVICE": "cpu", **FSDP2},
    "zero2": {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", **DEEPSPEED},
    "zero3": {
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        **DEEPSPEED,
    },
}


def on_cpu() -> None:
    """Let accelerate run FSDP and DeepSpeed without a GPU in this process."""
    if "ACCELERATE_TORCH_DEVICE" not in os.environ:
        return
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        # an extension that would be compiled first
        from deepspeed.comm import torch as deepspeed_torch

        deepspeed_torch.build_shm_op = lambda: None


def rows(count: int, images: str = "all") -> list[dict[str, Any]]:
    """Pairs, two to an image; "mixed" have an image in the first half and none in the second."""
    shown = [images == "all" or number < count // 2 for number in range(count)]
    return [
        row(
            f"number {number}?",
            f"it is {'very ' * (number % 3)}{number % 10}",
            "no" * (1 + number % 4),
            *([picture(40, 50, number // 2)] if has_image else []),
        )
        for number, has_image in enumerate(shown)
    ]


def by_length(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def settle_rollouts() -> None:
    """Have every roll-out say what its question and its place in the group say, however many processes draw them.

    They are drawn all the same, and then put aside: random numbers are each process's own.
    """
    from pivot_plugin.training.rollout_trainer import Rollouts

    draw = Rollouts._generate_single_turn

    def settled(self: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        drawn, logprobs = draw(self, prompt_ids, *args, **kwargs)
        assert len(drawn) == len(prompt_ids)
        before = self.accelerator.process_index * len(drawn)
        answers = []
        for place, ids in enumerate(prompt_ids):
            spread = hashlib.sha256(str([*ids, (before + place) % self.num_generations]).encode()).digest()[0]
            answers.append(self._tokenizer("no" * (1 + spread % 5), add_special_tokens=False)["input_ids"])
        return answers, logprobs

    Rollouts._generate_single_turn = settled  # type: ignore[method-assign]


def run(folder: Path, cell: dict[str, Any]) -> None:
    """One cell of the matrix, in this process: what is trained, how, and on which rows."""
    on_cpu()
    import pivot_plugin as pivot
    from pivot_plugin.testing import build

    verb, family = cell.pop("verb", "optimize"), cell.pop("family", "llava")
    held_out = cell.pop("held_out", 0)
    images, count = cell.pop("images", "all"), cell.pop("rows", 16)
    model, processor = build(family)
    common = {
        "output_dir": folder,
        "processor": processor,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "warmup_steps": 0,
        "max_steps": 3,
        "learning_rate": 1e-2,
        # plain descent: Adam makes noise of gradients near nothing as large as a gradient
        "optim": "sgd",
        **({} if "ACCELERATE_TORCH_DEVICE" in os.environ else {"use_cpu": True}),
        **cell,
    }
    if verb in ("align", "instruct"):
        common.setdefault("gradient_accumulation_steps", 1)
        talk = [
            {
                "images": one["images"],
                "messages": [
                    {"role": "user", "content": one["prompt"]},
                    {"role": "assistant", "content": one["chosen"]},
                ],
            }
            for one in rows(count, images)
        ]
        getattr(pivot, verb)(model, talk, **common)
        return
    common = {"eval_fraction": 0, **common}
    if common.get("objective") == "grpo":
        settle_rollouts()
        common |= {"rewards": by_length, "num_generations": 2, "max_completion_length": 4, "temperature": 1.0}
        data = [{"images": one["images"], "question": one["prompt"]} for one in rows(count, images)]
    else:
        data = rows(count, images)
        if held_out:
            # answers the other way round get worse as training goes on, so that the run stops early
            turned = [{**one, "chosen": one["rejected"], "rejected": one["chosen"]} for one in rows(held_out)]
            common |= {"eval_prefs": turned, "saliency": 0}
    pivot.optimize(model, data, **common)


def main(folder: str, cell: str) -> None:
    torch.set_num_threads(1)
    run(Path(folder), json.loads(cell))
