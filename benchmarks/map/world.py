"""The map's world: scenes in fog, encoders that see shapes by half, first stages, and how models are taught and read.

A picture is taught and read with many texts at once: its tokens stand before all of them once, and each text sees them
and itself alone (a forest, as the package trains on). That, and features kept of a frozen tower, make a first stage or
a transplant a matter of seconds.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    SiglipImageProcessor,
    SiglipVisionModel,
)

from pivot_plugin.encoders.assemble import assemble
from pivot_plugin.files import whole_folder
from pivot_plugin.quickstart import miniature, scenes, world
from pivot_plugin.recipes.transplant import transplant

ENCODER_STEPS = 300
REASONED = f"{world.CAPTION_PROMPT} so"
IMAGE_TOKENS = (scenes.IMAGE_SIZE // miniature.PATCH_SIZE) ** 2
CAPTION_TOKENS = 8
# of the pictures that are read, how many are described too
DESCRIBED = 300
END = "<eos>"
# seeds of scenes, apart from those of `miniature`'s parts
TAUGHT, PATCHES, TRANSPLANTED, TARGETS = 6_000_000, 6_200_000, 6_400_000, 900


@dataclass(frozen=True)
class Text:
    """What is said about a picture: the user's words and the answer."""

    prompt: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Pictures:
    """Scenes, their pixels (count, 3, 48, 48) in [-1, 1], and the texts of each."""

    scenes: list[scenes.Scene]
    pixels: torch.Tensor
    texts: list[list[Text]]


def pictures(count: int, seed: int, questions: int = 3, reasoned: bool = False) -> Pictures:
    """Scenes in fog with a caption and questions each.

    Args:
        count: of scenes.
        seed: the same seed gives the same.
        questions: about each scene.
        reasoned: a caption that ends in the answer to a question, too.
    """
    rng = random.Random(seed + 1)
    drawn = scenes.render_many(count, seed, style=scenes.FOGGY)
    texts = []
    for scene in drawn:
        asked = [scenes.ask_any(scene, rng, miniature.KINDS) for _ in range(questions + reasoned)]
        said = [Text(world.CAPTION_PROMPT, scene.caption(), "caption")]
        said += [Text(question.text, question.answer, question.kind) for question in asked[:questions]]
        if reasoned:
            question = asked[-1]
            said.append(Text(f"{REASONED} {question.text}", f"{scene.caption()} so {question.answer}", "reasoned"))
        texts.append(said)
    pixels = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in drawn])).float()
    return Pictures(drawn, pixels.permute(0, 3, 1, 2) / 127.5 - 1, texts)


@cache
def words() -> dict[str, int]:
    vocabulary: dict[str, int] = miniature.tokenizer().get_vocab()
    return vocabulary


def ids(text: str) -> list[int]:
    known = words()
    return [known[word] for word in text.split()]


@dataclass(frozen=True)
class Forest:
    """Texts behind the tokens of their pictures.

    Attributes:
        tokens, labels: (pictures, length) word ids, and what follows each, -100 where it is not asked.
        branch: (pictures, length), 0 for what all texts see, -1 for padding.
        position: (pictures, length).
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    branch: torch.Tensor
    position: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """(pictures, 1, length, length): who sees whom, as what is added to the scores of attention."""
        here, there = self.branch[:, :, None], self.branch[:, None, :]
        length = self.branch.shape[1]
        sees = ((there == 0) | (there == here)) & torch.ones(length, length, dtype=torch.bool).tril()
        # what sees nothing gives not-a-number
        sees |= torch.eye(length, dtype=torch.bool)
        return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]


def forest(texts: Sequence[Sequence[Text]]) -> Forest:
    """Texts as the tokens that the processor's template would give, behind `<bos> <user>` and the picture's place."""
    before = [*ids("<bos> <user>"), *[0] * IMAGE_TOKENS]
    rows = []
    for said in texts:
        tokens, labels, branch = list(before), [-100] * len(before), [0] * len(before)
        position = list(range(len(before)))
        for number, text in enumerate(said, 1):
            asked, answer = ids(f"{text.prompt} <assistant>"), [*ids(text.answer), *ids(END)]
            tokens += asked + answer
            labels += [-100] * (len(asked) - 1) + answer + [-100]
            length = len(asked) + len(answer)
            branch += [number] * length
            position += range(len(before), len(before) + length)
        rows.append((tokens, labels, branch, position))
    length = max(len(row[0]) for row in rows)
    parts = [
        torch.tensor([row[n] + [padding] * (length - len(row[n])) for row in rows])
        for n, padding in enumerate((0, -100, -1, 0))
    ]
    return Forest(*parts)


def features(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What a frozen tower gives: (pictures, patches, width), the last state before its last norm, as LLaVA reads it."""
    tower.eval()
    with torch.no_grad():
        return torch.cat([_states(tower, part) for part in pixels.split(256)])


def _states(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = tower(pixels, output_hidden_states=True).hidden_states[-1]
    return states


def logits(model: Any, states: torch.Tensor, rows: Forest) -> torch.Tensor:
    """What a model says at every token that is asked, (asked, words)."""
    inner = model.model
    embedded = inner.language_model.get_input_embeddings()(rows.tokens)
    image = inner.multi_modal_projector(states)
    embedded = torch.cat([embedded[:, :2], image, embedded[:, 2 + IMAGE_TOKENS :]], dim=1)
    hidden = inner.language_model(
        inputs_embeds=embedded, attention_mask=rows.mask, position_ids=rows.position, use_cache=False
    ).last_hidden_state
    said: torch.Tensor = model.lm_head(hidden[rows.labels != -100])
    return said


@dataclass(frozen=True)
class Teaching:
    """How a model is taught.

    Attributes:
        steps: of `batch` pictures.
        rate: the highest learning rate, of a cycle.
        tower_rate: of the tower; 0 freezes it.
    """

    steps: int
    rate: float
    tower_rate: float = 0.0
    batch: int = 16


def teach(model: Any, shown: Pictures, how: Teaching, seed: int) -> None:
    """Teach projector and language model, and the tower where it has a rate, what is said of pictures.

    Args:
        model: of `assemble`, changed in place.
        shown: to learn from.
        how: steps and rates.
        seed: of the order.
    """
    tower = model.model.vision_tower
    rest = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
    rest += model.lm_head.parameters()
    groups, rates = [{"params": rest}], [how.rate]
    if how.tower_rate:
        groups.append({"params": list(tower.parameters())})
        rates.append(how.tower_rate)
    # a model that was taught before may hold gradients of that
    model.zero_grad(set_to_none=True)
    optimizer = torch.optim.AdamW(groups, lr=how.rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=how.steps, pct_start=0.1)
    kept = None if how.tower_rate else features(tower, shown.pixels)
    rng = random.Random(seed)
    for _ in range(how.steps):
        chosen = rng.sample(range(len(shown.scenes)), how.batch)
        rows = forest([shown.texts[n] for n in chosen])
        states = _states(tower, shown.pixels[chosen]) if kept is None else kept[chosen]
        loss = F.cross_entropy(logits(model, states, rows), rows.labels[rows.labels != -100])
        optimizer.zero_grad()
        loss.backward()
        for group in groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        schedule.step()
    model.zero_grad(set_to_none=True)
    model.eval()


def read(model: Any, shown: Pictures, others: bool = False) -> dict[str, float]:
    """How a model answers the questions about pictures it has not seen, and describes them.

    Args:
        model: an MLLM of this world.
        shown: pictures whose texts are questions and, first, a caption.
        others: show every question the picture before it instead of its own.

    Returns:
        the share of answers that greedy decoding gets exactly right, by kind and over all kinds ("answers", the mean of
        kinds); "nats", the mean negative log-likelihood of the right answers; "captions", the share of facts right.
    """
    states = features(model.model.vision_tower, shown.pixels)
    if others:
        states = states.roll(1, dims=0)
    questions = [[text for text in said if text.kind in miniature.KINDS] for said in shown.texts]
    right: dict[str, list[bool]] = {kind: [] for kind in miniature.KINDS}
    nats = []
    with torch.no_grad():
        for start in range(0, len(questions), 128):
            asked = questions[start : start + 128]
            rows = forest(asked)
            said = logits(model, states[start : start + 128], rows)
            labels = rows.labels[rows.labels != -100]
            # an answer is a word and the end of it
            hit = (said.argmax(dim=1) == labels).view(-1, 2).all(dim=1).tolist()
            nats.append(F.cross_entropy(said, labels, reduction="none").view(-1, 2).sum(dim=1))
            for text, is_right in zip((text for row in asked for text in row), hit, strict=True):
                right[text.kind].append(is_right)
    by_kind = {kind: float(np.mean(hits)) for kind, hits in right.items()}
    return {
        "answers": float(np.mean(list(by_kind.values()))),
        **by_kind,
        "nats": float(torch.cat(nats).mean()),
        "captions": _captions(model, states[:DESCRIBED], shown.scenes[:DESCRIBED]),
    }


def _captions(model: Any, states: torch.Tensor, shown: list[scenes.Scene]) -> float:
    """Facts right in greedy captions."""
    texts = [Text(world.CAPTION_PROMPT, "", "caption")] * len(states)
    backwards = {index: word for word, index in words().items()}
    for _ in range(CAPTION_TOKENS):
        following = []
        with torch.no_grad():
            for start in range(0, len(states), 256):
                rows = forest([[text] for text in texts[start : start + 256]])
                last = torch.zeros_like(rows.labels, dtype=torch.bool)
                ends = (rows.labels != -100).int().cumsum(dim=1).argmax(dim=1)
                last[torch.arange(len(ends)), ends] = True
                asked = Forest(rows.tokens, rows.labels.masked_fill(~last, -100), rows.branch, rows.position)
                following += logits(model, states[start : start + 256], asked).argmax(dim=1).tolist()
        texts = [
            text if text.answer.endswith(END) else Text(text.prompt, f"{text.answer} {backwards[one]}".strip(), "")
            for text, one in zip(texts, following, strict=True)
        ]
        if all(text.answer.endswith(END) for text in texts):
            break
    said = [text.answer.removesuffix(END).strip() for text in texts]
    return float(np.mean([scenes.facts_right(a, s.caption()) for a, s in zip(said, shown, strict=True)]))


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the map's own where nothing is said.

    Attributes:
        encoder_steps, reading_steps: of the encoder's and the language model's lives before they meet.
        first_stage, target: how a first stage and a transplant are taught.
        taught: pictures that either learns from.
        examined: pictures that answers are read on.
    """

    encoder_steps: int = ENCODER_STEPS
    reading_steps: int = 250
    first_stage: Teaching = Teaching(400, 2e-3, 3e-4)
    target: Teaching = Teaching(450, 2e-3, batch=8)
    taught: int = 3000
    examined: int = 800


def first_stage(seed: int, sizes: Sizes, folder: Path) -> Path:
    """Folder of a seed's MLLM after its first stage, made once; the encoder before it lies in "original" beside it.

    Args:
        seed: of encoder, language model, projector, scenes and order.
        sizes: of it.
        folder: of all first stages.
    """
    place = folder / f"seed-{seed}"
    with alone(place):
        if not (place / "stage-1").exists():
            encoder, images = miniature.encoder(seed, sizes.encoder_steps)
            language_model, tokens = miniature.language_model(seed, sizes.reading_steps)
            model, processor = assemble(
                encoder, language_model, -1, tokenizer=tokens, image_processor=images, seed=seed
            )
            taught = pictures(sizes.taught, TAUGHT + 1000 * seed, reasoned=True)
            teach(model, taught, sizes.first_stage, seed)
            with whole_folder(place / "original") as aside:
                encoder.save_pretrained(aside)
            with whole_folder(place / "stage-1") as aside:
                processor.save_pretrained(aside)
                model.save_pretrained(aside)
    return place / "stage-1"


def alone(what: Path) -> FileLock:
    """Holds what several processes make once, while one of them makes it."""
    what.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{what}.lock")


def load(folder: Path) -> tuple[Any, Any]:
    """An MLLM of this world and its processor, as they were saved."""
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def original(stage_1: Path) -> SiglipVisionModel:
    """The encoder as it was before a first stage."""
    return SiglipVisionModel.from_pretrained(stage_1.parent / "original").eval()


def _target_language_model(seed: int, steps: int, folder: Path) -> Any:
    """A language model that no encoder of the map has met, made once."""
    place = folder / f"{seed}-after-{steps}"
    with alone(place):
        if not place.exists():
            with whole_folder(place) as aside:
                miniature.language_model(TARGETS + seed, steps)[0].save_pretrained(aside)
    return AutoModelForCausalLM.from_pretrained(place)


@lru_cache(maxsize=4)
def kept_pictures(count: int, seed: int) -> Pictures:
    """Pictures that many models learn from or are read on."""
    return pictures(count, seed)


def transplanted(
    tower: SiglipVisionModel, sizes: Sizes, folder: Path, target: int, examined_seed: int
) -> dict[str, float]:
    """What a new MLLM reads from a frozen tower: a language model and a projector that never met it.

    The target, what it is taught and in which order are the same for every tower.

    Args:
        tower: a vision encoder of this world.
        sizes: of the teaching.
        folder: of the language models.
        target: which of them.
        examined_seed: of the pictures that are read.

    Returns:
        what `read` gives, and under "blind" the answers to another picture.
    """
    model, _ = transplant(
        tower,
        _target_language_model(target, sizes.reading_steps, folder),
        feature_layer=-1,
        seed=target,
        tokenizer=miniature.tokenizer(),
        image_processor=image_processor(),
    )
    teach(model, kept_pictures(sizes.taught, TRANSPLANTED + 1000 * target), sizes.target, target)
    examined = kept_pictures(sizes.examined, examined_seed)
    return read(model, examined) | {"blind": read(model, examined, others=True)["answers"]}


def image_processor() -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE})
