"""One cell of the map: who wrote the answers, how right the chosen ones are, and the arm that learns from them."""

import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pivot_plugin as pivot
from pivot_plugin.preferences import load as load_pairs
from pivot_plugin.probes import segmentation_probe, subject
from pivot_plugin.quickstart import miniature, scenes, world
from pivot_plugin.rewards import completion_text

from . import pairs as authors
from .calibration import NOISE, PATCH_STEPS, disturbed, taught_on_patches
from .pairs import Asked, Made
from .world import (
    Sizes,
    Teaching,
    alone,
    first_stage,
    image_processor,
    kept_pictures,
    load,
    original,
    read,
    transplanted,
)

PAIR_SCENES, HELD_OUT_SCENES = 7_200_000, 7_400_000
EXAMINED, EXAMINED_TRANSPLANT, PROBED = 7_600_000, 7_700_000, 7_800_000
BETTER_SEED = 990
ARMS: Mapping[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "dpo": {"objective": "dpo"},
    "dpo+sft": {"objective": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    "grpo": {"objective": "grpo"},
    "2 rounds": {"objective": "dpo", "rounds": 2},
}
ONLINE = ("grpo", "2 rounds")
# towers of which it is known which is better, from worse to better, and what all arms begin with
KNOWN = ("disturbed", "original", "patch labels, a tenth", "patch labels")
CONTROLS = (*KNOWN, "stage-1")


@dataclass(frozen=True)
class Cell:
    """What is trained on what, from which first stage.

    Attributes:
        seed: of encoder, language model, first stage, scenes and run.
        author: "own", "oracle", "better" or "reasoned"; "" for the controls that are not trained.
        rightness: share of right facts in the chosen answers, or "best".
        arm: one of `ARMS`, or of `CONTROLS`.
        train: which parts.
        blind: every pair is shown the picture of another.
    """

    seed: int
    author: str
    rightness: float | str
    arm: str
    train: str = "encoder"
    blind: bool = False

    @property
    def condition(self) -> tuple[Any, ...]:
        """All but the seed."""
        return (self.author, self.rightness, self.arm, self.train, self.blind)

    @property
    def name(self) -> str:
        words = (self.author, str(self.rightness), self.arm, self.train, "blind" * self.blind, f"seed {self.seed}")
        return "-".join(word for word in words if word).replace(" ", "-")


@dataclass(frozen=True)
class Plan:
    """How cells are run.

    Attributes:
        sizes: of first stages and transplants.
        steps, batch: of an arm, in pairs, over all its rounds; GRPO takes `online_steps` of twice as many roll-outs.
        pairs, held_out: how many; of `scenes_per_pair` times as many scenes.
        probed: pictures to fit a probe on, and half as many to score it.
        settings: of `optimize`, for all.
    """

    sizes: Sizes = field(default_factory=Sizes)
    steps: int = 100
    online_steps: int = 75
    batch: int = 32
    pairs: int = 800
    held_out: int = 96
    scenes_per_pair: float = 1.5
    probed: int = 600
    settings: Mapping[str, Any] = field(
        default_factory=lambda: {
            "lora": 16,
            "eval_steps": 0.25,
            "saliency": 0,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
    )

    @property
    def better(self) -> Sizes:
        """Of the better model: its encoder and its first stage take three times as long."""
        first = self.sizes.first_stage
        return replace(
            self.sizes,
            encoder_steps=3 * self.sizes.encoder_steps,
            first_stage=Teaching(3 * first.steps, first.rate, first.tower_rate, first.batch),
        )


def facts_right(prompts: Sequence[Any], completions: Sequence[Any], caption: Sequence[str], **_: Any) -> list[float]:
    """The reward of descriptions, see `world.facts_right`."""
    return world.facts_right(prompts, completions, caption)


def end_right(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """The reward of reasoned answers: whether the end is right, whatever the reasoning says."""
    said = [completion_text(completion).rpartition(" so ")[2].strip() for completion in completions]
    return [float(end == right) for end, right in zip(said, answer, strict=True)]


class CellRunner:
    """Cells and what they share, kept in a folder.

    Args:
        folder: of first stages, answers that were drawn, and runs that have not ended.
        plan: how cells are run.
        rates: learning rate of every arm.
    """

    def __init__(self, folder: Path, plan: Plan, rates: Mapping[str, float]) -> None:
        self.folder, self.plan, self.rates = folder, plan, rates

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and measure a cell; the record of it."""
        began = time.process_time()
        stage_1 = first_stage(cell.seed, self.plan.sizes, self.folder / "first")
        record: dict[str, Any] = {"cell": asdict(cell)}
        if cell.arm in KNOWN:
            record["scores"] = self.of_tower(_known(cell, original(stage_1)), cell.seed)
        else:
            model, processor = load(stage_1)
            if cell.arm != "stage-1":
                record |= self.trained(cell, model, processor)
            record["scores"] = self.of_mllm(model) | self.of_tower(model.model.vision_tower, cell.seed)
            if cell.train == "all":
                record["scores"] |= self._swapped(model, load(stage_1)[0])
        return record | {"cpu_seconds": round(time.process_time() - began, 1)}

    def trained(
        self, cell: Cell, model: Any, processor: Any, rate: float | None = None, share: float = 1.0
    ) -> dict[str, Any]:
        """Train a model in place; what there is to say of the rows and the run.

        Args:
            cell: what on, and how.
            model, processor: after a first stage.
            rate: of learning, where it is not the arm's own.
            share: of the steps.
        """
        arm = dict(ARMS[cell.arm])
        online = cell.arm in ONLINE
        steps = self.plan.online_steps if cell.arm == "grpo" else self.plan.steps // arm.get("rounds", 1)
        settings = {
            "learning_rate": self.rates[cell.arm] if rate is None else rate,
            "max_steps": max(1, int(share * steps)),
            "per_device_train_batch_size": self.plan.batch,
            "per_device_eval_batch_size": 4 * self.plan.batch,
            "train": cell.train,
            "seed": cell.seed,
            **self.plan.settings,
        }
        told: dict[str, Any] = {"learning_rate": settings["learning_rate"], "steps": settings["max_steps"]}
        if online:
            rows, held_out = (self._questions(cell, part) for part in ("train", "held out"))
            reward = end_right if cell.author == "reasoned" else facts_right
            arm |= {"rewards": [reward]}
            tokens = authors.REASONED_TOKENS if cell.author == "reasoned" else authors.CAPTION_TOKENS
            if cell.arm == "grpo":
                batch = 2 * self.plan.batch
                arm |= {"num_generations": 8, "per_device_train_batch_size": batch, "max_completion_length": tokens}
                arm |= {"per_device_eval_batch_size": batch}
            else:
                arm |= {"max_new_tokens": tokens, "sampling_batch_size": 64}
        else:
            mine, others = (self.made(cell, part) for part in ("train", "held out"))
            told |= {"pairs": len(mine.rows), "chosen": mine.chosen, "rejected": mine.rejected}
            rows, held_out = load_pairs(mine.rows), load_pairs(others.rows)
        run = self.folder / "runs" / f"{cell.name}-{settings['learning_rate']:g}"
        # of a run that was cut off it is not known with which settings
        shutil.rmtree(run, ignore_errors=True)
        result = pivot.optimize(
            model,
            rows,
            processor=processor,
            eval_prefs=held_out,
            output_dir=run,
            **settings | arm,
        )
        shutil.rmtree(run)
        if result.answers:
            told |= {"chosen": result.answers[0].score_chosen, "rejected": result.answers[0].score_rejected}
        return {"told": told | {"held_out": result.metrics}}

    def made(self, cell: Cell, part: str) -> Made:
        """The pairs of a cell."""
        count = self.plan.pairs if part == "train" else self.plan.held_out
        asked = self._asked(cell, part)
        if cell.author == "oracle":
            rng = random.Random(cell.seed + 17)
            return authors.made(asked, count, lambda row: authors.oracle(row, cell.rightness, rng), cell.blind)

        def pick(row: Asked) -> tuple[authors.Scored, authors.Scored] | None:
            return authors.chosen_and_rejected(
                [authors.scored(row, text) for text in row.drawn if text.strip()], cell.rightness
            )

        return authors.made(self._drawn(cell, part, asked), count, pick, cell.blind)

    def _asked(self, cell: Cell, part: str) -> list[Asked]:
        count, seed = (self.plan.pairs, PAIR_SCENES) if part == "train" else (self.plan.held_out, HELD_OUT_SCENES)
        scenes_asked = int(count * self.plan.scenes_per_pair)
        return authors.asked(scenes_asked, seed + 1000 * cell.seed, cell.author == "reasoned")

    def _drawn(self, cell: Cell, part: str, asked: list[Asked]) -> list[Asked]:
        """Answers of the model after its first stage, or of the better one."""
        if cell.author == "better":
            answering, sizes = BETTER_SEED, self.plan.better
        else:
            answering, sizes = cell.seed, self.plan.sizes
        model, processor = load(first_stage(answering, sizes, self.folder / "first"))
        kind = "reasoned" if cell.author == "reasoned" else "captions"
        folder = self.folder / "answers" / f"{kind}-of-{answering}-seed-{cell.seed}-{part.replace(' ', '-')}"
        tokens = authors.REASONED_TOKENS if kind == "reasoned" else authors.CAPTION_TOKENS
        with alone(folder):
            return authors.drawn(model, processor, asked, tokens, cell.seed, folder)

    def _questions(self, cell: Cell, part: str) -> list[dict[str, Any]]:
        return [
            {
                "images": [row.scene.image],
                "question": row.prompt,
                "answer": row.answer,
                "caption": row.scene.caption(),
            }
            for row in self._asked(cell, part)[: self.plan.pairs if part == "train" else self.plan.held_out]
        ]

    def of_mllm(self, model: Any, examined_seed: int = EXAMINED) -> dict[str, float]:
        """What the MLLM reads, and what is left of it with the picture of another."""
        examined = kept_pictures(self.plan.sizes.examined, examined_seed)
        scores = {f"mllm {name}": value for name, value in read(model, examined).items()}
        blind = read(model, examined, others=True)
        return scores | {f"mllm blind {name}": blind[name] for name in ("answers", "captions")}

    def probed(self, tower: Any, seed: int = PROBED) -> float:
        """Shapes on patches: macro recall of the segmentation probe."""
        result = segmentation_probe(
            subject(tower, image_processor()),
            _masks(self.plan.probed, seed),
            labels="majority",
            classes=1 + len(scenes.SHAPES),
            epochs=10,
            seeds=1,
            cache=False,
        )
        return result.scores["recall"].value

    def of_tower(self, tower: Any, target: int) -> dict[str, float]:
        """By the probe, and in a new MLLM."""
        found = transplanted(tower, self.plan.sizes, self.folder / "targets", target, EXAMINED_TRANSPLANT)
        return {"probe shapes": self.probed(tower), **{f"transplant {name}": found[name] for name in found}}

    def _swapped(self, trained: Any, before: Any) -> dict[str, float]:
        """The MLLM with one part as it was: the trained tower and the old rest, the old tower and the trained rest."""
        examined = kept_pictures(self.plan.sizes.examined, EXAMINED)
        towers = trained.model.vision_tower, before.model.vision_tower
        trained.model.vision_tower, before.model.vision_tower = towers[1], towers[0]
        scores = {}
        for name, model in (("new tower", before), ("new rest", trained)):
            found = read(model, examined)
            scores |= {f"{name} alone {score}": found[score] for score in ("answers", "captions")}
        trained.model.vision_tower, before.model.vision_tower = towers
        return scores


@cache
def _masks(count: int, seed: int) -> Any:
    return miniature.masks(count, count // 2, seed)


def _known(cell: Cell, before: Any) -> Any:
    """A tower whose place in the order is known."""
    if cell.arm == "disturbed":
        return disturbed(before, NOISE, cell.seed)
    steps = {"original": 0, "patch labels, a tenth": PATCH_STEPS // 10, "patch labels": PATCH_STEPS}[cell.arm]
    return taught_on_patches(before, steps, cell.seed) if steps else before
