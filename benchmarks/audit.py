"""Does the audit tell what pairs will do? Kinds of pairs of the embedded world, audited, then trained on by DPO.

    python -m benchmarks.audit --seeds 1

Dusk, as in the demonstration: own answers ranked by the facts they have right; an oracle's captions against the same
with one fact changed; captions against the same without "and" (format alone); and "yes" to what is there against "no"
(which can be said without looking). The same count of pairs, steps and rate for each. Seven minutes a seed on a core.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pivot_plugin as pivot
from pivot_plugin.generation.own_answers import OwnAnswers, pairs_of_own_answers
from pivot_plugin.preferences import audit, load
from pivot_plugin.probes import ProbeTask
from pivot_plugin.quickstart import demo, scenes, world

PAIRS, AUDITED, STEPS, RATE = 1500, 200, 300, 3e-4


def oracle(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        _pair(scene, world.CAPTION_PROMPT, scene.caption(), scenes.wrong_caption(scene, rng)) for scene in _dusk(seed)
    ]


def format_only(seed: int) -> list[dict[str, Any]]:
    return [
        _pair(scene, world.CAPTION_PROMPT, scene.caption(), scene.caption().replace(" and ", " "))
        for scene in _dusk(seed)
        if len(scene.objects) > 1
    ]


def guessable(seed: int) -> list[dict[str, Any]]:
    rows = []
    for scene in _dusk(seed):
        item = scene.objects[0]
        rows.append(_pair(scene, f"is there a {item.colour} {item.shape}", "yes", "no"))
    return rows


def own(seed: int) -> list[dict[str, Any]]:
    settings = OwnAnswers(max_new_tokens=world.CAPTION_TOKENS, sampling_batch_size=64)
    questions = pivot.preferences.load_questions(world.caption_questions(PAIRS, seed=500_000 + seed))
    pairs, _ = pairs_of_own_answers(
        world.model(), world.processor(), questions, [world.facts_right], settings, seed=seed
    )
    return [pairs[position] for position in range(len(pairs))]


KINDS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "own answers": own,
    "oracle, one fact changed": oracle,
    "format alone": format_only,
    "can be guessed": guessable,
}
PREDICTED = (
    "told apart by words",
    "told apart",
    "guessed without the picture",
    "median share of the picture",
    "median gap of the chosen answer",
)
MEASURED = {
    "captions": "all",
    "questions": "all",
    "questions needing the picture": "all/needs-picture",
    "patch mIoU": "miou",
}


def _dusk(seed: int) -> list[scenes.Scene]:
    return scenes.render_many(PAIRS, 500_000 + seed, dusk=True)


def _pair(scene: scenes.Scene, question: str, chosen: str, rejected: str) -> dict[str, Any]:
    answers = {"chosen": chosen, "rejected": rejected}
    return {
        "images": [scene.image],
        "prompt": world.user_message(question),
        **{side: [{"role": "assistant", "content": text}] for side, text in answers.items()},
    }


def measured(model: Any) -> list[float]:
    """Captions, questions, questions that need the picture, patch mIoU."""
    probes = {name: task for name, task in demo.examination().items() if name != "saliency"}
    assert all(isinstance(task, ProbeTask) for task in probes.values())
    results = pivot.compare({"it": model}, probes, processor=world.processor()).results["it"]
    probe_of = {"captions": "captions", "patch mIoU": "segmentation"}
    return [results[probe_of.get(name, "questions")].scores[score].value for name, score in MEASURED.items()]


def run(seeds: int) -> None:
    """Print the table: of each kind what the audit says, and what DPO on it does."""
    before = measured(world.model())
    print(f"| pairs | {' | '.join(PREDICTED)} | {' | '.join(MEASURED)} |")
    print("|---" * (1 + len(PREDICTED) + len(MEASURED)) + "|")
    print(f"| before |{' |' * len(PREDICTED)} {' | '.join(f'{value:.3f}' for value in before)} |", flush=True)
    for kind, make in KINDS.items():
        said, done = [], []
        for seed in range(seeds):
            rows = make(seed)
            summary = audit(
                world.model(), rows[:AUDITED], processor=world.processor(), max_new_tokens=world.CAPTION_TOKENS
            ).summary()
            said.append([summary[name] for name in PREDICTED])
            with tempfile.TemporaryDirectory() as folder:
                result = pivot.optimize(
                    world.model(),
                    load(rows),
                    processor=world.processor(),
                    output_dir=Path(folder) / "run",
                    max_steps=STEPS,
                    per_device_train_batch_size=16,
                    learning_rate=RATE,
                    seed=seed,
                    eval_fraction=0,
                    saliency=0,
                    gradient_checkpointing=False,
                    save_strategy="no",
                    logging_strategy="no",
                    disable_tqdm=True,
                )
            done.append(measured(result.model))
        cells = [f"{value:.2f}" for value in np.mean(said, axis=0)]
        gains = np.array(done) - before
        spread = np.ptp(gains, axis=0) / 2
        cells += [
            f"{mean:+.3f}" + (f" \u00b1 {gap:.3f}" if seeds > 1 else "")
            for mean, gap in zip(gains.mean(axis=0), spread, strict=True)
        ]
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    run(**vars(parser.parse_args()))
