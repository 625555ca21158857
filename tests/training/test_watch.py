"""The watch: looks at the held-out rows, the best checkpoint, the early stop, the collapse, and what is not finite."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

import pivot_plugin as pivot
from pivot_plugin.errors import SettingsError, TrainingError
from pivot_plugin.training.looks import Patience, beyond_noise
from pivot_plugin.training.watch import Watch
from tests.helpers import Tiny, picture, row
from tests.helpers.training import settings


def pairs(count: int = 40) -> list[dict[str, Any]]:
    return [row(f"{n}?", f"yes {n}", f"no! {n}", picture(20, 20, n)) for n in range(count)]


def watched(fast: dict[str, Any], **more: Any) -> dict[str, Any]:
    settings = {name: value for name, value in fast.items() if name != "save_strategy"}
    return settings | {"max_steps": 10, "eval_fraction": 0.25, **more}


def declining(fast: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Held-out pairs that say the opposite of those to train on: the better the run, the worse its evaluations."""
    turned = [one | {"chosen": one["rejected"], "rejected": one["chosen"]} for one in pairs(10)]
    settings = {"eval_prefs": turned, "learning_rate": 0.1, "lr_scheduler_type": "constant", **more}
    return watched(fast, per_device_eval_batch_size=5, **settings)


def evaluations(result: Any, name: str = "eval_loss") -> list[float]:
    return [entry[name] for entry in result.history if name in entry]


def test_held_out_pairs_are_looked_at_ten_times_and_the_best_is_kept(llava: Tiny, fast: Any) -> None:
    result = pivot.optimize(llava[0], pairs(), processor=llava[1], **watched(fast, patience=None))
    losses = evaluations(result)
    # and once before the first step
    assert len(losses) == 1 + 10
    best = int(evaluations(result, "watch/best_step")[-1])
    assert losses[best] == min(losses)
    for name in ("eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen", "watch/chosen_logps_change"):
        assert len(evaluations(result, name)) >= 10


def test_the_model_that_comes_back_is_the_best_one(llava: Tiny, fast: Any) -> None:
    """A run that gets worse: its metrics are those of its best checkpoint, not of its end."""
    options = declining(fast, patience=None)
    result = pivot.optimize(llava[0], pairs(), processor=llava[1], **options)
    best = int(evaluations(result, "watch/best_step")[-1])
    chosen = evaluations(result, "eval_logps/chosen")
    losses = evaluations(result)
    assert losses[best] < losses[-1]
    assert result.metrics["after"]["logps_chosen"] == pytest.approx(chosen[best], rel=1e-4)
    assert result.metrics["after"]["logps_chosen"] != pytest.approx(chosen[-1], rel=1e-4)


def test_the_start_is_kept_where_no_look_is_better_and_the_verdict_says_so_first(llava: Tiny, fast: Any) -> None:
    model = llava[0]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = pivot.optimize(model, pairs(), processor=llava[1], **declining(fast, patience=None))
    assert evaluations(result, "watch/best_step")[-1] == 0
    assert all(torch.equal(before[name], weight) for name, weight in result.model.state_dict().items())
    assert result.metrics["after"] == pytest.approx(result.metrics["before"], abs=1e-4)
    assert (result.verdict.outcome, result.verdict.kept, result.verdict.moved) == ("no change", 0, False)
    assert result.verdict.sentences()[0].startswith("The encoder is bit-equal to the one before: no look")
    assert "Nothing was learnt" in (result.output_dir / "encoder" / "README.md").read_text()
    assert "made better" not in (result.output_dir / "encoder" / "README.md").read_text()
    assert len(repr(result).splitlines()) == 5 and "Nothing was learnt" in result._repr_html_()


def test_looks_begin_behind_the_warm_up(llava: Tiny, fast: Any) -> None:
    result = pivot.optimize(llava[0], pairs(), processor=llava[1], **watched(fast, warmup_steps=3, patience=None))
    looked = [entry["step"] for entry in result.history if "eval_loss" in entry]
    assert looked == [0, 4, 5, 6, 7, 8, 9, 10]


def test_a_look_within_the_noise_of_the_rows_does_not_count_against_patience() -> None:
    args = TrainingArguments(use_cpu=True, metric_for_best_model="loss", greater_is_better=False)
    patience, state, rows = Patience(1), TrainerState(), np.random.default_rng(0)
    start = rows.normal(size=100)
    fallen = start - 0.1
    noisy = start - rows.normal(loc=0.01, size=100)
    # by hand: one-sided, 95 %
    assert (start - noisy).mean() < 1.645 * (start - noisy).std(ddof=1) / 10
    for values, loss, counted in ((start, 1.0, 0), (noisy, 1.01, 0), (fallen, 1.1, 1)):
        patience.rows = values
        patience.check_metric_value(args, state, TrainerControl(), loss)
        assert patience.early_stopping_patience_counter == counted
        state.best_metric = min(loss, state.best_metric or loss)
    again = Patience.from_state(patience.state())
    assert again.early_stopping_patience_counter == 1 and again.best_rows == pytest.approx(start, abs=1e-6)
    # three rows tell nothing apart, so that the metric alone decides
    assert beyond_noise(start[:3], fallen[:3]) is None


def test_a_run_that_declines_stops_early_and_says_so(llava: Tiny, fast: Any, caplog: pytest.LogCaptureFixture) -> None:
    options = declining(fast, patience=2, max_steps=40, eval_steps=1)
    with caplog.at_level(logging.WARNING):
        result = pivot.optimize(llava[0], pairs(), processor=llava[1], **options)
    stopped = evaluations(result, "watch/stopped_early_at")[-1]
    assert stopped < 40
    assert f"Stopped at step {stopped} of 40" in caplog.text and "--set patience=none" in caplog.text
    assert result.verdict.stopped_early and "patience=None" in str(result.verdict)


def test_a_fall_of_the_chosen_answers_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    watch, state = Watch(beta=0.1), TrainerState()
    with caplog.at_level(logging.WARNING):
        for step, (now, change) in enumerate(
            [(-20.0, 0.0), (-20.9, -0.9), (-21.9, -1.9), (-22.1, -2.1), (-30.0, -10.0)]
        ):
            state.global_step = step
            logs = {"rewards/chosen": 0.1 * change, "logps/chosen": now}
            state.log_history.append(dict(logs))
            watch.on_log(TrainingArguments(use_cpu=True), state, TrainerControl(), logs)
    assert [entry["watch/chosen_logps_change"] for entry in state.log_history] == pytest.approx(
        [0, -0.9, -1.9, -2.1, -10]
    )
    # more than a nat, and more than a tenth
    assert [entry.get("watch/collapse") for entry in state.log_history] == [None, None, None, pytest.approx(-2.1), None]
    assert caplog.text.count("fell from -20.00 to -22.10") == 1


def test_a_loss_that_pushes_both_answers_down_is_followed(llava: Tiny, fast: Any) -> None:
    options = watched(fast, objective="apo_down", learning_rate=1.0, max_steps=16, eval_fraction=0)
    result = pivot.optimize(llava[0], pairs(), processor=llava[1], **options)
    assert min(evaluations(result, "watch/chosen_logps_change")) < -1


def test_the_change_is_that_of_the_log_probabilities(llava: Tiny, fast: Any) -> None:
    result = pivot.optimize(
        llava[0], pairs(), processor=llava[1], **watched(fast, patience=None, per_device_eval_batch_size=5)
    )
    change = evaluations(result, "watch/chosen_logps_change")
    now = evaluations(result, "eval_logps/chosen")
    assert now[-1] - change[-1] == pytest.approx(result.metrics["before"]["logps_chosen"], rel=1e-3)


def test_own_settings_of_evaluation_are_respected(llava: Tiny, fast: Any) -> None:
    off = pivot.optimize(llava[0], pairs(), processor=llava[1], **watched(fast, eval_strategy="no"))
    assert not evaluations(off)
    assert off.metrics.keys() == {"before", "after"}


def test_a_set_too_small_to_hold_out_is_not_watched(llava: Tiny, fast: Any) -> None:
    same = picture(20, 20, 1)
    rows = [row(f"{n}?", "yes", "no", same) for n in range(8)]
    result = pivot.optimize(llava[0], rows, processor=llava[1], **watched(fast))
    assert not evaluations(result)
    assert result.metrics == {}


@pytest.mark.training
def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_rows(llava: Tiny, tmp_path: Path) -> None:
    model, processor = llava
    rows = [one | {"id": f"pair-{number}"} for number, one in enumerate(pairs(4))]

    trainer = pivot.PivotTrainer(
        model, pivot.PivotConfig(**settings(tmp_path, max_steps=2)), rows, processing_class=processor, lora=4
    )
    poisoned = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    poisoned.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=r"The gradient became nan at step 0 on (pair-\d, ){3}pair-\d"):
        trainer.train()


def test_patience_below_one_is_refused(llava: Tiny, fast: Any) -> None:
    with pytest.raises(SettingsError, match="patience is 0"):
        pivot.optimize(llava[0], pairs(4), processor=llava[1], **watched(fast, patience=0))


def test_other_distributions_are_scored_beside(llava: Tiny, fast: Any, tmp_path: Any) -> None:
    other = {"dusk": [row(f"{n}?", "ja", "nein", picture(20, 20, 100 + n)) for n in range(6)], "text": pairs(4)}
    result = pivot.optimize(llava[0], pairs(), processor=llava[1], ood_prefs=other, **watched(fast, patience=None))
    entries = [entry for entry in result.history if "generalization/factor" in entry]
    assert [entry["step"] for entry in entries] == list(range(11))
    assert entries[0]["generalization/factor"] == 0
    for entry in entries:
        mean = (entry["generalization/out/dusk"] + entry["generalization/out/text"]) / 2
        assert entry["generalization/out"] == pytest.approx(mean)
    from pivot_plugin.probes import generalization_factor, plot_generalization

    again = generalization_factor(
        *([entry[name] for entry in entries] for name in ("generalization/in", "generalization/out"))
    )
    assert [entry["generalization/factor"] for entry in entries] == pytest.approx(again.tolist())
    assert plot_generalization(result.history, tmp_path / "plot.png").stat().st_size > 5000
    with pytest.raises(SettingsError, match="no row is held out to compare with"):
        pivot.optimize(
            llava[0],
            pairs(),
            processor=llava[1],
            ood_prefs=other,
            **watched(fast, eval_fraction=0) | {"output_dir": tmp_path / "b"},
        )
