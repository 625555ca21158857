"""The embedded world: what the scenes say is what they show."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin.quickstart import demo, scenes, world


def test_the_same_seed_gives_the_same_scenes() -> None:
    first, second = scenes.render_many(5, seed=3), scenes.render_many(5, seed=3)
    for one, other in zip(first, second, strict=True):
        assert one.objects == other.objects
        assert one.image.tobytes() == other.image.tobytes()
    assert scenes.render_many(5, seed=4)[0].objects != first[0].objects


def test_objects_stand_where_and_in_the_colour_that_is_said() -> None:
    for scene in scenes.render_many(30, seed=1):
        pixels = np.asarray(scene.image)
        for item in scene.objects:
            left, top, right, bottom = item.box
            centre = pixels[(top + bottom) // 2, (left + right) // 2]
            assert tuple(centre) == scenes.COLOURS[item.colour]


def test_answers_are_right_and_wrong_ones_are_wrong() -> None:
    rng = random.Random(0)
    seen = set()
    for scene in scenes.render_many(200, seed=2):
        for kind in scenes.QUESTION_KINDS:
            question = scenes.ask(scene, kind, rng)
            if question is None:
                continue
            seen.add(kind)
            assert question.answer not in question.wrong
            if kind == "count":
                assert question.answer == scenes.NUMBERS[len(scene.objects)]
            if kind == "colour":
                shape = question.text.split()[-1]
                assert [item.colour for item in scene.objects if item.shape == shape] == [question.answer]
            if kind == "existence":
                _, colour, shape = re.match(r"is there (a) (\w+) (\w+)", question.text).groups()  # type: ignore[union-attr]
                present = any((item.colour, item.shape) == (colour, shape) for item in scene.objects)
                assert question.answer == ("yes" if present else "no")
    assert seen == set(scenes.QUESTION_KINDS)


def test_a_wrong_caption_differs_in_one_word() -> None:
    rng = random.Random(0)
    for scene in scenes.render_many(50, seed=6):
        right, wrong = scene.caption().split(), scenes.wrong_caption(scene, rng).split()
        assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1


def test_every_word_of_the_world_is_in_its_vocabulary() -> None:
    processor = world.processor()
    unknown = processor.tokenizer.unk_token_id
    for pair in world.pairs(200):
        for message in (*pair["prompt"], *pair["chosen"], *pair["rejected"]):
            parts = message["content"]
            texts = [parts] if isinstance(parts, str) else [part.get("text", "") for part in parts]
            for text in texts:
                assert unknown not in processor.tokenizer(text)["input_ids"], text


@pytest.fixture(scope="module")
def trained() -> world.LlavaForConditionalGeneration:
    return world.model()


def test_the_shipped_model_sees_by_day(trained: world.LlavaForConditionalGeneration) -> None:
    """The committed weights are what the committed script says it measured."""
    by_day = world.vqa_accuracy(trained, world.processor(), world.questions(300, seed=20_000, dusk=False))
    at_dusk = world.vqa_accuracy(trained, world.processor(), world.questions(300, seed=20_000))
    assert by_day["all"] > 0.6 > at_dusk["all"]


def test_examining_changes_nothing(
    trained: world.LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("QUESTIONS", "DESCRIBED", "SEGMENTED", "LOCATED"):
        monkeypatch.setattr(demo, name, 12)
    first, second = (
        pivot.compare({"the model": trained}, demo.examination(), processor=world.processor()) for _ in range(2)
    )
    assert first.as_dict() == second.as_dict()
    assert {score for _, score in first.rows()} >= {"all", "colour", "recall", "miou", "dpo/energy", "sft/pointing"}


def test_facts_are_counted_by_place() -> None:
    scene = "red circle and blue square"
    assert scenes.facts_right(scene, scene) == 1
    assert scenes.facts_right("red square and blue square", scene) == 0.75
    assert scenes.facts_right("blue square and red circle", scene) == 0
    # an object too many, one too few
    assert scenes.facts_right(f"{scene} and red cross", scene) == pytest.approx(4 / 6)
    assert scenes.facts_right("red circle", scene) == 0.5
    assert scenes.facts_right("", scene) == scenes.facts_right("and and", scene) == 0
    (row,) = world.caption_questions(1, seed=3)
    said = [[{"role": "assistant", "content": row["caption"]}], "nothing"]
    assert world.facts_right(["", ""], said, caption=[row["caption"]] * 2) == [1, 0]


@pytest.mark.training
def test_the_demonstration_shows_both_arms_beside_the_untouched_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("QUESTIONS", "DESCRIBED", "SEGMENTED", "LOCATED"):
        monkeypatch.setattr(demo, name, 12)
    monkeypatch.setenv("COLUMNS", "80")
    demo.run(tmp_path / "demo", described=64, steps=2)
    printed = capsys.readouterr().out
    assert "questions gave a pair" in printed
    assert printed.count("Example ") == 3
    header, *lines = [
        re.split(r"\s*[\u2503\u2502]\s*", line)[1:-1] for line in printed.splitlines() if line[:1] in "\u2503\u2502"
    ]
    assert header == ["measure", "before", "SFT", "DPO"]
    assert [line[0] for line in lines] == [words.strip() for words in demo.READABLE.values()]
    assert all(re.fullmatch(r"\d\.\d{3} \u00b1\d\.\d{3}( \*\u2020?)?", cell) for line in lines for cell in line[1:])
    assert "What this is not: an encoder that sees more" in " ".join(printed.split())
    assert "The model with the DPO encoder equals the one that was trained: True." in printed
    page = (tmp_path / "demo" / "report.html").read_text()
    for said in ("sft: What was trained", "dpo: What was trained", "The model's own answers", "mean-colour"):
        assert said in page.replace("&#39;", "'"), said


def test_masks_show_the_objects_where_they_are() -> None:
    for scene in scenes.render_many(20, seed=9):
        mask = scene.mask()
        covered = np.zeros_like(mask, dtype=bool)
        for item in scene.objects:
            left, top, right, bottom = item.box
            inside = mask[top : bottom + 1, left : right + 1]
            assert (inside == 1 + scenes.SHAPES.index(item.shape)).mean() > 0.3
            covered[top : bottom + 1, left : right + 1] = True
        assert not mask[~covered].any()


def test_located_pairs_are_about_what_their_masks_show() -> None:
    rows, masks = world.located_pairs(30, seed=4)
    assert len(rows) == len(masks) == 30
    for row, mask in zip(rows, masks, strict=True):
        assert 0.02 < mask.mean() < 0.3
        assert row["chosen"] != row["rejected"]


def test_building_a_model_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    world.untrained_model(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
