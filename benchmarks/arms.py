"""The arms of the paper on the embedded world: untouched base, SFT, DPO, MPO, SPECS on the same pairs, and GRPO.

    python -m benchmarks.arms                  # learning rates, then three seeds: about an hour on two cores
    python -m benchmarks.arms --only search    # the table of learning rates alone

Every arm's learning rate is chosen on validation questions (mean VQA accuracy of two seeds that are not reported, half
the steps), then the arm runs with it on three other seeds and is measured on test questions, test pairs and scenes that
neither training nor the choice has seen. Same start, pairs, order and steps for all; LoRA of rank 16 on the tower. GRPO
stands beside them: it learns from questions and its own answers, for half the steps. Runs that are finished are not run
again (folder `arms-runs`).
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pivot_plugin import compare_arms, optimize
from pivot_plugin.preferences import PairDataset
from pivot_plugin.probes import segmentation_probe, subject
from pivot_plugin.quickstart import scenes, world
from pivot_plugin.recipes.arms import ArmRun, ArmsComparison

RESULTS = Path(__file__).parent / "results"
ARMS = ("sft", "dpo", "mpo", "specs")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SEARCH_SEEDS = (100, 101)
STEADY_ONLINE_RATE = 1e-3
PAIRS, STEPS, BATCH = 5000, 500, 16
VALIDATION, TEST = 940_000, 930_000
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "gradient_checkpointing": False,
    "logging_steps": 50,
    "save_strategy": "no",
    "eval_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
# eight roll-outs of eight questions a step
ONLINE: dict[str, Any] = {
    "rewards": "accuracy",
    "num_generations": 8,
    "per_device_train_batch_size": 64,
    "max_completion_length": 4,
}


def _questions() -> list[dict[str, Any]]:
    """Questions with answers about scenes at dusk, as many as there are among the pairs."""
    return [
        {"images": [scene.image], "question": question.text, "answer": question.answer}
        for scene, question in world.questions(PAIRS // 2, seed=20_000)
    ]


def vqa(model: Any, processor: Any, seed: int, size: int = 1000) -> dict[str, float]:
    """VQA accuracy on questions of a seed, all and by kind."""
    return world.vqa_accuracy(model, processor, world.questions(size, seed=seed))


def measure(model: Any, processor: Any) -> Mapping[str, float]:
    """What is reported of a model: test VQA by kind, and what the tower's features tell of each patch."""
    data = (world.segmented(500, 910_000), world.segmented(500, 920_000))
    patches = segmentation_probe(
        subject(model, processor), data, labels="majority", classes=1 + len(scenes.SHAPES), cache=False
    )
    answers = {f"vqa {kind}": value for kind, value in vqa(model, processor, TEST).items()}
    return answers | {"segmentation mIoU": patches.scores["miou"].value}


def search(pairs: PairDataset, folder: Path) -> list[dict[str, Any]]:
    """Validation VQA accuracy of every arm at every learning rate, mean over the search's seeds."""
    rows = []
    for arm in (*ARMS, "grpo"):
        for rate in RATES:
            scores = [
                _searched(pairs, folder / "search" / f"{arm}-{rate:g}-{seed}", arm, rate, seed) for seed in SEARCH_SEEDS
            ]
            mean = statistics.fmean(scores)
            rows.append({"arm": arm, "learning_rate": rate, "validation_vqa": round(mean, 4), "seeds": scores})
            print(rows[-1], flush=True)
    return rows


def _searched(pairs: PairDataset, folder: Path, arm: str, rate: float, seed: int) -> float:
    record = folder.with_suffix(folder.suffix + ".json")
    if not record.exists():
        model, processor = world.model(), world.processor()
        result = optimize(
            model,
            _questions() if arm == "grpo" else pairs,
            processor=processor,
            objective=arm,
            eval_fraction=0,
            output_dir=folder,
            learning_rate=rate,
            max_steps=STEPS // 2,
            seed=seed,
            resume=folder.exists(),
            **SETTINGS | (ONLINE if arm == "grpo" else {}),
        )
        record.write_text(json.dumps(vqa(result.model, processor, VALIDATION)["all"]))
    score: float = json.loads(record.read_text())
    return score


def best_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        arm: max((row for row in rows if row["arm"] == arm), key=lambda row: row["validation_vqa"])["learning_rate"]
        for arm in dict.fromkeys(row["arm"] for row in rows)
    }


def search_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"| arm | {' | '.join(f'{rate:g}' for rate in RATES)} |", "|---" * (len(RATES) + 1) + "|"]
    best = best_rates(rows)
    for arm in best:
        values = {row["learning_rate"]: row["validation_vqa"] for row in rows if row["arm"] == arm}
        cells = [f"**{values[rate]:.3f}**" if rate == best[arm] else f"{values[rate]:.3f}" for rate in RATES]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _online(folder: Path, rate: float, seed: int) -> ArmRun:
    """GRPO with one seed, on questions instead of pairs: half the steps, each of which costs more."""
    record = folder.with_suffix(".json")
    if not record.exists():
        model, processor = world.model(), world.processor()
        result = optimize(
            model,
            _questions(),
            processor=processor,
            objective="grpo",
            eval_fraction=0,
            output_dir=folder,
            learning_rate=rate,
            max_steps=STEPS // 2,
            seed=seed,
            resume=folder.exists(),
            **SETTINGS | ONLINE,
        )
        record.write_text(json.dumps(dict(measure(result.model, processor))))
    return ArmRun(f"grpo ({rate:g})", seed, json.loads(record.read_text()), str(folder))


def paired_differences(comparison: ArmsComparison, name: str, first: str, second: str) -> tuple[float, float]:
    """Mean and standard error of the difference of two arms, seed by seed."""
    scores = {(run.arm, run.seed): run.scores[name] for run in comparison.runs}
    seeds = sorted({run.seed for run in comparison.runs if run.arm == first})
    differences = [scores[first, seed] - scores[second, seed] for seed in seeds]
    return statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("arms-runs"))
    parser.add_argument("--only", choices=["search"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pairs = PairDataset(world.pairs(PAIRS)).verify()
    arguments.folder.mkdir(exist_ok=True)
    rows = search(pairs, arguments.folder)
    rates = best_rates(rows)
    print(search_table(rows))
    if arguments.only:
        return
    # the second rate is as good in the search, and further from where it collapses
    online = [
        _online(arguments.folder / "grpo" / f"{rate:g}" / f"seed-{seed}", rate, seed)
        for rate in (rates["grpo"], STEADY_ONLINE_RATE)
        for seed in range(arguments.seeds)
    ]
    comparison = compare_arms(
        world.model(),
        pairs,
        ARMS,
        arguments.seeds,
        processor=world.processor(),
        eval_prefs=world.pairs(400, seed=77),
        output_dir=arguments.folder / "arms",
        learning_rates={arm: rates[arm] for arm in ARMS},
        measure=measure,
        max_steps=STEPS,
        **SETTINGS,
    )
    comparison.runs += online
    print(comparison)
    differences = {}
    for arm in dict.fromkeys([*ARMS[1:], *(run.arm for run in online)]):
        mean, error = paired_differences(comparison, "vqa all", arm, "sft")
        differences[f"{arm} - sft"] = {"vqa all": mean, "standard error": error}
        print(f"{arm} - sft: vqa {mean:+.3f}, standard error {error:.3f} over {arguments.seeds} seeds")
    RESULTS.mkdir(exist_ok=True)
    record = {
        "search": rows,
        "learning_rates": rates,
        "runs": [_plain(run) for run in comparison.runs],
        "differences": differences,
    }
    (RESULTS / "arms.json").write_text(json.dumps(record, indent=1) + "\n")


def _plain(run: ArmRun) -> dict[str, Any]:
    return {"arm": run.arm, "seed": run.seed, "scores": {name: round(value, 4) for name, value in run.scores.items()}}


if __name__ == "__main__":
    main()
