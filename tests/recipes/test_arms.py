"""Arms: the same pairs, order and steps; the loss alone differs; finished runs are not run again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.recipes.arms import ArmRun, ArmsComparison
from pivot_plugin.training.pair_trainer import PivotTrainer
from tests.helpers import Tiny, picture, row


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


def test_an_interrupted_run_goes_on_from_its_checkpoint_and_finished_ones_are_not_run_again(
    llava: Tiny, short: dict[str, Any], monkeypatch: Any
) -> None:
    steps: list[tuple[str, int]] = []
    cut: list[tuple[str, int]] = []
    training_step = PivotTrainer.training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = (Path(self.args.output_dir).parent.name, self.state.global_step)
        if step in cut:
            cut.remove(step)
            raise KeyboardInterrupt
        steps.append(step)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(PivotTrainer, "training_step", counted)
    settings = short | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    model, processor = llava
    # without interruption
    straight = settings | {"output_dir": short["output_dir"].with_name("straight")}
    expected = pivot.compare_arms(model, pairs(), ("dpo",), 1, processor=processor, **straight)
    steps.clear()
    cut.append(("dpo", 3))
    with pytest.raises(KeyboardInterrupt):
        pivot.compare_arms(model, pairs(), ("sft", "dpo"), 1, processor=processor, **settings)
    assert steps == [("sft", 0), ("sft", 1), ("sft", 2), ("sft", 3), ("dpo", 0), ("dpo", 1), ("dpo", 2)]
    steps.clear()
    comparison = pivot.compare_arms(model, pairs(), ("sft", "dpo"), 1, processor=processor, **settings)
    assert steps == [("dpo", 2), ("dpo", 3)]
    assert [run.arm for run in comparison.runs] == ["base", "sft", "dpo"]
    assert comparison.runs[-1].scores == pytest.approx(expected.runs[-1].scores, abs=1e-5)
    steps.clear()
    assert pivot.compare_arms(model, pairs(), ("sft", "dpo"), 1, processor=processor, **settings) == comparison
    assert not steps


def size(model: Any, processor: Any) -> dict[str, float]:
    return {"size": sum(p.numel() for p in model.parameters())}


OTHER: list[tuple[dict[str, Any], str]] = [
    ({"max_steps": 3}, "had max_steps=2, now it is 3"),
    ({"learning_rates": {"sft": 1e-3}}, "had learning_rate=0.005, now it is 0.001"),
    ({"prefs": pairs(25)}, "had pairs="),
    ({"eval_fraction": 0}, "had pairs="),
    ({"eval_prefs": pairs(25)[24:], "eval_fraction": 0}, "had pairs="),
    ({"measure": size}, "had measure=None, now it is 'size'"),
]


def test_a_folder_with_runs_of_other_settings_pairs_or_measures_is_refused(llava: Tiny, short: dict[str, Any]) -> None:
    given = {"prefs": pairs(), "arms": ("sft",), "seeds": 1, "processor": llava[1], **short}
    pivot.compare_arms(llava[0], **given)
    for other, said in OTHER:
        with pytest.raises(SettingsError) as error:
            pivot.compare_arms(llava[0], **given | other)
        assert said in str(error.value)
        assert "seed-0" in str(error.value)


def test_a_run_that_no_comparison_began_is_not_taken_for_one(llava: Tiny, short: dict[str, Any]) -> None:
    folder = short["output_dir"] / "sft" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"finished": True, "settings": {}, "metrics": {}}))
    with pytest.raises(SettingsError, match="holds a run that is no stage of this recipe"):
        pivot.compare_arms(llava[0], pairs(), ("sft",), 1, processor=llava[1], **short)


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
