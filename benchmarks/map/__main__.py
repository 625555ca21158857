"""The map of which pairs make an encoder better: authors, rightness of the chosen answers, arms; resumable by the cell.

    python -m benchmarks.map calibrate         # can the transplant tell better towers from worse?
    python -m benchmarks.map rates             # learning rates, on seeds that are not reported
    python -m benchmarks.map run --minutes 60  # cells in order of importance, a line of results each, and goes on later
    python -m benchmarks.map tables            # of what there is

Results are lines in `results/map-*.jsonl`; first stages, drawn answers and runs lie in the folder `map-runs`.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import Timeout

from pivot_plugin.files import same_settings, write_whole
from pivot_plugin.recipes.tables import cell as shown_cell
from pivot_plugin.recipes.tables import markdown

from .cells import ARMS, CONTROLS, KNOWN, Cell, CellRunner, Plan
from .pairs import BEST, RIGHTNESS
from .tables import MEASURES, SWAPPED, Map, contrast
from .world import alone, first_stage, kept_pictures, load, read

RESULTS = Path(__file__).parent.parent / "results"
SEEDS = (0, 1, 2, 3, 4)
SEARCH_SEEDS = (100, 101)
RATES = {
    "sft": (3e-4, 1e-3, 3e-3),
    "dpo": (1e-4, 3e-4, 1e-3),
    "grpo": (1e-3, 3e-3),
    "dpo+sft": (3e-4, 1e-3),
}
# of the search: half the steps, and pictures of its own
SEARCH_EXAMINED, SEARCH_PROBED = 7_900_000, 7_950_000
PAIR_ARMS = ("sft", "dpo", "dpo+sft")


def cells(seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """All cells of the map, the most important conditions first, every condition with all its seeds."""
    controls = ("stage-1", "original", "patch labels", "patch labels, a tenth")
    conditions: list[dict[str, Any]] = [{"author": "", "rightness": 1.0, "arm": arm} for arm in controls]
    own = {"author": "own", "rightness": BEST}
    conditions += [own | {"arm": arm} for arm in ("sft", "dpo", "dpo+sft", "grpo", "2 rounds")]
    conditions += [own | {"arm": "dpo", "blind": True}]
    conditions += [{"author": "", "rightness": 1.0, "arm": "disturbed"}]
    conditions += [{"author": "oracle", "rightness": 1.0, "arm": arm} for arm in PAIR_ARMS]
    conditions += [own | {"arm": arm, "train": "all"} for arm in ("sft", "dpo")]
    conditions += [{"author": "better", "rightness": BEST, "arm": arm} for arm in PAIR_ARMS]
    conditions += [{"author": "reasoned", "rightness": BEST, "arm": arm} for arm in (*PAIR_ARMS, "grpo")]
    conditions += [own | {"arm": arm, "train": "language_model"} for arm in ("sft", "dpo")]
    conditions += [
        {"author": author, "rightness": rightness, "arm": arm}
        for author in ("own", "oracle", "better", "reasoned")
        for rightness in RIGHTNESS
        for arm in PAIR_ARMS
        if (author, rightness) != ("oracle", 1.0)
    ]
    conditions += [own | {"arm": "sft", "blind": True}]
    return [Cell(seed=seed, **condition) for condition in conditions for seed in seeds]


def lines(path: Path) -> list[dict[str, Any]]:
    """Results that are kept; a line that was cut off as it was written is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def add(path: Path, record: dict[str, Any]) -> None:
    """Keep one more result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a line that was cut off must not swallow the next
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(rounded(record)) + "\n")


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return value


def same_plan(folder: Path, results: Path, plan: Plan) -> None:
    """Make sure that what is kept was made by this plan, and note the plan where nothing is.

    Args:
        folder: of first stages and answers.
        results: of lines.
        plan: of today.

    Raises:
        SettingsError: naming the first setting that differs.
    """
    for path in (folder / "plan.json", results / "map-plan.json"):
        if path.exists():
            remedy = "Give --folder and --results of their own, or go back to that plan."
            same_settings(json.loads(path.read_text()), asdict(plan), f"What {str(path)!r} stands for", remedy)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(asdict(plan), indent=1) + "\n")


def run(runner: CellRunner, path: Path, wanted: Sequence[Cell], seconds: float) -> None:
    """Run the cells that have no line yet, until the time is over; several processes share them.

    Args:
        runner: runs them.
        path: of the lines.
        wanted: cells, in order.
        seconds: after which no other is begun.
    """
    until = time.monotonic() + seconds
    for one in wanted:
        if time.monotonic() > until:
            return
        try:
            with alone(runner.folder / "cells" / one.name).acquire(blocking=False):
                if one not in {Cell(**record["cell"]) for record in lines(path)}:
                    add(path, runner.run(one))
                    print(one.name, flush=True)
        except Timeout:
            # another process is at it
            continue


def calibration_tables(records: Sequence[dict[str, Any]]) -> str:
    """Towers whose order is known, and how small a share of the known gap a difference over seeds can be seen at."""
    found = Map(records)
    known = [Cell(0, "", 1.0, arm).condition for arm in KNOWN]
    base, best = (Cell(0, "", 1.0, arm).condition for arm in ("original", "patch labels"))
    # of towers, and with their own pictures
    measures = {name: text for name, text in MEASURES.items() if not name.startswith("mllm") and "blind" not in name}
    rows = []
    for measure, text in measures.items():
        gap, tenth = (contrast(found.values(one, measure), found.values(base, measure)) for one in (best, known[2]))
        if gap is not None and tenth is not None and gap.mean and tenth.seeds > 1:
            error = tenth.spread / tenth.seeds**0.5
            rows.append([text, gap.shown(gap.p), tenth.shown(tenth.p), f"{error:.3f}", f"{abs(error / gap.mean):.2f}"])
    header = ["measure", "the gap: patch labels", "a tenth of the steps", "standard error", "of the gap"]
    return "\n\n".join([found.table(known, measures), markdown(header, rows)])


def search(runner: CellRunner, path: Path, seeds: Sequence[int]) -> None:
    """Every arm at every rate on own answers: half the steps, seeds and pictures that are not reported."""
    done = {(record["arm"], record["rate"], record["seed"]) for record in lines(path)}
    for seed, (arm, rates) in itertools.product(seeds, {"none": (0.0,), **RATES}.items()):
        for rate in (rate for rate in rates if (arm, rate, seed) not in done):
            model, processor = load(first_stage(seed, runner.plan.sizes, runner.folder / "first"))
            if arm != "none":
                runner.trained(Cell(seed, "own", BEST, arm), model, processor, rate, share=0.5)
            read_on = kept_pictures(runner.plan.sizes.examined, SEARCH_EXAMINED)
            scores = {f"mllm {name}": value for name, value in read(model, read_on).items()}
            scores["probe shapes"] = runner.probed(model.model.vision_tower, SEARCH_PROBED)
            add(path, {"arm": arm, "rate": rate, "seed": seed, "scores": scores})
            print(arm, rate, seed, flush=True)


def best_rates(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of every arm the rate with the best captions of the MLLM; two rounds take that of dpo."""
    best = {}
    for arm in RATES:
        means = {
            rate: sum(values) / len(values)
            for rate in RATES[arm]
            if (values := [r["scores"]["mllm captions"] for r in records if (r["arm"], r["rate"]) == (arm, rate)])
        }
        if means:
            best[arm] = max(means, key=lambda rate: means[rate])
    if "dpo" in best:
        best["2 rounds"] = best["dpo"]
    return best


def search_table(records: Sequence[dict[str, Any]]) -> str:
    """Arms and rates by row; the rate that the map takes in bold."""
    best = best_rates(records)
    measures = ("mllm captions", "mllm answers", "probe shapes")
    rows = []
    for arm, rate in dict.fromkeys((record["arm"], record["rate"]) for record in records):
        scores = [record["scores"] for record in records if (record["arm"], record["rate"]) == (arm, rate)]
        shown = f"**{rate:g}**" if best.get(arm) == rate else f"{rate:g}"
        rows.append([arm, shown, *(shown_cell([one[measure] for one in scores]) for measure in measures)])
    return markdown(["arm", "rate", *(MEASURES[measure] for measure in measures)], rows)


def tables(records: Sequence[dict[str, Any]]) -> str:
    """What is there of the map, as markdown."""
    found = Map(records)
    conditions = list(dict.fromkeys(one.condition for one in cells((0,))))
    towers = [one for one in conditions if one[3] == "encoder"]
    swapped = [one for one in conditions if one[3] != "encoder"]
    stage_1 = ("", 1.0, "stage-1", "encoder", False)
    trained = [one for one in towers if one[2] not in CONTROLS]
    against_sft = [one for one in trained if one[2] != "sft" and not one[4] and one[2] in ARMS]
    parts = [
        "**Means and spreads**",
        found.table(towers),
        "**Facts right in chosen and rejected answers**",
        markdown(
            ["pairs", "chosen, rejected"],
            [
                [" ".join(map(str, one[:2])), found.rightness(one)]
                for one in trained
                if one[2] == "dpo" and not one[4] and found.rightness(one)
            ],
        ),
        "**Less stage 1, seed by seed**",
        found.differences([one for one in towers if one != stage_1], lambda one: stage_1),
        "**Less SFT on the same pairs**",
        found.differences(against_sft, lambda one: (one[0], one[1], "sft", "encoder", False)),
        "**Less the same with the pictures of others**",
        found.differences([one for one in trained if not one[4]], lambda one: (*one[:4], True)),
        "**One part swapped**",
        found.table(swapped, SWAPPED),
    ]
    # a table of which nothing has run yet is its head alone
    ran = [(title, table) for title, table in zip(parts[::2], parts[1::2], strict=True) if table.count("\n") > 1]
    return "\n\n".join(part for both in ran for part in both)


def main(arguments_given: Sequence[str] | None = None, plan: Plan | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.map", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["calibrate", "rates", "run", "tables"])
    parser.add_argument("--folder", type=Path, default=Path("map-runs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=600.0, help="after which no other cell is begun")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the map 0 to 4, of rates 100 and 101")
    parser.add_argument("--only", default="", help="cells whose names hold this, such as own-best")
    arguments = parser.parse_args(arguments_given)
    searched, mapped = (arguments.results / f"map-{name}.jsonl" for name in ("rates", "cells"))
    plan = plan or Plan()
    runner = CellRunner(arguments.folder, plan, best_rates(lines(searched)))
    if arguments.what != "tables":
        same_plan(arguments.folder, arguments.results, plan)
    wanted = [one for one in cells(arguments.seeds or SEEDS) if arguments.only in one.name]
    if arguments.what == "calibrate":
        run(runner, mapped, [one for one in wanted if one.arm in KNOWN], 60 * arguments.minutes)
    elif arguments.what == "rates":
        search(runner, searched, arguments.seeds or SEARCH_SEEDS)
    elif arguments.what == "run":
        if not runner.rates:
            parser.error("There are no learning rates yet: python -m benchmarks.map rates")
        run(runner, mapped, wanted, 60 * arguments.minutes)
    records = lines(mapped)
    print(calibration_tables(records), search_table(lines(searched)), tables(records), sep="\n\n")


if __name__ == "__main__":
    main()
