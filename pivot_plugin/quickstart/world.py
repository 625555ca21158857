"""The embedded world: a tiny LLaVA over rendered scenes, its preference pairs and its examination.

The model is a real `LlavaForConditionalGeneration` (SigLIP tower, two-layer projector, Llama) of 613,120 parameters.
Its first stage (captions, then questions) was run by `pivot_plugin.quickstart.first_stage` and is shipped as package
data, so that a demonstration starts where the paper's second stage starts.
"""

import random
from collections.abc import Sequence
from importlib.resources import as_file, files
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from pivot_plugin.probes import Masked, subject, vqa
from pivot_plugin.rewards import completion_text

from . import scenes

# no answer is longer than a word and its end
VQA_OPTIONS: dict[str, Any] = {"rewards": "exact_match", "max_new_tokens": 3, "batch_size": 64}
# of a caption of four objects and its end
CAPTION_TOKENS = 13
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>")
WORDS = (
    *scenes.COLOURS,
    *scenes.SHAPES,
    *scenes.NUMBERS.values(),
    *("yes", "no", "and", "what", "color", "shape", "is", "the", "how", "many", "objects", "object", "there", "a"),
    *("left", "of", "describe", "image"),
)
CHAT_TEMPLATE = (
    "<bos> {% for message in messages %}"
    "{{ '<user> ' if message['role'] == 'user' else '<assistant> ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<eos> ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
CAPTION_PROMPT = "describe the image"


def processor() -> LlavaProcessor:
    """The world's processor: a word tokenizer and 48 px SigLIP preprocessing."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
    )
    size = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=SiglipImageProcessor(size=size),
        tokenizer=tokenizer,
        patch_size=scenes.PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def config() -> LlavaConfig:
    """Configuration of the tiny LLaVA; 64 image tokens, features from the tower's last layer."""
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=scenes.IMAGE_SIZE,
        patch_size=scenes.PATCH_SIZE,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(scenes.IMAGE_SIZE // scenes.PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=2,
    )


def untrained_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """The tiny LLaVA with random weights; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config())
    model.generation_config.eos_token_id = SPECIAL.index("<eos>")
    model.generation_config.pad_token_id = SPECIAL.index("<pad>")
    return model.eval()


def model() -> LlavaForConditionalGeneration:
    """The tiny LLaVA after its first stage, in float32."""
    trained = untrained_model()
    with as_file(files(__package__) / "first_stage.safetensors") as path:
        weights = load_file(path)
    trained.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return trained


def user_message(text: str) -> list[dict[str, Any]]:
    """One user turn about one image, in TRL's conversational vision layout."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Preference pairs about fresh scenes at dusk: half captions wrong in one fact, half questions with a wrong answer.

    Wrong answers are drawn uniformly from those of the same kind, so that none can be told without the image.

    Args:
        count: number of pairs, one scene each.
        seed: the same seed gives the same pairs.

    Returns:
        Rows with `images`, `prompt`, `chosen`, `rejected` and `id`.
    """
    rng = random.Random(seed)
    rows = []
    for index, scene in enumerate(scenes.render_many(count, seed + 1, dusk=True)):
        if index % 2:
            text, chosen, rejected = CAPTION_PROMPT, scene.caption(), scenes.wrong_caption(scene, rng)
        else:
            question = scenes.ask_any(scene, rng)
            text, chosen, rejected = question.text, question.answer, rng.choice(question.wrong)
        rows.append(_pair(f"scene-{seed}-{index}", scene, text, chosen, rejected))
    return rows


def questions(count: int, seed: int = 10_000, dusk: bool = True) -> list[tuple[scenes.Scene, scenes.Question]]:
    """Examination questions about fresh scenes, the kinds in equal parts as far as the scenes allow."""
    rng = random.Random(seed)
    with_scenes = []
    for index, scene in enumerate(scenes.render_many(count, seed + 1, dusk)):
        first = scenes.QUESTION_KINDS[index % len(scenes.QUESTION_KINDS)]
        with_scenes.append((scene, scenes.ask(scene, first, rng) or scenes.ask_any(scene, rng)))
    return with_scenes


def question_rows(with_scenes: list[tuple[scenes.Scene, scenes.Question]]) -> list[dict[str, Any]]:
    """Questions as `preferences.load_questions` takes them: `images`, `question`, `answer`, `kind`."""
    return [
        {"images": [scene.image], "question": question.text, "answer": question.answer, "kind": question.kind}
        for scene, question in with_scenes
    ]


def caption_questions(count: int, seed: int, dusk: bool = True) -> list[dict[str, Any]]:
    """Fresh scenes to be described: `images`, `question`, and `caption`, by which `facts_right` judges answers.

    Args:
        count: number of scenes.
        seed: the same seed gives the same rows.
        dusk: show them at dusk.
    """
    return [
        {"images": [scene.image], "question": CAPTION_PROMPT, "caption": scene.caption()}
        for scene in scenes.render_many(count, seed, dusk)
    ]


def facts_right(
    prompts: Sequence[object], completions: Sequence[object], caption: Sequence[str], **columns: object
) -> list[float]:
    """The reward of descriptions: the share of the scene's facts that is right, see `scenes.facts_right`."""
    said = [completion_text(completion) for completion in completions]
    return [scenes.facts_right(text, true) for text, true in zip(said, caption, strict=True)]


def vqa_accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    with_scenes: list[tuple[scenes.Scene, scenes.Question]],
) -> dict[str, float]:
    """Share of questions whose greedy answer is exactly right, by kind and in all (`"all"`)."""
    result = vqa(subject(model, processor), question_rows(with_scenes), **VQA_OPTIONS, without=())
    return {kind: score.value for kind, score in result.scores.items()}


def segmented(count: int, seed: int) -> Masked:
    """Scenes at dusk with the shape class of every pixel, 0 for background."""
    pictures = scenes.render_many(count, seed, dusk=True)
    return Masked([scene.image for scene in pictures], [scene.mask() for scene in pictures])


def located_pairs(count: int, seed: int) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Preference pairs about the colour, the shape or the places of objects, and masks of these objects.

    Args:
        count: number of pairs, one scene each.
        seed: the same seed gives the same pairs.
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    masks: list[np.ndarray] = []
    for scene, question in questions(2 * count, seed):
        if question.about and len(rows) < count:
            rows.append(
                _pair(f"located-{seed}-{len(rows)}", scene, question.text, question.answer, rng.choice(question.wrong))
            )
            masks.append(scene.mask(question.about) > 0)
    return rows, masks


def _pair(name: str, scene: scenes.Scene, text: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "id": name,
        "images": [scene.image],
        "prompt": user_message(text),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
