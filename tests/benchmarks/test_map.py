"""The map: its fast way of teaching and reading is the model's own, its pairs are what they say, its tables add up."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.map import __main__ as command
from benchmarks.map import pairs as authors
from benchmarks.map.calibration import patch_labels
from benchmarks.map.cells import Cell, Plan, end_right
from benchmarks.map.pairs import BEST, Asked, Scored, chosen_and_rejected
from benchmarks.map.tables import MEASURES, Map, contrast, named
from benchmarks.map.world import Sizes, Teaching, Text, features, first_stage, forest, load, logits, pictures
from pivot_plugin.errors import SettingsError
from pivot_plugin.quickstart import miniature, scenes, world

TOY = Plan(
    sizes=Sizes(2, 2, Teaching(2, 1e-3, 1e-3, batch=4), Teaching(2, 1e-3, batch=4), taught=16, examined=12),
    steps=2,
    batch=4,
    pairs=8,
    held_out=4,
    probed=8,
)


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_stage(0, TOY.sizes, tmp_path_factory.mktemp("map"))


def test_texts_behind_one_picture_are_read_as_the_model_reads_each_alone(stage_1: Path) -> None:
    model, processor = load(stage_1)
    shown = pictures(3, 5, questions=2, reasoned=True)
    rows = forest(shown.texts)
    with torch.no_grad():
        told = logits(model, features(model.model.vision_tower, shown.pixels), rows)
    start = 0
    for scene, texts in zip(shown.scenes, shown.texts, strict=True):
        for text in texts:
            prompt = processor.apply_chat_template(world.user_message(text.prompt), add_generation_prompt=True)
            inputs = processor(images=[[scene.image]], text=[f"{prompt}{text.answer} <eos>"], return_tensors="pt")
            asked = len(text.answer.split()) + 1
            with torch.no_grad():
                alone = model(**inputs).logits[0, -asked - 1 : -1]
            torch.testing.assert_close(told[start : start + asked], alone, rtol=1e-4, atol=1e-5)
            start += asked
    assert start == len(told)


def test_patches_are_labelled_by_the_object_that_they_show() -> None:
    size = miniature.PATCH_SIZE
    for scene in scenes.render_many(10, 3, style=scenes.FOGGY):
        labels = patch_labels([scene])[0].reshape(4, 4)
        for row, column in np.ndindex(4, 4):
            here = np.s_[row * size : (row + 1) * size, column * size : (column + 1) * size]
            shown = [int((scene.mask([item])[here] > 0).sum()) for item in scene.objects]
            item = scene.objects[int(np.argmax(shown))]
            label = 1 + scenes.SHAPES.index(item.shape) * len(scenes.COLOURS) + list(scenes.COLOURS).index(item.colour)
            assert labels[row, column] == (label if max(shown) >= size * size / 4 else 0)


@pytest.mark.parametrize(
    ("rightness", "expected"), [(0.3, ("a", "d")), (0.6, ("b", "d")), (1.0, ("c", "d")), (BEST, ("c", "d"))]
)
def test_the_chosen_answer_is_as_right_as_asked_for(rightness: float | str, expected: tuple[str, str]) -> None:
    drawn = [Scored("a", 0.25), Scored("b", 0.5), Scored("c", 1.0), Scored("d", 0.0)]
    picked = chosen_and_rejected(drawn, rightness)
    assert picked is not None
    assert (picked[0].text, picked[1].text) == expected
    assert chosen_and_rejected([Scored("a", 0.5)] * 2, rightness) is None


def test_answers_that_are_far_from_what_is_asked_for_give_no_pair() -> None:
    drawn = [Scored("a", 0.75), Scored("b", 0.5)]
    assert chosen_and_rejected(drawn, 1.0) is None
    assert chosen_and_rejected(drawn, BEST) == tuple(drawn)


def test_of_reasoned_answers_the_end_alone_is_checked() -> None:
    drawn = [Scored("a", 1.0, False), Scored("b", 0.0, True), Scored("c", 0.5, True)]
    picked = [chosen_and_rejected(drawn, rightness) for rightness in (BEST, 0.6)]
    assert [(one[0].text, one[1].text) for one in picked if one] == [("b", "a"), ("c", "a")]
    assert chosen_and_rejected(drawn[1:], BEST) is None
    prompt = f"{world.CAPTION_PROMPT} so what shape is the red object"
    scene = scenes.render_many(1, 3, style=scenes.FOGGY)[0]
    told = authors.scored(Asked(scene, prompt, "circle"), f"{scene.caption()} so circle")
    assert (told.facts, told.end) == (1.0, True)
    assert end_right(["", ""], ["red square so circle", "so square"], ["circle"] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("rightness", [0.3, 0.6, 1.0])
def test_an_oracles_answers_differ_in_one_fact_that_the_chosen_one_has_right(rightness: float) -> None:
    rng = random.Random(0)
    shares = []
    for scene in scenes.render_many(200, 9, style=scenes.FOGGY):
        chosen, rejected = authors.oracle(Asked(scene, world.CAPTION_PROMPT, ""), rightness, rng)
        words = [answer.text.split() for answer in (chosen, rejected)]
        assert sum(a != b for a, b in zip(*words, strict=True)) == 1
        assert chosen.facts - rejected.facts == 1 / (2 * len(scene.objects))
        # one fact at least is right
        shares.append(chosen.facts - max(rightness, 1 / (2 * len(scene.objects))))
    assert abs(np.mean(shares)) < 0.05


def test_the_blind_control_shows_every_pair_another_picture() -> None:
    rows = authors.asked(5, 2, reasoned=False)

    def pick(row: Asked) -> tuple[Scored, Scored]:
        return authors.oracle(row, 1.0, random.Random(3))

    sighted, blind = (authors.made(rows, 4, pick, others) for others in (False, True))
    assert [row["chosen"] for row in sighted.rows] == [row["chosen"] for row in blind.rows]
    assert [id(row["images"][0]) for row in blind.rows] == [
        id(sighted.rows[number]["images"][0]) for number in (3, 0, 1, 2)
    ]
    assert sighted.chosen == 1.0 > sighted.rejected


def record(seed: int, arm: str, **scores: float) -> dict[str, Any]:
    cell = {"seed": seed, "author": "own", "rightness": BEST, "arm": arm, "train": "encoder", "blind": False}
    return {"cell": cell, "scores": scores, "told": {"chosen": 0.8, "rejected": 0.2}}


def t_of_four_degrees(t: float) -> float:
    """Two-sided p of Student's t with four degrees of freedom, in closed form."""
    inner = 1 + t * t / 4
    return float(1 - 0.75 * abs(t) / np.sqrt(inner) * (1 - t * t / (12 * inner)))


def test_differences_are_paired_by_seed_and_tested_as_by_hand() -> None:
    first, second = [0.5, 0.62, 0.4, 0.7, 0.58], [0.45, 0.5, 0.41, 0.6, 0.5]
    records = [record(seed, "dpo", **{"probe shapes": value}) for seed, value in enumerate(first)]
    # another order, and a seed that the other has not
    records += [record(seed, "sft", **{"probe shapes": second[seed]}) for seed in (4, 2, 0, 3, 1)]
    records += [record(7, "sft", **{"probe shapes": 0.9})]
    found = Map(records)
    dpo, sft = (("own", BEST, arm, "encoder", False) for arm in ("dpo", "sft"))
    told = contrast(found.values(dpo, "probe shapes"), found.values(sft, "probe shapes"))
    assert told is not None
    differences = np.subtract(first, second)
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(5))
    assert told.mean == pytest.approx(differences.mean())
    assert told.spread == pytest.approx(differences.std(ddof=1))
    assert told.p == pytest.approx(t_of_four_degrees(t))
    assert (told.seeds, told.above) == (5, 4)
    expected = f"{differences.mean():+.3f} ± {differences.std(ddof=1):.3f} (4/5) *"
    table = found.differences([dpo], lambda one: sft, {"probe shapes": "probe"})
    assert table.splitlines()[-1] == f"| {named(dpo)} - {named(sft)} | {expected} |"
    mean = f"{np.mean([*second, 0.9]):.3f} ± {np.std([*second, 0.9], ddof=1):.3f}"
    assert found.table([sft], {"probe shapes": "probe"}).splitlines()[-1] == f"| {named(sft)} | 6 | {mean} |"
    assert found.rightness(dpo) == "0.80, 0.20"


def test_a_column_of_many_differences_is_corrected() -> None:
    values = {"dpo": (0.0, 0.1, 0.2, 0.1, 0.12), "grpo": (0.01, 0.03, -0.02, 0.0, 0.02)}
    records = [
        record(seed, arm, **{"probe shapes": value})
        for arm, given in values.items()
        for seed, value in enumerate(given)
    ]
    records += [record(seed, "sft", **{"probe shapes": 0.0}) for seed in range(5)]
    found, measures = Map(records), {"probe shapes": "probe"}
    dpo, grpo, sft = (("own", BEST, arm, "encoder", False) for arm in ("dpo", "grpo", "sft"))
    alone = found.differences([dpo], lambda one: sft, measures)
    beside = found.differences([dpo, grpo], lambda one: sft, measures)
    # 0.03 by itself, 0.07 as one of two
    assert "*" in alone and "*" not in beside


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    command.add(path, {"a": 3.123456789})
    assert command.lines(path) == [{"a": 1}, {"a": 3.12346}]


@pytest.mark.training
def test_the_command_runs_a_cell_once_and_prints_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    only = ["--seeds", "0", "--only", "oracle-1.0-dpo-encoder"]
    (tmp_path / "results").mkdir()
    rates = [{"arm": arm, "rate": rate, "seed": 9, "scores": SEARCHED | {"mllm captions": rate}} for arm, rate in RATES]
    (tmp_path / "results" / "map-rates.jsonl").write_text("\n".join(map(json.dumps, rates)) + "\n")
    command.main(["run", *folders, *only], plan=TOY)
    kept = tmp_path / "results" / "map-cells.jsonl"
    (told,) = command.lines(kept)
    assert Cell(**told["cell"]) == Cell(0, "oracle", 1.0, "dpo")
    assert told["told"]["learning_rate"] == 1e-3
    assert set(MEASURES) <= set(told["scores"])
    assert "| oracle 1.0, dpo | 1 |" in capsys.readouterr().out
    written = kept.read_bytes()
    command.main(["run", *folders, *only], plan=TOY)
    assert kept.read_bytes() == written
    with pytest.raises(SettingsError, match="had steps=2, now it is 3"):
        command.main(["run", *folders, *only], plan=replace(TOY, steps=3))


SEARCHED = {"mllm answers": 0.5, "probe shapes": 0.5}
RATES = [("dpo", 3e-4), ("dpo", 1e-3), ("sft", 1e-3)]


def test_an_arm_gets_the_rate_with_the_best_captions() -> None:
    records = [
        {"arm": arm, "rate": rate, "seed": seed, "scores": {"mllm captions": score}}
        for arm, rate, seed, score in [
            ("dpo", 1e-4, 100, 0.9),
            ("dpo", 1e-4, 101, 0.1),
            ("dpo", 3e-4, 100, 0.6),
            ("dpo", 3e-4, 101, 0.6),
            ("sft", 3e-3, 100, 0.2),
        ]
    ]
    assert command.best_rates(records) == {"dpo": 3e-4, "2 rounds": 3e-4, "sft": 3e-3}


def test_a_kind_of_text_is_a_sentence_of_its_own() -> None:
    rows = forest([[Text("how", "yes", "a"), Text("what is", "no", "b")]])
    assert rows.branch[0, -1] == 2
    assert rows.position[0, rows.branch[0] == 1].tolist() == [18, 19, 20, 21]
    assert rows.position[0, rows.branch[0] == 2].tolist() == [18, 19, 20, 21, 22]
