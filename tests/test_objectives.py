"""Objectives by name: presets, TRL's own loss types, and plugins'."""

from typing import Any

import pytest
from trl import DPOConfig, GRPOConfig, RLOOConfig

import pivot_plugin as pivot
from pivot_plugin import hooks, objectives
from pivot_plugin.errors import SettingsError


def test_presets_are_the_published_mixes() -> None:
    assert objectives.resolve("dpo") == {"loss_type": ["sigmoid"]}
    assert objectives.resolve("sft") == {"loss_type": ["sft"]}
    assert objectives.resolve("mpo") == {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    assert objectives.resolve("mdpo") == {"loss_type": ["sigmoid"], "image_terms": ["conditional", "anchor"]}
    assert objectives.resolve("svco")["image_terms"] == ["attend", "reject"]
    assert objectives.resolve("specs") == {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}


def test_every_preset_is_a_setting_of_trl_and_documented() -> None:
    for name, preset in objectives.BUILT_IN.items():
        settings = dict(preset())
        kind = {"grpo": GRPOConfig, "rloo": RLOOConfig}.get(str(settings.pop("trainer", None)), DPOConfig)
        if "image_terms" in settings:
            # TRL has no loss about pictures
            kind = pivot.PivotConfig
        kind(output_dir="unused", use_cpu=True, bf16=False, **settings)
        assert "Source:" in (preset.__doc__ or ""), name
        assert "When:" in (preset.__doc__ or ""), name


def test_every_loss_type_of_trl_is_an_objective() -> None:
    assert len(objectives.loss_types()) >= 15
    for name in ("sigmoid", "ipo", "sigmoid_norm", "apo_down"):
        assert objectives.resolve(name) == {"loss_type": [name]}
    assert objectives.resolve(["sigmoid", "ipo"]) == {"loss_type": ["sigmoid", "ipo"]}


def test_unknown_names_come_with_the_nearest_ones() -> None:
    for wrong in ("hinges", ["sigmoid", "hinges"]):
        with pytest.raises(SettingsError, match=r"no objective 'hinges'.*Did you mean hinge"):
            objectives.resolve(wrong)
    with pytest.raises(SettingsError, match=r"no objective 'zzz'.*There are dpo, sft"):
        objectives.resolve("zzz")
    with pytest.raises(SettingsError, match="presets cannot stand in a list"):
        objectives.resolve(["mpo", "ipo"])


def test_a_plugin_s_objective_wins_over_a_built_in_one() -> None:
    class Mine:
        @hooks.hookimpl
        def pivot_objectives(self) -> Any:
            return {"dpo": {"loss_type": ["hinge"]}, "mine": {"loss_type": ["ipo"]}}

    hooks.manager().register(Mine(), "mine")
    try:
        assert objectives.resolve("mine") == {"loss_type": ["ipo"]}
        assert objectives.resolve("dpo") == {"loss_type": ["hinge"]}
    finally:
        hooks.manager().unregister(name="mine")
    assert objectives.resolve("dpo") == {"loss_type": ["sigmoid"]}


def test_arms_differ_in_the_loss_alone(make: Any, rows: Any, fast: Any) -> None:
    first = {}
    for objective in ("dpo", "sft", "mpo", "specs", "ipo"):
        model, processor = make("llava")
        settings = {**fast, "max_steps": 1, "output_dir": fast["output_dir"].with_name(objective)}
        result = pivot.optimize(model, rows, processor=processor, objective=objective, eval_fraction=0, **settings)
        assert result.settings["objective"] == objective
        first[objective] = next(log for log in result.history if "loss" in log)
    # before the first update every arm sees the same answers, in the same order, with the same log-probabilities
    for log in first.values():
        assert log["logps/chosen"] == pytest.approx(first["dpo"]["logps/chosen"], rel=1e-6)
    losses = {name: log["loss"] for name, log in first.items()}
    assert len(set(losses.values())) == 5
    assert losses["specs"] == pytest.approx(losses["dpo"] + losses["sft"], rel=1e-5)
    # at the start every reward is zero: BCO is 2 log 2
    assert losses["mpo"] == pytest.approx(0.8 * losses["dpo"] + 0.2 * 2 * losses["dpo"] + losses["sft"], rel=1e-5)


def test_learning_rates_depend_on_the_objective_and_on_what_trains() -> None:
    # arXiv 2510.16333, appendix E.1
    assert objectives.learning_rate("dpo", lora=False) == 1e-6
    assert objectives.learning_rate("sft", lora=False) == 5e-6
    assert objectives.learning_rate("sft", lora=True) > objectives.learning_rate("dpo", lora=True)
    assert objectives.learning_rate(["sigmoid", "ipo"], lora=True) == objectives.learning_rate("dpo", lora=True)


@pytest.mark.parametrize("objective", ["sft", "specs"])
def test_the_sft_loss_can_average_per_sequence(objective: str, make: Any, rows: Any, fast: Any) -> None:
    """Against log-probabilities of each answer: the mean over answers of their means, in place of that over tokens."""
    losses, parts = {}, {}
    for average in ("token", "sequence"):
        model, processor = make("llava")
        settings = {name: value for name, value in fast.items() if name != "output_dir"}
        config = pivot.PivotConfig(
            output_dir=str(fast["output_dir"] / average),
            sft_average=average,
            **settings,
            **objectives.resolve(objective),
        )
        trainer = pivot.PivotTrainer(model, config, rows, processing_class=processor, lora=4)
        batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
        losses[average] = trainer.compute_loss(trainer.model, batch).item()
        logps = trainer.model(forest=batch["forest"]).log_probs.chunk(2)[0]
        mask = batch["completion_mask"][:, 1:].chunk(2)[0]
        parts = {
            "token": -(logps.sum() / mask.sum()).item(),
            "sequence": -(logps.sum(dim=1) / mask.sum(dim=1)).mean().item(),
        }
    assert abs(parts["token"] - parts["sequence"]) > 1e-3
    assert losses["sequence"] - losses["token"] == pytest.approx(parts["sequence"] - parts["token"], abs=1e-5)
    if objective == "sft":
        assert losses == pytest.approx(parts, rel=1e-4)


def test_a_typo_in_the_average_is_said() -> None:
    with pytest.raises(SettingsError, match="sft_average is 'tokens'"):
        pivot.PivotConfig(output_dir="unused", use_cpu=True, sft_average="tokens")  # type: ignore[arg-type]
