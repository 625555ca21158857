"""What processes do in shares, and what they find together: the numbers of one process by itself."""

import json
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pivot_plugin.data.launch import Launch
from pivot_plugin.training.held_out import looks_of
from tests.helpers.cluster import VARIABLES
from tests.helpers.processes import launched

# two nodes of one process each, with a cache on each; a last batch that is not full, and bad rows
SCRIPT = textwrap.dedent("""
    import json, os, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[3])
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    os.environ |= {
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "PIVOT_CACHE": str(folder.with_name(f"cache-{rank}"))
    }
    from tests.helpers.cluster import on_cpu
    on_cpu()
    import pivot_plugin as pivot
    from pivot_plugin.testing import build
    from pivot_plugin.training.pair_trainer import PivotTrainer
    from tests.helpers import picture, row

    def score(trainer, pairs, original=PivotTrainer.score):
        scores = original(trainer, pairs)
        scored.append([scores.chosen.tolist(), scores.rejected.tolist()])
        return scores

    def reference_of(trainer, model, pairs, positions, size, original=PivotTrainer._reference_of):
        computed.append(len(positions))
        return original(trainer, model, pairs, positions, size)

    scored, computed = [], []
    PivotTrainer.score, PivotTrainer._reference_of = score, reference_of
    model, processor = build("llava")
    pairs = [row(f"number {n}?", f"it is {n % 10}", "no " * (1 + n % 5), picture(40, 50, n // 2)) for n in range(25)]
    pairs[3]["images"], pairs[12]["images"] = [b"no image"], ["nowhere.png"]
    result = pivot.optimize(
        model, pairs, processor=processor, output_dir=folder, lora=4, on_bad_row="skip", eval_prefs=pairs[5:12],
        ood_prefs=pairs[13:18], max_steps=4, per_device_train_batch_size=int(sys.argv[2]),
        per_device_eval_batch_size=int(sys.argv[2]), learning_rate=1.0, optim="sgd", logging_steps=1, eval_steps=1,
        save_steps=1, patience=2, min_delta=10.0, disable_tqdm=True, gradient_checkpointing=False, warmup_steps=0,
        bf16=False, saliency=0, **({} if "ACCELERATE_TORCH_DEVICE" in os.environ else {"use_cpu": True}),
    )
    told = {"scored": scored, "history": result.history, "computed": sum(computed)}
    folder.with_name(f"told-{rank}.json").write_text(json.dumps(told))
""")


def told_by(folder: Path, processes: int, **variables: str) -> list[dict[str, Any]]:
    done = launched(SCRIPT, processes, 4 // processes, folder, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(processes)]


def looked_at(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """What the watch saw, and what followed from it."""
    kept = ("eval_loss", "eval_rewards", "eval_logps", "generalization", "watch/best", "watch/stopped")
    return [{name: value for name, value in log.items() if name.startswith(kept)} for log in history]


def compare(tmp_path: Path, **variables: str) -> None:
    (alone,) = told_by(tmp_path / "one", 1)
    both = told_by(tmp_path / "two", 2, **variables)
    assert looked_at(both[0]["history"]) == looked_at(both[1]["history"])
    assert both[0]["scored"] == both[1]["scored"]
    # the watch decides alike
    expected = looked_at(alone["history"])
    assert "watch/best_step" in expected[-1]
    assert len([log for log in expected if "eval_loss" in log]) >= 3
    for one, several in zip(expected, looked_at(both[0]["history"]), strict=True):
        assert several == pytest.approx(one, rel=1e-4, abs=1e-5)
    for one, several in zip(alone["scored"], both[0]["scored"], strict=True):
        assert [len(side) for side in several] == [len(side) for side in one]
        for side, of_one in zip(several, one, strict=True):
            assert side == pytest.approx(of_one, rel=1e-4, abs=1e-4)
    # each computes a share of the reference, and each node keeps all of it, in one file
    assert alone["computed"] == sum(told["computed"] for told in both) and both[1]["computed"]
    for rank in range(2):
        assert len(list((tmp_path / "two" / f"cache-{rank}" / "reference").glob("*/*.arrow"))) == 1
    for name in ("one", "two"):
        skipped = map(json.loads, (tmp_path / name / "run" / "skipped.jsonl").read_text().splitlines())
        assert [line["row"] for line in skipped] == [3, 12]


@pytest.mark.training
@pytest.mark.timeout(300)
def test_two_nodes_with_a_cache_each_find_what_one_process_finds(tmp_path: Path) -> None:
    compare(tmp_path)


@pytest.mark.training
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_engines_that_divide_a_model_look_at_its_held_out_pairs_in_shares_too(tmp_path: Path, engine: str) -> None:
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    compare(tmp_path, **VARIABLES[engine])


@pytest.mark.parametrize(
    ("rows", "size", "count"), [(17, 4, 1), (17, 4, 2), (5, 2, 3), (2, 4, 3), (64, 8, 4), (9, 1, 2)]
)
def test_every_held_out_pair_counts_once(rows: int, size: int, count: int) -> None:
    of_ranks = [looks_of(rows, size, Launch(rank, count)) for rank in range(count)]
    for together in zip(*of_ranks, strict=True):
        assert len({len(look.positions) for look in together}) == 1 and len(together[0].positions) <= size
        distinct = {position for look in together for position in look.positions}
        assert len(distinct) == together[0].pairs
        # none twice, or all of them in every process
        assert len(distinct) in (sum(len(look.positions) for look in together), len(together[0].positions))
    seen = [{position for look in together for position in look.positions} for together in zip(*of_ranks, strict=True)]
    assert sorted(position for together in seen for position in together) == list(range(rows))
