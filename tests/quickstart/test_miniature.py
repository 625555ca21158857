"""The miniature's parts: drawn by a seed, in words its language model has, right where they should be right."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin.preferences import load, load_conversations
from pivot_plugin.quickstart import miniature, scenes
from pivot_plugin.recipes import load_recipe
from pivot_plugin.recipes.inputs import made

MAKERS: dict[str, Any] = {
    "captions": lambda seed: miniature.captions(6, seed),
    "conversations": lambda seed: miniature.conversations(6, seed),
    "pairs": lambda seed: miniature.pairs(6, seed, questions=0.5),
    "questions": lambda seed: miniature.questions(6, seed),
}


def words_of(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(value.replace("<image>", "").split())
    if isinstance(value, dict):
        return {w for k, v in value.items() if k not in ("role", "from", "type", "kind", "id") for w in words_of(v)}
    return {word for item in value for word in words_of(item)} if isinstance(value, list) else set()


def pixels_of(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(row.get("image") or row["images"][0])


@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_seed_gives_the_same_rows_in_words_the_tokenizer_has(kind: str) -> None:
    rows, again, others = (MAKERS[kind](seed) for seed in (1, 1, 2))
    assert all(np.array_equal(pixels_of(a), pixels_of(b)) for a, b in zip(rows, again, strict=True))
    assert words_of(rows) == words_of(again)
    assert not np.array_equal(pixels_of(rows[0]), pixels_of(others[0]))
    assert words_of(rows) <= set(miniature.tokenizer().get_vocab())


def test_answers_of_a_pair_differ_in_one_word_that_is_a_colour_or_a_shape() -> None:
    facts = {*scenes.COLOURS, *scenes.SHAPES}
    for pair in miniature.pairs(40, 3, fillers=4):
        chosen, rejected = (pair[side][0]["content"].split() for side in ("chosen", "rejected"))
        different = [(a, b) for a, b in zip(chosen, rejected, strict=True) if a != b]
        assert len(different) == 1 and set(different[0]) <= facts
        assert len(chosen) == len(pair["chosen"][0]["content"].split(" and ")) * 7 - 1
    load(miniature.pairs(10, 4, questions=1.0)).verify()  # type: ignore[union-attr]


def test_a_conversation_says_what_the_scene_holds() -> None:
    drawn = scenes.render_many(20, 5, style=scenes.FOGGY)
    for scene, row in zip(drawn, miniature.conversations(20, 5, fillers=0), strict=True):
        said = [turn["value"] for turn in row["conversations"]]
        assert said[1] == scene.caption()
        assert len(said) == 6
        for asked, answer in zip(said[2::2], said[3::2], strict=True):
            if asked.startswith("what color is the "):
                shape = asked.rsplit(" ", 1)[1]
                assert [item.colour for item in scene.objects if item.shape == shape] == [answer]
    load_conversations(miniature.conversations(5, 1)).verify()


def test_scenes_in_fog_are_larger_and_fewer_and_leave_the_others_as_they_were() -> None:
    for scene in scenes.render_many(30, 1, style=scenes.FOGGY):
        assert 1 <= len(scene.objects) <= 2
        assert all(15 <= item.box[2] - item.box[0] + 1 <= 22 for item in scene.objects)
    # the demonstration's scenes, pixel by pixel
    assert np.asarray(scenes.render_many(1, 0)[0].image).sum() == 685_558


@pytest.mark.training
def test_parts_are_trained_a_little_and_fit_together(tmp_path: Any) -> None:
    state = torch.get_rng_state()
    encoder, images = miniature.encoder(1, steps=2)
    again, _ = miniature.encoder(1, steps=2)
    untrained, _ = miniature.encoder(1, steps=0)
    model, tokens = miniature.language_model(1, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    for one, same, other in zip(encoder.parameters(), again.parameters(), untrained.parameters(), strict=True):
        assert torch.equal(one, same)
        assert one.shape == other.shape
    assert any(not torch.equal(a, b) for a, b in zip(encoder.parameters(), untrained.parameters(), strict=True))
    mllm, processor = pivot.assemble(encoder, model, feature_layer=-1, tokenizer=tokens, image_processor=images)
    inputs = processor(images=[miniature.captions(1)[0]["images"]], text=["<image>"], return_tensors="pt")
    assert mllm(**inputs).logits.shape[1] == (scenes.IMAGE_SIZE // miniature.PATCH_SIZE) ** 2


def test_every_source_of_the_ready_recipe_is_made() -> None:
    recipe = load_recipe("embedded")
    moved = recipe.transplant
    assert moved is not None
    select = recipe.optimize.select
    sections = [recipe.align, recipe.instruct, recipe.optimize, moved.align, moved.instruct]
    wanted = [one.data for one in (*sections, *recipe.evaluate.values(), select)]
    for data in wanted:
        few = {name: min(value, 2) for name, value in data.options.items() if name in ("count", "train", "test")}
        assert len(made(replace(data, options=data.options | few))) == 2
    # what is reported is no scene that was trained on or chosen by
    seeds = [data.options["seed"] for data in wanted]
    assert len(set(seeds)) == len(seeds)
