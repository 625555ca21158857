"""Encoders side by side: what differs beyond noise, what does not, and what cannot be compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin.encoders import save_encoder
from pivot_plugin.errors import ModelError, SettingsError
from pivot_plugin.hooks import hookimpl, manager
from pivot_plugin.models.find import find_adapter
from pivot_plugin.probes import ProbeResult, ProbeTask, Score, features, subject
from pivot_plugin.probes.comparison import Comparison
from pivot_plugin.probes.scores import score_of
from tests.helpers import picture, row


def spread(who: Any, images: Any, scale: float = 1.0) -> dict[str, float]:
    """A probe of our own."""
    return {"std": scale * float(features(who, images, pool="mean", cache=False).pooled().std())}


def result(*samples: float) -> dict[str, ProbeResult]:
    return {"p": ProbeResult("p", {"s": score_of(np.array(samples))})}


def test_a_clear_difference_is_beyond_noise_and_a_small_one_is_not() -> None:
    rng = np.random.default_rng(0)
    base = rng.binomial(1, 0.5, 200).astype(float)
    better = np.maximum(base, rng.binomial(1, 0.5, 200))
    same = base.copy()
    same[:3] = 1 - same[:3]
    comparison = Comparison({"base": result(*base), "better": result(*better), "same": result(*same)})
    found = {contrast.name: contrast for contrast in comparison.contrasts()}
    assert found["better"].beyond_noise
    assert not found["same"].beyond_noise
    assert found["better"].p is not None
    table = comparison.table()
    assert table.count(" *") == 2  # the mark, and the note that explains it
    assert "| p s |" in table


def asked_blind(seen: np.ndarray, blind: np.ndarray) -> dict[str, ProbeResult]:
    scores = {"all": seen, "all/mean-colour": blind, "all/needs-picture": np.maximum(seen - blind, 0)}
    return {"vqa": ProbeResult("vqa", {name: score_of(samples) for name, samples in scores.items()})}


def test_an_improvement_that_survives_without_the_picture_is_one_of_words() -> None:
    rng = np.random.default_rng(0)
    base = rng.binomial(1, 0.3, 400).astype(float)
    guessed = rng.binomial(1, 0.2, 400).astype(float)
    better, better_guesses = np.maximum(base, rng.binomial(1, 0.5, 400)), np.maximum(guessed, rng.binomial(1, 0.5, 400))
    few = np.maximum(guessed, rng.binomial(1, 0.1, 400))
    comparison = Comparison(
        {
            "base": asked_blind(base, guessed),
            "sees": asked_blind(better, guessed),
            "says": asked_blind(better, better_guesses),
            "both": asked_blind(better, few),
            "same": asked_blind(base, better_guesses),
        }
    )
    found = {contrast.name: contrast for contrast in comparison.contrasts() if contrast.score == "all"}
    assert found["sees"].of_words == 0.0
    gain = better_guesses.mean() - guessed.mean()
    assert found["says"].of_words == pytest.approx(gain / (better.mean() - base.mean()))
    assert 0 < found["both"].of_words < 0.5
    assert found["same"].of_words is None
    assert {name: contrast.survives_blind for name, contrast in found.items()} == {
        "sees": False,
        "says": True,
        "both": False,
        "same": False,
    }
    (row_of_all,) = [line for line in comparison.table().splitlines() if line.startswith("| vqa all |")]
    assert [cell.count("\u2020") for cell in row_of_all.split(" | ")] == [0, 0, 0, 1, 0, 0]
    assert "An improvement of words" in comparison.table()
    assert "An improvement of words" not in Comparison({"base": result(0, 1), "b": result(0, 1)}).table()


def test_p_values_are_adjusted_for_the_number_of_tests() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=40)
    other = base + rng.normal(0.4, 1, 40)
    alone = Comparison({"base": result(*base), "other": result(*other)}).contrasts()[0].p
    among = Comparison({"base": result(*base)} | {f"other {n}": result(*other) for n in range(10)}).contrasts()[0].p
    assert alone is not None and among is not None
    assert among == pytest.approx(min(1, 10 * alone))


def test_without_samples_intervals_decide() -> None:
    def known(value: float, low: float, high: float) -> dict[str, ProbeResult]:
        return {"p": ProbeResult("p", {"s": Score(value, low, high)})}

    comparison = Comparison({"a": known(1, 0.9, 1.1), "b": known(2, 1.9, 2.1), "c": known(1.1, 1.0, 1.2)})
    found = {contrast.name: contrast for contrast in comparison.contrasts()}
    assert found["b"].beyond_noise and not found["c"].beyond_noise
    assert found["b"].p is None
    # of a number without an interval nothing is known
    assert not Comparison({"a": known(1, 1, 1), "b": known(2, 2, 2)}).contrasts()[0].beyond_noise


def test_models_runs_and_encoders_are_compared(llava: Any, fast: Any, tmp_path: Path) -> None:
    model, processor = llava
    pairs = [row(f"{n}?", "yes", "no", picture(60, 60, n)) for n in range(8)]
    base = save_encoder(find_adapter(model), processor, tmp_path / "base", {})
    result = pivot.optimize(model, pairs, processor=processor, eval_fraction=0, **fast)
    images = [picture(60, 60, n) for n in range(6)]
    comparison = pivot.compare(
        {"base": base, "run": fast["output_dir"], "result": result},
        {"spread": ProbeTask(spread, images), "twice": ProbeTask(spread, images, {"scale": 2.0})},
        output=tmp_path / "comparison.json",
    )
    scores = {name: results["spread"].main.value for name, results in comparison.results.items()}
    assert scores["base"] != scores["run"] == scores["result"]
    assert comparison.results["run"]["twice"].main.value == pytest.approx(2 * scores["run"])
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["against"] == "base"
    assert written["compared"]["run"]["spread"]["scores"]["std"]["value"] == pytest.approx(scores["run"])


def test_an_encoder_is_grafted_for_probes_that_need_an_mllm(make: Any, tmp_path: Path) -> None:
    (model, processor), (other, _) = make("llava"), make("llava")
    with torch.no_grad():
        for parameter in find_adapter(other).tower.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = save_encoder(find_adapter(other), processor, tmp_path / "encoder", {})
    rows = [{"image": picture(60, 60, n), "question": "what?", "answer": "x"} for n in range(3)]
    probing = {"vqa": ProbeTask("vqa", rows, {"max_new_tokens": 4})}
    with pytest.raises(ModelError, match=r"Probe 'vqa' needs an MLLM.*encoder"):
        pivot.compare([folder], probing)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    comparison = pivot.compare([folder], probing, mllm=model, processor=processor)
    expected = pivot.compare({"encoder": other}, probing, processor=processor)
    answers = comparison.results[comparison.names[0]]["vqa"].artefacts
    assert answers == expected.results["encoder"]["vqa"].artefacts
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_probes_of_plugins_are_found_by_name(llava: Any) -> None:
    class Plugin:
        @hookimpl
        def pivot_probes(self) -> Any:
            return {"spread": spread}

    plugin = Plugin()
    manager().register(plugin, "test-probes")
    try:
        images = [picture(60, 60, 1)] * 2
        comparison = pivot.compare({"it": subject(*llava)}, {"spread": images})
        assert comparison.results["it"]["spread"].main.value >= 0
        with pytest.raises(SettingsError, match=r"no probe 'spred'.*Did you mean spread"):
            pivot.compare({"it": subject(*llava)}, {"spred": images})
    finally:
        manager().unregister(plugin)


def test_a_comparison_that_fails_halfway_keeps_what_it_found(llava: Any, tmp_path: Path) -> None:
    def fails(who: Any) -> Any:
        raise RuntimeError("out of luck")

    images = [picture(60, 60, 1)] * 2
    with pytest.raises(RuntimeError, match="out of luck"):
        pivot.compare(
            {"it": subject(*llava)}, {"spread": ProbeTask(spread, images), "bad": fails}, output=tmp_path / "kept.json"
        )
    assert "spread" in json.loads((tmp_path / "kept.json").read_text())["compared"]["it"]


def test_nothing_to_compare_is_named(llava: Any) -> None:
    with pytest.raises(SettingsError, match="There is nothing to compare"):
        pivot.compare([], {"spread": ProbeTask(spread)})
    with pytest.raises(SettingsError, match="No probe is given"):
        pivot.compare([subject(*llava)], {})
    with pytest.raises(SettingsError, match="'model' stands alone"):
        pivot.compare("model", {"spread": ProbeTask(spread)})
    with pytest.raises(SettingsError, match="Two are called 'LlavaForConditionalGeneration'"):
        pivot.compare([llava[0], llava[0]], {"spread": ProbeTask(spread)})
    with pytest.raises(ModelError, match="holds no encoder"):
        pivot.compare({"x": 42}, {"spread": ProbeTask(spread)})
    assert Comparison().contrasts() == []
