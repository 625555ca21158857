"""SPECS on the embedded world: about six minutes on two CPU cores, no network.

    python examples/specs/run.py

The world's model answers in single words. It is first taught, by supervised fine-tuning on scenes by day, to think
before it answers, in the asked format about half of the time: this stands for an instructed base such as the paper's
(41.6 % of whose answers are in the format). Then the recipe runs on scenes at dusk, which the model has not seen.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch

import pivot_plugin as pivot
from pivot_plugin.preferences import sample
from pivot_plugin.quickstart import scenes, world
from pivot_plugin.recipes import specs
from pivot_plugin.rewards import resolve_rewards

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "Answer:", "think", "first"]
INSTRUCTION = "think first"
FORMATTED = 0.5
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 20,
    "gradient_checkpointing": False,
    "eval_fraction": 0,
    "save_strategy": "no",
}


def thoughtful(seed: int = 0) -> tuple[Any, Any]:
    """The world's model and processor with words for the format."""
    model, processor = world.model(), world.processor()
    processor.tokenizer.add_tokens(TAGS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(processor.tokenizer))
    return model, processor


def lessons(count: int, seed: int) -> list[dict[str, Any]]:
    """Answers with reasoning (the caption of the scene), half of them in the format, half in some other way."""
    rng = random.Random(seed)
    rows = []
    for scene, question in world.questions(count, seed, dusk=False):
        reasoning = f"{scene.caption()} and {question.answer}"
        formed = f"<think> {reasoning} </think> <answer> {question.answer} </answer>"
        loose = rng.choice([f"{reasoning} Answer: {question.answer}", f"{reasoning} {question.answer}"])
        rows.append(
            {
                "images": [scene.image],
                "prompt": f"{question.text} {INSTRUCTION}",
                "chosen": formed if rng.random() < FORMATTED else loose,
                "rejected": f"{scenes.wrong_caption(scene, rng)} Answer: {rng.choice(question.wrong)}",
            }
        )
    return rows


def dusk(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions about scenes at dusk, with answers."""
    return [
        {"images": [scene.image], "question": question.text, "answer": question.answer}
        for scene, question in world.questions(count, seed)
    ]


def examined(model: Any, processor: Any, size: int = 300) -> dict[str, float]:
    """Share of greedy answers in the format, and share with the right answer."""
    asked = dusk(size, seed=930_000)
    drawn = sample(
        *(model, asked),
        processor=processor,
        n=1,
        temperature=0,
        max_new_tokens=24,
        instruction=INSTRUCTION,
        batch_size=64,
    )
    said = [drawn.plain(position)["completions"][0] for position in range(size)]
    answers = [row["answer"] for row in asked]
    scores = {}
    for name in ("format", "accuracy"):
        (reward,) = resolve_rewards(name)
        values = reward(prompts=said, completions=said, answer=answers)  # type: ignore[operator]
        scores[name] = sum(values) / size
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("specs-example"))
    parser.add_argument("--steps", type=int, default=120, help="of the last stage; the others are in proportion")
    asked = parser.parse_args()
    folder, steps = asked.output_dir, asked.steps

    model, processor = thoughtful()
    if (folder / "base" / "config.json").exists():
        model = type(model).from_pretrained(folder / "base")
    else:
        taught = pivot.optimize(
            model,
            lessons(40 * steps, seed=1),
            processor=processor,
            output_dir=folder / "0-base",
            objective="sft",
            train="all",
            lora=None,
            learning_rate=1e-3,
            max_steps=5 * steps,
            per_device_train_batch_size=32,
            **SETTINGS,
        )
        model = taught.model
        model.save_pretrained(folder / "base")
    rollouts = {"num_generations": 8, "per_device_train_batch_size": 64, "max_completion_length": 24}
    result = specs(
        model,
        dusk(1000, seed=5),
        processor=processor,
        final_questions=dusk(2000, seed=6),
        output_dir=folder,
        instruction=INSTRUCTION,
        stages={
            "zero": {"max_steps": steps // 3, "learning_rate": 1e-3, **rollouts},
            "pairs": {"n": 4, "max_new_tokens": 24, "batch_size": 64},
            "cold-start": {"max_steps": steps // 2, "learning_rate": 1e-3, "per_device_train_batch_size": 16},
            "final": {"max_steps": steps, "learning_rate": 1e-3, **rollouts},
        },
        **SETTINGS,
    )
    table = {"base": examined(model, processor)}
    for stage in result.stages:
        if stage.trains:
            loaded = type(model).from_pretrained(Path(stage.folder) / "model")
            table[f"{stage.name} (trains {stage.trains.replace('_', ' ')})"] = examined(loaded, processor)
    print(f"{'after stage':<36}  in format  right")
    for name, scores in table.items():
        print(f"{name:<36}  {scores['format']:>9.3f}  {scores['accuracy']:>5.3f}")


if __name__ == "__main__":
    main()
