"""What makers of questions do for an encoder, on the embedded world: pictures alone, no label of anybody.

    python -m benchmarks.makers                        # every cell that is not there yet, then the table
    python -m benchmarks.makers --only same_or_different --seeds 1
    python -m benchmarks.makers --table                # the table of what is there

A cell is a maker, a difficulty, a way to learn and a seed. Its language model first learns, with the tower frozen, in
which words the maker's questions are put (the world has a few dozen words); then the tower alone learns, from roll-outs
(GRPO) or from own answers (DPO). The tower is then put into the world's own model, which was never asked what the maker
asks, and measured: questions about scenes at dusk, with the picture and with another row's, and a probe of its patches.
A transplant puts it under a new projector and language model. Every cell is a line of JSON in `results/makers.jsonl`;
what is there is not run again.

Arms beside the makers: `mixture`, all that gained alone, in equal shares; `blind`, same_or_different with every
question's pictures taken from another question, so that nothing can be learned by looking.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import pivot_plugin as pivot
from pivot_plugin.data.images import ImageAccess
from pivot_plugin.data.layout import text_of
from pivot_plugin.generation.makers import Making, Pictures, make
from pivot_plugin.generation.makers.pictures import Picture
from pivot_plugin.probes import segmentation_probe, subject, vqa
from pivot_plugin.quickstart import scenes, world
from pivot_plugin.rewards import completion_text
from pivot_plugin.rewards.answers import same_normalised, same_order

RESULTS = Path(__file__).parent / "results" / "makers.jsonl"
ALONE = (
    *("rotation", "flip", "jigsaw", "locate", "order"),
    *("same_or_different", "odd_one_out", "planted_error"),
)
# what the world's model can take: three pictures of 64 tokens, and answers of few words
DIFFICULTY = {"jigsaw": 0.3, "locate": 0.2, "odd_one_out": 0.2, "planted_error": 0.6}
WRONG_DIFFICULTIES = (0.0, 0.25, 1.0)
OBJECTIVES = ("grpo", "dpo")
# the world has no word for one
NUMBERS = ("a", *scenes.NUMBERS.values())
WORDS = {
    "0": "no", "90": "left", "180": "of", "270": "yes",
    "unchanged": "no", "mirrored": "left", "upside down": "yes", "turned around": "of",
    "upper left": "a", "upper right": "two", "lower left": "three", "lower right": "four",
    "same": "yes", "different": "no",
    **dict(zip("1234", NUMBERS, strict=False)),
}  # fmt: skip
QUESTION_WORDS = dict(zip(ALONE, ("red", "green", "blue", "yellow", "purple", "white", "circle", "no"), strict=True))
PHOTOS, PHOTO_SEED, PHOTO_SIDE = 600, 500_000, 96
COUNT, WARM_STEPS, STEPS = 512, 120, 48
RATES = {"grpo": 1e-3, "dpo": 3e-4}
SETTINGS: dict[str, Any] = {
    "gradient_checkpointing": False,
    "logging_steps": 1000,
    "save_strategy": "no",
    "eval_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "saliency": 0,
}
WAYS: dict[str, dict[str, Any]] = {
    "grpo": {"num_generations": 8, "per_device_train_batch_size": 64, "max_completion_length": 5},
    "dpo": {"samples": 8, "max_new_tokens": 5, "sampling_batch_size": 32, "per_device_train_batch_size": 16},
}
TEST = 930_000


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        arm: a maker, "mixture", "blind", or "base", in which nothing is trained.
        difficulty: of the maker.
        objective: "grpo" or "dpo", "" for the base.
        seed: of the questions, their order, and the training.
        mixture: makers of the mixture.
    """

    arm: str
    difficulty: float = 0.5
    objective: str = ""
    seed: int = 0
    mixture: tuple[str, ...] = ()

    @property
    def makers(self) -> tuple[str, ...]:
        """Those that make its questions."""
        if self.arm == "mixture":
            return self.mixture
        return ("same_or_different",) if self.arm == "blind" else (self.arm,)


def photos() -> Pictures:
    """Scenes at dusk with their captions, of which no measure shows any."""
    drawn = scenes.render_many(PHOTOS, PHOTO_SEED, dusk=True)
    # so that tiles and details are large enough to be cut
    images = [scene.image.resize((PHOTO_SIDE, PHOTO_SIDE)) for scene in drawn]
    return Pictures(
        [Picture(images, at, f"scene {at}", ImageAccess(), (scene.caption(),)) for at, scene in enumerate(drawn)],
        "scenes",
    )


def questions(cell: Cell, count: int, seed: int) -> list[dict[str, Any]]:
    """Made questions in the world's words."""
    difficulty = {name: DIFFICULTY.get(name, 0.5) for name in cell.makers}
    if len(cell.makers) == 1:
        difficulty = dict.fromkeys(cell.makers, cell.difficulty)
    made = make(photos(), Making(dict.fromkeys(cell.makers, 1.0), difficulty, count, seed))
    rows = [_in_words(made.plain(at)) for at in range(count)]
    if cell.arm == "blind":
        shown = [row["images"] for row in rows]
        random.Random(seed).shuffle(shown)
        rows = [row | {"images": images} for row, images in zip(rows, shown, strict=True)]
    return rows


def _in_words(row: Mapping[str, Any]) -> dict[str, Any]:
    def said(answer: str) -> str:
        return " ".join(WORDS.get(part, part) for part in answer.split(", "))

    about = f"what is {QUESTION_WORDS[row['maker']]}"
    text = text_of(row["prompt"])
    if row["maker"] == "planted_error":
        about = text.split('"')[1] + " is no"
    elif row["maker"] == "order":
        # which of the six questions it is
        first = next(n for n, cue in enumerate(ORDER_CUES) if any(one in text for one in cue))
        about += f" {scenes.SHAPES[first % 5]} {list(scenes.COLOURS)[first // 5]}"
    content = [{"type": "image"}] * len(row["images"]) + [{"type": "text", "text": about}]
    return {
        "images": row["images"],
        "prompt": [{"role": "user", "content": content}],
        "answer": said(row["answer"]),
        "wrong": [said(wrong) for wrong in row["wrong_answers"]],
        "rule": row["rule"],
    }


ORDER_CUES = (
    ("darkest", "down the most"), ("brightest", "down the least"), ("smallest",), ("largest",),
    ("nearest", "least noise"), ("furthest", "most noise"),
)  # fmt: skip


def right(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], rule: Sequence[str], **_: Any
) -> list[float]:
    """The rules of the makers, on the world's words."""
    digits = {word: str(number) for number, word in enumerate(NUMBERS, 1)}

    def judged(text: str, expected: str, by: str) -> float:
        if by != "permutation":
            return same_normalised(text, expected)
        numbers = [" ".join(digits.get(word, word) for word in one.split()) for one in (text, expected)]
        return same_order(*numbers)

    said = [completion_text(completion) for completion in completions]
    return [judged(*row) for row in zip(said, answer, rule, strict=True)]


def warm(cell: Cell, folder: Path) -> PreTrainedModel:
    """The world's model after its language model has learnt how the makers ask; its tower is the world's."""
    rows = [
        {"images": row["images"], "prompt": row["prompt"], "chosen": row["answer"], "rejected": row["wrong"][0]}
        for row in questions(cell, COUNT * 2, 7_000 + cell.seed)
    ]
    return pivot.optimize(
        world.model(),
        rows,
        processor=world.processor(),
        objective="sft",
        train="language_model",
        lora=None,
        eval_fraction=0,
        learning_rate=1e-3,
        max_steps=WARM_STEPS,
        per_device_train_batch_size=32,
        output_dir=folder,
        seed=cell.seed,
        **SETTINGS,
    ).model


def run(cell: Cell, transplant: bool) -> dict[str, Any]:
    """One cell, measured."""
    began = time.process_time()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tower = world.model()
        if cell.arm != "base":
            model = warm(cell, Path(folder) / "warm")
            held = questions(cell, 256, 9_000 + cell.seed)
            found["made before"] = _made_accuracy(model, held)
            result = pivot.optimize(
                model,
                questions(cell, COUNT, 8_000 + cell.seed),
                processor=world.processor(),
                objective=cell.objective,
                rewards=[right],
                lora=16,
                eval_fraction=0,
                learning_rate=RATES[cell.objective],
                max_steps=STEPS,
                output_dir=Path(folder) / "run",
                seed=cell.seed,
                **SETTINGS | WAYS[cell.objective],
            )
            found["made after"] = _made_accuracy(result.model, held)
            found["tower moved"] = statistics.fmean(result.weight_change.values())
            _tower(tower).load_state_dict(_tower(result.model).state_dict())
        found |= measure(tower)
        if transplant:
            found["transplanted vqa"] = transplanted(tower, cell.seed, Path(folder) / "new")
    return asdict(cell) | {"scores": found, "seconds": round(time.process_time() - began)}


def _tower(model: PreTrainedModel) -> torch.nn.Module:
    module: torch.nn.Module = model.get_encoder(modality="image")
    return module


def _made_accuracy(model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> float:
    asked = subject(model, world.processor())
    score: float = (
        vqa(asked, list(rows), rewards=[right], max_new_tokens=5, batch_size=64, without=()).scores["all"].value
    )
    return score


def measure(model: PreTrainedModel) -> dict[str, float]:
    """Questions never asked in training, with the picture and with another row's, and what patches tell."""
    asked = subject(model, world.processor())
    rows = world.question_rows(world.questions(500, seed=TEST))
    answers = vqa(asked, rows, **world.VQA_OPTIONS, without=("other",)).scores
    data = (world.segmented(250, 910_000), world.segmented(250, 920_000))
    patches = segmentation_probe(asked, data, labels="majority", classes=1 + len(scenes.SHAPES), cache=False)
    return {
        "vqa": answers["all"].value,
        "vqa blind": answers["all/other-picture"].value,
        "segmentation mIoU": patches.scores["miou"].value,
    }


def transplanted(model: PreTrainedModel, seed: int, folder: Path) -> float:
    """Questions answered by a new projector and language model over the tower, which stays as it is."""
    fresh = world.untrained_model(seed + 1)
    _tower(fresh).load_state_dict(_tower(model).state_dict())
    rows = []
    for number, (scene, question) in enumerate(world.questions(4000, seed=600_000 + seed)):
        described = number % 2 == 0
        asked, answer = (world.CAPTION_PROMPT, scene.caption()) if described else (question.text, question.answer)
        rows.append({"image": scene.image, "question": asked, "answer": answer})
    result = pivot.instruct(
        fresh,
        rows,
        processor=world.processor(),
        train="projector+language_model",
        lora=None,
        eval_fraction=0,
        learning_rate=2e-3,
        max_steps=300,
        per_device_train_batch_size=32,
        output_dir=folder,
        seed=seed,
        **{name: value for name, value in SETTINGS.items() if name != "saliency"},
    )
    return world.vqa_accuracy(result.model, world.processor(), world.questions(500, seed=TEST))["all"]


def cells(seeds: int, mixture: Sequence[str]) -> Iterator[Cell]:
    """All of them, the first seed of every arm before the second of any."""
    for seed in range(seeds):
        yield Cell("base", seed=seed)
        for objective in OBJECTIVES:
            for maker in ALONE:
                yield Cell(maker, DIFFICULTY.get(maker, 0.5), objective, seed)
            yield Cell("blind", 0.5, objective, seed)
            if mixture:
                yield Cell("mixture", 0.5, objective, seed, tuple(mixture))
        for difficulty in WRONG_DIFFICULTIES:
            yield Cell("same_or_different", difficulty, "grpo", seed)


def done() -> list[dict[str, Any]]:
    """Cells that have been run."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(str(record[name]) for name in ("arm", "difficulty", "objective", "seed"))


def gained(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Makers whose towers had a better probe than the base's, alone and by GRPO."""
    base = [record["scores"]["segmentation mIoU"] for record in records if record["arm"] == "base"]
    alone: dict[str, list[float]] = {}
    for record in records:
        usual = record["difficulty"] == DIFFICULTY.get(record["arm"], 0.5)
        if record["arm"] in ALONE and record["objective"] == "grpo" and usual:
            alone.setdefault(record["arm"], []).append(record["scores"]["segmentation mIoU"])
    if not base or len(alone) < len(ALONE):
        return []
    return [arm for arm, values in alone.items() if statistics.fmean(values) > statistics.fmean(base)]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds, with the spread where there are several."""
    names = list(dict.fromkeys(name for record in records for name in record["scores"]))
    lines = [f"| arm | difficulty | learns by | seeds | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(_key(record)[:3], []).append(record)
    for (arm, difficulty, objective), own in sorted(groups.items()):
        cells_of = []
        for name in names:
            values = [record["scores"][name] for record in own if name in record["scores"]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells_of.append(f"{statistics.fmean(values):.3f}{spread}" if values else "")
        lines.append(
            f"| {arm} | {difficulty if objective else ''} | {objective} | {len(own)} | {' | '.join(cells_of)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="One arm.")
    parser.add_argument("--no-transplant", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    finished = {_key(record) for record in done()}
    RESULTS.parent.mkdir(exist_ok=True)
    for round_number in range(0 if arguments.table else 2):
        # the mixture is known when every maker has been alone
        for cell in cells(arguments.seeds, gained(done()) if round_number else ()):
            if _key(asdict(cell)) in finished or (arguments.only and cell.arm != arguments.only):
                continue
            record = run(cell, not arguments.no_transplant)
            finished.add(_key(record))
            with RESULTS.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)
    print(table(done()))


if __name__ == "__main__":
    main()
