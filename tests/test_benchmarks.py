"""What the benchmarks count, and that they run to their end on any machine."""

import json
import math
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import guard, startup, trainer
from benchmarks.machine import listed
from benchmarks.shapes import GPU_SHAPES, MAKERS, PRESETS, Shape, pairs_of, small
from benchmarks.work import Work, activation_bytes, distinct, kept_per_token, operations, repeated
from pivot_plugin.models.find import find_adapter
from pivot_plugin.preferences import load
from pivot_plugin.training.batch import ForestBatch, ForestCollator

TOY = [small(shape) for shape in GPU_SHAPES]


def made(shape: Shape) -> tuple[Any, Any, ForestBatch]:
    torch.manual_seed(0)
    model, processor = MAKERS[shape.model](PRESETS["toy"][shape.model])
    pairs = load(pairs_of(shape, 1))
    collator = ForestCollator(processor, find_adapter(model).image_token_id)
    return model, processor, collator([pairs[index] for index in range(len(pairs))])["forest"]


@pytest.mark.parametrize("shape", TOY, ids=lambda shape: shape.name)
def test_operations_are_those_that_torch_counts(shape: Shape) -> None:
    model, processor, batch = made(replace(shape, pairs=1))
    model.set_attn_implementation("eager")
    # so that every layer of the tower is used
    model.config.vision_feature_layer = -1
    row = pairs_of(shape, 1)[0]
    text = f"{processor.image_token}{row['prompt']}"
    inputs = processor(text=[text], images=[row["images"]], return_tensors="pt")
    tokens = inputs["input_ids"].shape[1]
    # stock attention computes all pairs of tokens, and its head those that are asked for
    work = replace(distinct(model, batch), tokens=tokens, attended=tokens**2, scored=7)
    # one vector at the tower's bottom trains: gradients pass through all that is above it, and no matrix gets one
    model.requires_grad_(False)
    tower = find_adapter(model).tower
    next(p for name, p in tower.named_parameters() if "norm" in name and "pre_lay" not in name).requires_grad_(True)
    with FlopCounterMode(display=False) as forward:
        logits = model(**inputs, logits_to_keep=7).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()

    assert math.isclose(operations(model, work, 1, 0), forward.get_total_flops(), rel_tol=0.01)
    assert math.isclose(operations(model, work, 0, 1), backward.get_total_flops(), rel_tol=0.03)


def test_layers_above_the_features_are_not_needed() -> None:
    model, _, batch = made(TOY[0])
    work = distinct(model, batch)
    fewer = operations(model, work)
    model.config.vision_feature_layer = -1

    vision, patches = model.config.vision_config, 577
    layer = 2 * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size) * patches * 2
    attention = 4 * vision.hidden_size * patches**2 * 3
    assert operations(model, work) - fewer == len(work.images) * (layer + attention)


@pytest.mark.parametrize("shape", TOY, ids=lambda shape: shape.name)
def test_answers_by_themselves_show_every_picture_again(shape: Shape) -> None:
    model, processor, batch = made(shape)
    once, twice = distinct(model, batch), repeated(model, batch)

    rows = pairs_of(shape, 1)
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for row in rows
    ]
    lengths = [
        len(processor(text=[prompt], images=[row["images"]])["input_ids"][0])
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    answers = (twice.scored) // (2 * len(rows))
    assert twice.tokens == 2 * (sum(lengths) + answers * len(rows))
    assert sorted(twice.images) == sorted(once.images * 2)
    assert twice.image_tokens == 2 * once.image_tokens
    # a pair shares its prompt, and what its answers begin with
    assert sum(lengths) + answers * len(rows) < once.tokens <= twice.tokens - sum(lengths)
    assert operations(model, once) < operations(model, twice)


def test_what_a_decoder_keeps_is_counted_on_the_meta_device() -> None:
    shape = TOY[0]
    model, _, _ = made(shape)
    with torch.device("meta"):
        sketch, _ = MAKERS[shape.model](PRESETS["toy"][shape.model])
    sketch.requires_grad_(False)
    # at the least the inputs of two norms, queries and what comes of them, and the gate, its activation and the factor
    text = model.config.text_config
    least = 4 * text.num_hidden_layers * (4 * text.hidden_size + 3 * text.intermediate_size)
    assert least < kept_per_token(sketch) < 2.5 * least
    assert kept_per_token(sketch, 127) == pytest.approx(kept_per_token(sketch), rel=0.02)
    assert kept_per_token(model.requires_grad_(False)) == pytest.approx(kept_per_token(sketch), rel=0.25)

    work = Work(1000, 0, 0, 0, (), ())
    assert activation_bytes(sketch, work, False) == pytest.approx(1000 * kept_per_token(sketch))
    assert activation_bytes(sketch, work, True) < activation_bytes(sketch, work, False)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", None),
        ("NVIDIA A10", None),
    ],
)
def test_peaks_are_those_of_the_card_itself(name: str, entry: str | None) -> None:
    assert listed(name) == entry


@pytest.mark.training
def test_the_preset_for_gpus_runs_to_its_end_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: object) -> None:
        raise AssertionError("a benchmark asked the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(trainer, "STEPS", 2)
    words = ["--preset", "gpu", "--toy", "--rounds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["trainer", *words])
    trainer.main()

    told = capsys.readouterr().out
    assert "llava-1.5-7b: 7.06 B parameters" in told
    record = json.loads((tmp_path / "trainer-gpu-toy.json").read_text())
    assert [row["name"] for row in record["results"]] == [shape.name for shape in GPU_SHAPES]
    assert record["torch"] == torch.__version__
    for row in record["results"]:
        step, pairs = row["seconds_per_step"], row["pairs"]
        assert all(low <= step[side] <= high for side, (low, high) in row["spread"].items())
        assert row["pairs_per_second"]["trl"] == pytest.approx(pairs / step["trl"])
        assert row["distinct_tokens_per_second"]["pivot"] == pytest.approx(
            row["tokens_per_step"]["pivot"] / step["pivot"]
        )
        assert row["mfu"]["trl"] * record["peak_flops"] * step["trl"] == pytest.approx(row["needed_flops_per_step"])
        assert 0 < row["peak_bytes"]["pivot"] < row["peak_bytes_in_all"]["pivot"]


def test_without_a_gpu_its_preset_says_what_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(trainer, "budgets", lambda *args: [])
    monkeypatch.setattr(sys, "argv", ["trainer", "--preset", "gpu"])
    with pytest.raises(SystemExit, match="--toy rehearses"):
        trainer.main()


def test_a_ratio_is_worse_beyond_the_noise_of_both_measurements() -> None:
    bare = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0]
    kept = guard.ratio_of("shape", "elapsed", [1.2 * seconds for seconds in bare], bare)
    assert kept.ratio == pytest.approx(1.2)
    assert kept.noise == pytest.approx(0.0, abs=1e-9)
    # a machine that becomes slower for a while does so for both neighbours
    slower = [seconds * factor for seconds, factor in zip(bare, (1, 1, 3, 3, 3, 1, 1), strict=True)]
    assert not guard.ratio_of("shape", "elapsed", [1.2 * seconds for seconds in slower], slower).worse_than(
        replace(kept, noise=0.01)
    )

    noisy = guard.ratio_of("shape", "elapsed", [1.0, 1.6, 1.1, 1.5, 1.3, 1.2, 1.4], [1.0] * 7)
    assert noisy.ratio == pytest.approx(1.3)
    assert noisy.noise > 0.1
    assert not noisy.worse_than(kept)
    assert replace(noisy, noise=0.05).worse_than(kept)
    assert not replace(noisy, noise=0.05).worse_than(replace(kept, noise=0.06))


def test_the_guard_says_which_shape_became_worse() -> None:
    now = [
        guard.Ratio(name, "elapsed", ratio, 0.1, 1.0, 1.0, 9) for name, ratio in (("a", 1.5), ("b", 1.2), ("c", 1.0))
    ]
    kept = {"ratios": [{**vars(now[0]), "ratio": 1.2}, {**vars(now[1]), "ratio": 1.2}]}
    lines, worse = zip(*(guard.verdict(one, kept) for one in now), strict=True)
    assert worse == (True, False, False)
    assert "WORSE" in lines[0] and "no worse" in lines[1] and "none is kept" in lines[2]


@pytest.mark.training
def test_the_guard_measures_as_many_steps_of_both_sides() -> None:
    ratios = guard.compare(guard.SMALL[0], steps=2)
    assert [ratio.clock for ratio in ratios] == ["elapsed", "processor"]
    for ratio in ratios:
        assert ratio.steps == 2
        assert ratio.ratio > 0 and ratio.trainer > 0 and ratio.bare > 0


@pytest.mark.training
def test_the_guard_takes_fewer_steps_where_time_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "FEWEST", 1)
    assert guard.compare(guard.SMALL[0], steps=9, seconds=0)[0].steps == 1


@pytest.mark.parametrize("shape", guard.SMALL, ids=lambda shape: shape.name)
def test_the_bare_loop_has_as_many_tokens_as_are_distinct(shape: Shape) -> None:
    torch.manual_seed(0)
    model, processor = MAKERS[shape.model](guard.SIZES)
    pairs = load(pairs_of(shape, 1))
    collator = ForestCollator(processor, find_adapter(model).image_token_id)
    nodes = collator([pairs[index] for index in range(len(pairs))])["forest"].forest.node_count
    tokens = int(guard.Bare(shape, model, processor).inputs["attention_mask"].sum())
    assert math.isclose(tokens, nodes, rel_tol=0.05)


def test_every_part_of_a_start_is_still_entered_somewhere() -> None:
    for part, places in startup.SEAMS.items():
        assert any(startup.holder(place) for place in places), part
    assert startup.holder("pivot_plugin.runs.run:gone") is None
    with pytest.raises(SystemExit, match="'gone' is entered by none"):
        startup.enter(startup.Clock(0.0), {"gone": ["pivot_plugin.runs.run:gone"]})


def test_parts_of_a_start_do_not_count_what_they_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([2.0, 3.0, 4.0, 7.0, 8.0, 10.0])
    monkeypatch.setattr(time, "time", lambda: next(now))
    clock = startup.Clock(0.0)
    clock.started()
    with clock.part("outer"), clock.part("inner"):
        pass
    seconds = {part: spent for part, (spent, _) in clock.stop().items()}
    assert seconds == {startup.PYTHON: 2.0, startup.REST: 3.0, "outer": 2.0, "inner": 3.0}
