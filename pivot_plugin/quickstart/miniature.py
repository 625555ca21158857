"""A miniature of the paper: an encoder that sees badly, a language model that reads well, and rows about scenes in fog.

The encoder is a SigLIP of 0.2 M parameters, shown for a short while which colours and shapes a picture has; colours it
learns, shapes only by half. The language model is a Llama that has read captions and questions, never a picture. Rows
about pictures come as people have them: captions, conversations of several turns, preference pairs, questions.

Answers asked for "long" put words that say nothing before every fact, as in the long answers of real preference pairs:
chosen and rejected share them, and differ in one fact that must be seen.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pivot_plugin.probes import Masked

from . import scenes, world

PATCH_SIZE = 12
WIDTH = 64
BATCH = 64
KINDS = ("colour", "shape", "existence")
LONG_PROMPT = f"{world.CAPTION_PROMPT} long"
FILLERS = (
    *("well", "so", "now", "here", "then", "maybe", "quite", "seen", "near", "also", "just", "very", "some", "this"),
    *("that", "shows", "looks", "like", "with", "plain", "bright", "nice", "clear", "one", "other", "next", "first"),
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "<bos> {% for message in messages %}"
    "{{ '<user> ' if message['role'] == 'user' else '<assistant> ' }}{{ message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ '<eos> ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def encoder(seed: int = 0, steps: int = 500) -> tuple[SiglipVisionModel, SiglipImageProcessor]:
    """A vision encoder after a short pre-training: which colours and which shapes are in a picture.

    Args:
        seed: of weights, scenes and order.
        steps: of 64 pictures; fewer see worse.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=scenes.IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            vision_use_head=False,
        )
        model = SiglipVisionModel(config)
        seen = nn.Linear(WIDTH, len(scenes.COLOURS) + len(scenes.SHAPES))
        drawn = _scenes(6000, seed + 1_000_000)
        pixels = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in drawn])).float()
        pixels = pixels.permute(0, 3, 1, 2) / 127.5 - 1
        known = torch.tensor([[float(value in _values(scene)) for value in _VALUES] for scene in drawn])

        def loss() -> torch.Tensor:
            chosen = torch.randint(0, len(drawn), (BATCH,))
            features = model(pixels[chosen]).last_hidden_state.mean(dim=1)
            return F.binary_cross_entropy_with_logits(seen(features), known[chosen])

        _fit(nn.ModuleList([model, seen]), loss, steps, 1e-3)
    size = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    return model.eval(), SiglipImageProcessor(size=size)


def language_model(seed: int = 0, steps: int = 250) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A language model that has read the world's captions, questions and answers, and seen nothing.

    Args:
        seed: of weights and texts.
        steps: of 64 conversations.
    """
    tokens = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 500)
        config = LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config)
        texts = _texts(seed + 2_000_000)

        def loss() -> torch.Tensor:
            batch = tokens([next(texts) for _ in range(BATCH)], padding=True, return_tensors="pt")
            ids = batch["input_ids"]
            return model(**batch, labels=ids.masked_fill(batch["attention_mask"] == 0, -100)).loss

        _fit(model, loss, steps, 2e-3)
    return model.eval(), tokens


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, and a chat template for texts."""
    words = dict.fromkeys((*SPECIAL, *world.WORDS, "long", *FILLERS))
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def captions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pictures with captions that name every object.

    Args:
        count: of pictures.
        seed: the same seed gives the same rows.
    """
    return [{"images": [scene.image], "caption": scene.caption()} for scene in _scenes(count, seed)]


def conversations(count: int, seed: int = 0, fillers: int = 3) -> list[dict[str, Any]]:
    """Conversations of three turns about a picture each: a description, short or long, and two questions.

    Args:
        count: of pictures.
        seed: the same seed gives the same rows.
        fillers: words before every fact of a long description.
    """
    rng = random.Random(seed + 3_000_000)
    rows = []
    for scene in _scenes(count, seed):
        exchanges = _described(scene, rng, fillers)
        for _ in range(2):
            question = scenes.ask_any(scene, rng, KINDS)
            exchanges.append((question.text, question.answer))
        turns = []
        for number, (question_text, answer) in enumerate(exchanges):
            turns.append({"from": "human", "value": question_text if number else f"<image>\n{question_text}"})
            turns.append({"from": "gpt", "value": answer})
        rows.append({"image": scene.image, "conversations": turns})
    return rows


def pairs(count: int, seed: int = 0, fillers: int = 3, questions: float = 0.0) -> list[dict[str, Any]]:
    """Preference pairs whose answers differ in one fact that must be seen, drawn uniformly from those of its kind.

    Args:
        count: of pairs, a picture each.
        seed: the same seed gives the same rows.
        fillers: words before every fact of a description; both answers have the same.
        questions: share of pairs that are a question with a right and a wrong answer instead.
    """
    rng = random.Random(seed + 4_000_000)
    rows = []
    for scene in _scenes(count, seed):
        if rng.random() < questions:
            question = scenes.ask_any(scene, rng, KINDS)
            prompt, right, wrong = question.text, question.answer, rng.choice(question.wrong)
        else:
            before = [_filled(rng, fillers) for _ in scene.objects]
            prompt = LONG_PROMPT if fillers else world.CAPTION_PROMPT
            right, wrong = (_joined(text, before) for text in (scene.caption(), scenes.wrong_caption(scene, rng)))
        rows.append(
            {
                "images": [scene.image],
                "prompt": world.user_message(prompt),
                "chosen": [{"role": "assistant", "content": right}],
                "rejected": [{"role": "assistant", "content": wrong}],
            }
        )
    return rows


def questions(count: int, seed: int, kinds: tuple[str, ...] = KINDS) -> list[dict[str, Any]]:
    """Examination questions, the kinds in equal parts as far as the scenes allow.

    Args:
        count: of questions, a picture each.
        seed: the same seed gives the same rows.
        kinds: of questions.
    """
    rng = random.Random(seed + 5_000_000)
    with_scenes = [
        (scene, scenes.ask(scene, kinds[n % len(kinds)], rng) or scenes.ask_any(scene, rng, tuple(kinds)))
        for n, scene in enumerate(_scenes(count, seed))
    ]
    return world.question_rows(with_scenes)


def masks(train: int, test: int, seed: int) -> tuple[Masked, Masked]:
    """Pictures with the shape class of every pixel, 0 for background, to train a probe on and to test it.

    Args:
        train, test: how many.
        seed: the same seed gives the same pictures.
    """
    pictures = _scenes(train + test, seed)
    both = [Masked([s.image for s in part], [s.mask() for s in part]) for part in (pictures[:train], pictures[train:])]
    return both[0], both[1]


_VALUES = (*scenes.COLOURS, *scenes.SHAPES)


def _scenes(count: int, seed: int) -> list[scenes.Scene]:
    return scenes.render_many(count, seed, style=scenes.FOGGY)


def _values(scene: scenes.Scene) -> set[str]:
    return {value for item in scene.objects for value in (item.colour, item.shape)}


def _described(scene: scenes.Scene, rng: random.Random, fillers: int) -> list[tuple[str, str]]:
    """A description, in half of the cases a long one."""
    if not fillers or rng.random() < 0.5:
        return [(world.CAPTION_PROMPT, scene.caption())]
    return [(LONG_PROMPT, _joined(scene.caption(), [_filled(rng, fillers) for _ in scene.objects]))]


def _filled(rng: random.Random, fillers: int) -> str:
    return " ".join(rng.choice(FILLERS) for _ in range(fillers))


def _joined(caption: str, before: list[str]) -> str:
    facts = caption.split(" and ")
    return " and ".join(f"{words} {fact}".strip() for words, fact in zip(before, facts, strict=True))


def _texts(seed: int) -> Iterator[str]:
    """Conversations without pictures, in the words of the chat template."""
    rng = random.Random(seed)
    while True:
        scene = scenes.render(rng, style=scenes.FOGGY)
        question = scenes.ask_any(scene, rng, KINDS)
        asked, answer = rng.choice([*_described(scene, rng, rng.randint(1, 8)), (question.text, question.answer)])
        yield f"<bos> <user> {asked} <assistant> {answer} <eos>"


def _fit(model: nn.Module, loss: Callable[[], torch.Tensor], steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 1), pct_start=0.1)
    model.train()
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
