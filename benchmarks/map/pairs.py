"""The pairs of the map: who wrote the answers, and how right the chosen ones are.

Rightness is the share of a chosen answer's facts that is right (of reasoned answers, of the reasoning's facts). Of
answers that a model drew, the chosen one is that whose share is nearest to what is asked for, the rejected one the
worst; of reasoned answers only the end is checked: chosen ends right, rejected wrong. An oracle's two answers share
their wrong facts and differ in one.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivot_plugin.generation.sampling import sample
from pivot_plugin.quickstart import miniature, scenes, world

from .world import REASONED

AUTHORS = ("own", "oracle", "better", "reasoned")
BEST = "best"
RIGHTNESS = (0.3, 0.6, 1.0)
# of a chosen answer's share of right facts from what is asked for
NEAR = 0.21
DRAWS = 12
REASONED_TOKENS = 12
CAPTION_TOKENS = 9


@dataclass(frozen=True)
class Asked:
    """A question about a scene, and answers that were drawn for it."""

    scene: scenes.Scene
    prompt: str
    answer: str
    drawn: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """An answer, the share of its facts that is right, and whether its end is (None where there is none to check)."""

    text: str
    facts: float
    end: bool | None = None


def asked(count: int, seed: int, reasoned: bool) -> list[Asked]:
    """What is asked about scenes in fog: a description, or one that ends in the answer to a question."""
    rng = random.Random(seed + 7)
    rows = []
    for scene in scenes.render_many(count, seed, style=scenes.FOGGY):
        if reasoned:
            question = scenes.ask_any(scene, rng, miniature.KINDS)
            rows.append(Asked(scene, f"{REASONED} {question.text}", question.answer))
        else:
            rows.append(Asked(scene, world.CAPTION_PROMPT, scene.caption()))
    return rows


def drawn(model: Any, processor: Any, rows: Sequence[Asked], tokens: int, seed: int, folder: Path) -> list[Asked]:
    """The same rows with the answers of a model, kept in a folder."""
    questions = [{"images": [row.scene.image], "question": row.prompt} for row in rows]
    found = sample(
        model,
        questions,
        processor=processor,
        n=DRAWS,
        max_new_tokens=tokens,
        batch_size=64,
        seed=seed,
        output_dir=folder,
    )
    return [
        Asked(row.scene, row.prompt, row.answer, tuple(found[position]["completions"]))
        for position, row in enumerate(rows)
    ]


def scored(row: Asked, text: str) -> Scored:
    """An answer judged by its scene."""
    if not row.prompt.startswith(REASONED):
        return Scored(text, scenes.facts_right(text, row.scene.caption()))
    reasoning, _, end = text.rpartition(" so ")
    return Scored(text, scenes.facts_right(reasoning, row.scene.caption()), end == row.answer)


def chosen_and_rejected(answers: Sequence[Scored], rightness: float | str) -> tuple[Scored, Scored] | None:
    """Of drawn answers the one to prefer and the one to prefer it to; None where there are no such.

    Args:
        answers: to one question.
        rightness: the share of right facts the chosen one should have, or "best" for as much as there is.
    """
    if not answers:
        return None
    checked = answers[0].end is not None
    good = [answer for answer in answers if answer.end] if checked else list(answers)
    bad = [answer for answer in answers if not answer.end] if checked else list(answers)
    if not good or not bad:
        return None
    if rightness == BEST:
        # where the end alone is checked, the first that ends right
        chosen = good[0] if checked else max(good, key=lambda answer: answer.facts)
    else:
        wanted = float(rightness)
        chosen = min(good, key=lambda answer: abs(answer.facts - wanted))
        if abs(chosen.facts - wanted) > NEAR:
            return None
    rejected = bad[0] if checked else min(bad, key=lambda answer: answer.facts)
    return (chosen, rejected) if checked or rejected.facts < chosen.facts else None


def oracle(row: Asked, rightness: float | str, rng: random.Random) -> tuple[Scored, Scored]:
    """An oracle's caption with a share of its facts wrong, and the same with one more right fact changed."""
    facts = [[item.colour, item.shape] for item in row.scene.objects]
    slots = [(item, slot) for item in range(len(facts)) for slot in range(2)]
    rng.shuffle(slots)
    share = 1.0 if rightness == BEST else float(rightness)
    # as many as the share says on average, and one at least, which the rejected answer then lacks
    count = max(1, int(share * len(slots) + rng.random()))
    kept, wrong = slots[:count], slots[count:]
    for slot in wrong:
        _change(facts, slot, rng)
    chosen = _text(facts)
    _change(facts, rng.choice(kept), rng)
    true = row.scene.caption()
    return tuple(Scored(text, scenes.facts_right(text, true)) for text in (chosen, _text(facts)))  # type: ignore[return-value]


def _change(facts: list[list[str]], slot: tuple[int, int], rng: random.Random) -> None:
    item, part = slot
    values = scenes.SHAPES if part else tuple(scenes.COLOURS)
    facts[item][part] = rng.choice([value for value in values if value != facts[item][part]])


def _text(facts: list[list[str]]) -> str:
    return " and ".join(" ".join(pair) for pair in facts)


@dataclass(frozen=True)
class Made:
    """Pairs, and the mean share of right facts of both sides."""

    rows: list[dict[str, Any]]
    chosen: float
    rejected: float


def made(
    rows: Sequence[Asked],
    count: int,
    pick: Callable[[Asked], tuple[Scored, Scored] | None],
    pictures_of_others: bool = False,
) -> Made:
    """The first pairs that there are.

    Args:
        rows: with what was drawn.
        count: of pairs, at most.
        pick: chosen and rejected of a row.
        pictures_of_others: show every pair the picture of the one before it: the blind control.
    """
    picked = [(row, both) for row in rows if (both := pick(row)) is not None][:count]
    images = [row.scene.image for row, _ in picked]
    if pictures_of_others:
        images = images[-1:] + images[:-1]
    pairs = [
        {
            "images": [image],
            "prompt": world.user_message(row.prompt),
            **{
                side: [{"role": "assistant", "content": answer.text}]
                for side, answer in zip(("chosen", "rejected"), both, strict=True)
            },
        }
        for image, (row, both) in zip(images, picked, strict=True)
    ]
    shares = [sum(both[side].facts for _, both in picked) / max(1, len(picked)) for side in (0, 1)]
    return Made(pairs, *shares)
