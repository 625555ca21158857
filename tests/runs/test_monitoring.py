"""Probes while a run goes on: at the asked steps, kept in its folder, and without any effect on training."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.probes import ProbeTask, features, saliency, subject
from pivot_plugin.probes.storage import saved_results
from tests.helpers import picture, row

PAIRS = [row(f"{n}?", f"yes {n}", f"no! {n}", picture(60, 60, n)) for n in range(16)]
IMAGES = [picture(60, 60, n) for n in range(4)]


def spread(who: Any, images: Any) -> dict[str, float]:
    torch.rand(3)
    np.random.rand(3)
    return {"std": float(features(who, images, pool="mean", cache=False).pooled().std())}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_probes_run_before_at_the_asked_steps_and_after(llava: Any, fast: Any) -> None:
    options = fast | {"max_steps": 5, "eval_prefs": PAIRS[:4]}
    result = pivot.optimize(
        llava[0],
        PAIRS[4:],
        processor=llava[1],
        probes={"spread": ProbeTask(spread, IMAGES)},
        probe_steps=[2, 3],
        **options,
    )
    found = result.probes["spread"]
    assert list(found) == [0, 2, 3, 5]
    logged = [(entry["step"], entry["probe/spread/std"]) for entry in result.history if "probe/spread/std" in entry]
    assert logged == [(step, measured.main.value) for step, measured in found.items()]
    # the last is of the model that comes back
    after = spread(subject(llava[0], llava[1]), IMAGES)["std"]
    assert found[5].main.value == pytest.approx(after, rel=1e-4)
    assert found[0].main.value != found[5].main.value


def test_looking_does_not_change_training(make: Any, fast: Any, tmp_path: Path) -> None:
    trained = []
    for name, options in (
        ("blind", {"saliency": 0}),
        ("seeing", {"saliency": 4, "probes": {"spread": ProbeTask(spread, IMAGES)}, "probe_steps": [1, 2]}),
    ):
        model, processor = make("qwen2_5_vl")
        settings = fast | {"output_dir": tmp_path / name, "eval_prefs": PAIRS[:4], **options}
        pivot.optimize(model, PAIRS[4:], processor=processor, **settings)
        trained.append(weights(model))
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_maps_of_held_out_pairs_are_kept_before_and_after(tiny: Any, fast: Any) -> None:
    model, processor = tiny
    untouched = saliency(subject(model, processor), PAIRS[:3])
    result = pivot.optimize(model, PAIRS[4:], processor=processor, eval_prefs=PAIRS[:3], **fast)
    found = saved_results(result.output_dir)["saliency"]
    assert list(found) == [0, 4]
    for one, other in zip(found[0].artefacts, untouched.artefacts, strict=True):
        assert (one.question, one.chosen, one.rejected) == (other.question, other.chosen, other.rejected)
        for loss in ("sft", "dpo"):
            np.testing.assert_allclose(one.maps[loss], other.maps[loss], rtol=2e-3, atol=1e-7)
    assert any(
        (a.maps["dpo"] != b.maps["dpo"]).any() for a, b in zip(found[0].artefacts, found[4].artefacts, strict=True)
    )
    assert found[0].artefacts[0].image.size == (60, 60)


def test_no_held_out_pairs_no_maps(llava: Any, fast: Any) -> None:
    result = pivot.optimize(llava[0], PAIRS, processor=llava[1], eval_fraction=0, **fast)
    assert result.probes == {}
    assert result.cost.seconds > 0
    assert result.cost.flops > 0


def test_a_probe_that_fails_later_does_not_lose_the_run(
    llava: Any, fast: Any, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def moody(who: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of luck")
        return {"x": 1.0}

    with caplog.at_level(logging.WARNING):
        result = pivot.optimize(llava[0], PAIRS, processor=llava[1], probes={"moody": moody}, eval_fraction=0, **fast)
    assert "Probe 'moody' failed and is left out: RuntimeError: out of luck" in caplog.text
    assert list(result.probes["moody"]) == [0]
    assert (result.output_dir / "encoder").is_dir()


def test_a_probe_that_cannot_work_stops_before_training_and_leaves_the_model(llava: Any, fast: Any) -> None:
    before = weights(llava[0])
    for probe, error, message in (
        (ProbeTask("vqa", [{"image": IMAGES[0], "question": "what?"}]), DataError, "has no 'answer'"),
        (lambda who: 1 / 0, SettingsError, "Probe 'p' failed before training: ZeroDivisionError"),
    ):
        with pytest.raises(error, match=message):
            pivot.optimize(
                llava[0], PAIRS, processor=llava[1], probes={"p": probe}, eval_fraction=0, resume=True, **fast
            )
    assert all(torch.equal(tensor, before[name]) for name, tensor in llava[0].state_dict().items())
    for options, message in (
        ({"probes": {"liner": []}}, "no probe 'liner'"),
        ({"probes": {}}, "No probe is given"),
        ({"saliency": -1}, "saliency is -1"),
        ({"probe_steps": [0]}, r"probe_steps \[0\]"),
    ):
        with pytest.raises(SettingsError, match=message):
            pivot.optimize(llava[0], PAIRS, processor=llava[1], **fast, **options)


def test_a_resumed_run_keeps_what_was_measured_before(llava: Any, fast: Any) -> None:
    settings = {**fast, "save_strategy": "steps", "save_steps": 2, "probes": {"spread": ProbeTask(spread, IMAGES)}}

    class Stop(Exception):
        pass

    def stop(who: Any) -> Any:
        raise KeyboardInterrupt

    model, processor = llava
    before = spread(subject(model, processor), IMAGES)["std"]
    with pytest.raises(KeyboardInterrupt):
        probes = {**settings["probes"], "stop": _at_second_call(stop)}
        pivot.optimize(
            model, PAIRS, processor=processor, eval_fraction=0, probe_steps=[3], **{**settings, "probes": probes}
        )
    result = pivot.optimize(model, PAIRS, processor=processor, eval_fraction=0, resume=True, **settings)
    assert list(result.probes["spread"]) == [0, 3, 4]
    assert result.probes["spread"][0].main.value == pytest.approx(before)


def _at_second_call(probe: Any) -> Any:
    calls: list[int] = []

    def run(who: Any) -> Any:
        calls.append(1)
        return probe(who) if len(calls) > 1 else {"x": 1.0}

    return run


def test_what_a_run_computes_is_counted(make: Any, fast: Any) -> None:
    """Tokens that pass the language model: those of the forest, once forward for the reference and once in training."""
    model, processor = make("llava")
    result = pivot.optimize(
        model, PAIRS, processor=processor, eval_fraction=0, **(fast | {"max_steps": 2, "gradient_checkpointing": False})
    )
    tower = model.get_encoder(modality="image")
    tokens = 1 + (tower.config.image_size // tower.config.patch_size) ** 2
    assert result.cost.tower_tokens % tokens == 0
    # every image once for the reference, four a step; and to check the forest, of two pairs both answers through the
    # model's own head and TRL's, and both pairs in trees
    assert result.cost.tower_tokens // tokens == 16 + 2 * 4 + (2 * 2 * 2 + 2)
    size = sum(p.numel() for p in tower.parameters() if p.ndim > 1)
    assert result.cost.flops > 2 * size * result.cost.tower_tokens
