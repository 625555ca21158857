"""The first stage of the embedded world: captions, then captions and questions. Makes the shipped weights.

    python -m pivot_plugin.quickstart.first_stage --out first_stage.safetensors

Seeded; about 14 minutes on one CPU core. Captions come first because questions alone stall at chance.
"""

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import LlavaProcessor

from . import scenes, world

CAPTION_STEPS, MIXED_STEPS = 1400, 1000
BATCH_SIZE = 64
SCENES = 20_000


def _batch(
    pictures: list[scenes.Scene], captions: bool, rng: random.Random, processor: LlavaProcessor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One batch of whole conversations and its labels, the prompt left out of the loss."""
    prompts, texts = [], []
    for scene in pictures:
        if captions:
            text, answer = world.CAPTION_PROMPT, scene.caption()
        else:
            question = scenes.ask_any(scene, rng)
            text, answer = question.text, question.answer
        prompt = processor.apply_chat_template(world.user_message(text), add_generation_prompt=True)
        prompts.append(prompt)
        texts.append(f"{prompt}{answer} <eos> ")
    images = [[scene.image] for scene in pictures]
    inputs = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    image_tokens = (scenes.IMAGE_SIZE // scenes.PATCH_SIZE) ** 2
    for row, prompt in enumerate(prompts):
        labels[row, : len(prompt.split()) - 1 + image_tokens] = -100
    return inputs, labels


def run(out: Path, seed: int = 0) -> None:
    """Train the tiny LLaVA from scratch and write its weights in half precision.

    Args:
        out: safetensors file to write.
        seed: of weights, scenes and order.
    """
    rng = random.Random(seed)
    processor = world.processor()
    model = world.untrained_model(seed).train()
    pictures = scenes.render_many(SCENES, seed + 5_000_000)
    stages = [(CAPTION_STEPS, 2e-3, False), (MIXED_STEPS, 1.5e-3, True)]
    for steps, rate, mixed in stages:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        schedule = OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
        with tqdm(total=steps, desc="captions and questions" if mixed else "captions", mininterval=5) as bar:
            for step in range(steps):
                inputs, labels = _batch(rng.sample(pictures, BATCH_SIZE), not (mixed and step % 2), rng, processor)
                loss = model(**inputs, labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
        print(world.vqa_accuracy(model, processor, world.questions(500, seed=20_000, dusk=False)))
    save_file({name: weight.half().contiguous() for name, weight in model.state_dict().items()}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    run(**vars(parser.parse_args()))
