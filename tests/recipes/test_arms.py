"""Arms: the same pairs, order and steps; the loss alone differs; finished runs are not run again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.recipes.arms import ArmRun, ArmsComparison

from ..conftest import Tiny, picture, row


def pairs(count: int = 24) -> list[dict[str, Any]]:
    return [row(f"{n}?", f"yes {n}", f"no! {n}", picture(20, 20, n)) for n in range(count)]


@pytest.fixture
def short(fast: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return fast | {"output_dir": tmp_path / "arms", "max_steps": 2, "eval_fraction": 0.25}


def test_arms_and_seeds_are_run_on_the_same_pairs_and_kept(llava: Tiny, short: dict[str, Any]) -> None:
    model, processor = llava
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured = []

    def measure(model: Any, processor: Any) -> dict[str, float]:
        measured.append(model)
        return {"size": sum(p.detach().double().sum().item() for p in model.parameters())}

    comparison = pivot.compare_arms(
        model, pairs(), ("sft", "dpo"), 2, processor=processor, measure=measure, learning_rates={"dpo": 1e-3}, **short
    )
    assert [(run.arm, run.seed) for run in comparison.runs] == [
        ("base", 0),
        ("sft", 0),
        ("dpo", 0),
        ("sft", 1),
        ("dpo", 1),
    ]
    assert len(measured) == 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    folder = short["output_dir"]
    first = [json.loads((folder / arm / "seed-0" / "run.json").read_text()) for arm in ("sft", "dpo")]
    assert first[0]["metrics"]["before"] == first[1]["metrics"]["before"]
    assert first[1]["settings"]["learning_rate"] == 1e-3
    for arm in ("sft", "dpo"):
        for seed in (0, 1):
            pivot.load_encoder(folder / arm / f"seed-{seed}" / "encoder")
    kept = json.loads((folder / "arms.json").read_text())
    assert [run["scores"] for run in kept] == [run.scores for run in comparison.runs]
    assert len({run.scores["size"] for run in comparison.runs}) == 5


def test_the_same_pairs_come_in_the_same_order_in_every_arm(
    llava: Tiny, short: dict[str, Any], monkeypatch: Any
) -> None:
    from pivot_plugin.training.pair_trainer import PivotTrainer

    seen: list[list[str]] = []
    compute_loss = PivotTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["forest"].pair_ids)
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PivotTrainer, "compute_loss", spy)
    settings = short | {"eval_strategy": "no"}
    pivot.compare_arms(llava[0], pairs(), ("sft", "dpo", "ipo"), 2, processor=llava[1], **settings)
    runs = [seen[start : start + 2] for start in range(0, len(seen), 2)]
    assert runs[0] == runs[1] == runs[2]
    assert runs[3] == runs[4] == runs[5] != runs[0]


def test_finished_runs_are_not_run_again_and_an_interrupted_one_goes_on(
    llava: Tiny, short: dict[str, Any], monkeypatch: Any
) -> None:
    import pivot_plugin.recipes.arms as arms

    started = []
    optimize = arms.optimize

    def counted(*args: Any, **kwargs: Any) -> Any:
        started.append((kwargs["objective"], kwargs["resume"]))
        if len(started) == 2:
            raise KeyboardInterrupt
        return optimize(*args, **kwargs)

    monkeypatch.setattr(arms, "optimize", counted)
    with pytest.raises(KeyboardInterrupt):
        pivot.compare_arms(llava[0], pairs(), ("sft", "dpo"), 1, processor=llava[1], **short)
    comparison = pivot.compare_arms(llava[0], pairs(), ("sft", "dpo"), 1, processor=llava[1], **short)
    assert started == [("sft", False), ("dpo", False), ("dpo", False)]
    assert [run.arm for run in comparison.runs] == ["base", "sft", "dpo"]
    again = pivot.compare_arms(llava[0], pairs(), ("sft", "dpo"), 1, processor=llava[1], **short)
    assert len(started) == 3
    assert again == comparison
    with pytest.raises(SettingsError, match="had max_steps=2, now it is 3"):
        pivot.compare_arms(llava[0], pairs(), ("sft",), 1, processor=llava[1], **short | {"max_steps": 3})


def test_the_table_has_means_and_spreads() -> None:
    runs = [ArmRun("base", 0, {"x": 0.5})] + [
        ArmRun("dpo", seed, {"x": value}) for seed, value in enumerate((0.1, 0.2, 0.6))
    ]
    comparison = ArmsComparison(runs)
    assert comparison.summary()["dpo"]["x"] == pytest.approx((0.3, 0.2645751))
    assert str(comparison).splitlines() == [
        "| arm | runs | x |",
        "|---|---|---|",
        "| base | 1 | 0.500 |",
        "| dpo | 3 | 0.300 ± 0.265 |",
    ]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"arms": ("sft", "dop")}, SettingsError, "Did you mean dpo"),
        ({"arms": ("grpo",)}, SettingsError, "learns from questions"),
        ({"arms": ("sft", "sft")}, SettingsError, "none of them twice"),
        ({"seeds": 0}, SettingsError, "at least one of each"),
        ({"learning_rates": {"dop": 1}}, SettingsError, r"learning_rates names \['dop'\]"),
        ({"seed": 3}, SettingsError, "seed is given for all arms"),
        ({"prefs": iter(pairs(2))}, DataError, "Arms need the same pairs"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(options: Any, error: Any, said: str, short: Any) -> None:
    with pytest.raises(error, match=said):
        pivot.compare_arms("no-model", **{"prefs": pairs(4), **short, **options})
