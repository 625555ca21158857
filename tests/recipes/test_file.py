"""Recipes as files: a wrong key is named with its line, and the ready ones can be planned to the step."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pivot_plugin.errors import SettingsError
from pivot_plugin.recipes import load_recipe, plan_recipe, ready_recipe
from pivot_plugin.recipes.file import READY
from pivot_plugin.recipes.sections import Arm, Tuning

TEXT = """\
encoder: some/encoder
language_model: some/model
align:
  data: captions.json
  learning_rate: 1e-3
instruct:
  data: {path: talk.json, rows: 640}
  learning_rates:
    encoder: 2e-6
optimize:
  data: pairs
  max_steps: 10
  arms:
    sft: {}
    dpo:
      learning_rate: 1e-6
evaluate:
  scores:
    probe: linear
    data: imagenet-1k
    options: {projected: true}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_file_says_what_python_would(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, TEXT))
    assert recipe.align == Tuning(data="captions.json", settings={"learning_rate": 1e-3})
    assert recipe.instruct.settings["learning_rates"] == {"encoder": 2e-6}
    assert recipe.optimize.arms == {"sft": Arm(), "dpo": Arm(learning_rate=1e-6)}
    assert (recipe.seeds, recipe.seeds_from, recipe.transplant) == ([0], "assemble", None)


# what is replaced, by what, the line that is named, and the words
WRONG = [
    ("encoder: some", "encodr: some", 1, "a recipe has no key 'encodr'. Did you mean encoder?"),
    ("  learning_rate: 1e-3", "  learning_rat: 1e-3", 5, "align has no key 'learning_rat'. Did you mean learning_rate"),
    ("rows: 640", "row: 640", 7, "instruct.data has no key 'row'"),
    ("      learning_rate: 1e-6", "      learnin_rate: 1e-6", 16, "optimize.arms.dpo has no key 'learnin_rate'"),
    ("    probe: linear", "    prob: linear", 19, "evaluate.scores has no key 'prob'"),
    ("    sft: {}", "    stf: {}", 14, "optimize.arms.stf"),
    ("instruct:", "align:", 6, "align stands there again, after line 3"),
    ("  learning_rate: 1e-3", "  learning_rate: {a: 1}", 5, "align.learning_rate is a mapping"),
    ("  learning_rate: 1e-3", "  learning_rate: [1e-3]", 5, "align.learning_rate is [0.001]. Give a number."),
    ("  learning_rate: 1e-3", "  learning_rate: fast", 5, "align.learning_rate is 'fast'. Give a number."),
    ("  learning_rate: 1e-3", "  batch: true", 5, "align.batch is True. Give a whole number or null."),
    ("  learning_rate: 1e-3", "  gradient_checkpointing: 1", 5, "align.gradient_checkpointing is 1. Give true or"),
    ("rows: 640", "rows: many", 7, "instruct.data.rows is 'many'"),
    ("path: talk.json, ", "", 7, "instruct.data has neither path nor source"),
    ("    encoder: 2e-6", "    encoder: slow", 8, "instruct.learning_rates is a mapping"),
    ("  data: pairs", "  data: 7", 11, "optimize.data is 7. Give a path, a Hub id"),
    ("  data: pairs", "  data: {path: a, image_folder: b}", 11, "optimize.data has an image_folder"),
    ("  max_steps: 10", "  on_bad_row: drop", 12, "optimize.on_bad_row is 'drop'. Give one of 'raise', 'skip'"),
    ("  max_steps: 10", "  eval_fraction: 2", 12, "optimize.eval_fraction is 2"),
    ("    sft: {}", "    sft: 3", 14, "optimize.arms.sft is 3. Give a mapping"),
    ("    probe: linear", "    probe: [linear]", 19, "evaluate.scores.probe is ['linear']"),
    ("    data: imagenet-1k", "    data: {path: a, split: b}", 20, "evaluate.scores.data has more than a path"),
    ("    options: {projected: true}", "    options: [1]", 21, "evaluate.scores.options is [1]. Give a mapping"),
    ("encoder: some/encoder", "encoder: 3", 1, "encoder is 3. Give its folder, Hub id"),
    ("encoder: some/encoder", "encoder: {name: a}", 1, "encoder names no source"),
    ("language_model: some/model\n", "", None, "lacks language_model"),
    ("  data: pairs\n", "", 10, "optimize has no data"),
    ("optimize:", "optimize: [", None, "is not YAML"),
]


@pytest.mark.parametrize(("old", "new", "line", "said"), WRONG)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, old: str, new: str, line: int | None, said: str) -> None:
    assert TEXT.count(old) == 1 or old == "instruct:"
    with pytest.raises(SettingsError) as error:
        load_recipe(written(tmp_path, TEXT.replace(old, new, 1)))
    assert said in str(error.value)
    assert ("mine.yaml" if line is None else f"mine.yaml, line {line}:") in str(error.value)


def test_a_setting_with_a_value_that_cannot_be_is_refused_by_the_plan(tmp_path: Path) -> None:
    path = written(tmp_path, TEXT.replace("learning_rates:\n    encoder: 2e-6", "learning_rates:\n    tower: 2e-6"))
    with pytest.raises(SettingsError, match=r"learning_rates names \['tower'\]"):
        plan_recipe(load_recipe(path))


def test_sections_left_empty_and_merged_keys_are_read_as_yaml_means_them(tmp_path: Path) -> None:
    text = TEXT.replace("    sft: {}", "    sft:").replace("  learning_rate: 1e-3", "  <<: {batch: 4}")
    recipe = load_recipe(written(tmp_path, text + "assemble:\n"))
    assert recipe.optimize.arms["sft"] == Arm()
    assert recipe.align == Tuning(data="captions.json", batch=4)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just words"])
def test_a_file_without_keys_is_no_recipe(tmp_path: Path, content: str) -> None:
    with pytest.raises(SettingsError, match=r"mine\.yaml"):
        load_recipe(written(tmp_path, content))


def test_a_recipe_that_is_not_there_is_named_with_the_ready_ones() -> None:
    with pytest.raises(SettingsError, match=r"papr.*paper, single-gpu, embedded, twin"):
        load_recipe("papr")


@pytest.mark.parametrize("name", [name for name in READY if name != "twin"])
def test_a_ready_recipe_is_whole(name: str) -> None:
    plan = plan_recipe(load_recipe(name))
    assert all(stage.steps for stage in plan.stages)
    assert {stage.name for stage in plan.stages} == {
        *("align", "instruct", "optimize sft", "optimize dpo", "transplant align", "transplant instruct")
    }


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    recipe = load_recipe("paper")
    plan = {stage.name: stage for stage in plan_recipe(recipe).stages}
    # batch 256 throughout: 558K captions, 3.2M conversations, 3 epochs of 20K pairs, 737K conversations
    assert {stage.batch for stage in plan.values()} == {256}
    assert plan["align"].steps == 2180
    assert plan["instruct"].steps == 12500
    # the paper's "about 234" are 60,000 / 256; every epoch ends with a short batch
    assert plan["optimize dpo"].steps == plan["optimize sft"].steps == 237
    assert plan["transplant instruct"].steps == 2879
    rates: dict[str, Any] = {name: arm.learning_rate for name, arm in recipe.optimize.arms.items()}
    assert rates == {"sft": 5e-6, "dpo": 1e-6}
    moved = recipe.transplant
    assert moved is not None
    assert recipe.align.settings["learning_rate"] == moved.align.settings["learning_rate"] == 1e-3
    assert recipe.instruct.settings["learning_rate"] == moved.instruct.settings["learning_rate"] == 1e-5
    assert recipe.instruct.settings["learning_rates"] == {"encoder": 2e-6}
    assert (recipe.optimize.settings["beta"], recipe.optimize.lora, recipe.optimize.train) == (0.1, None, "all")
    assert moved.projectors == ("1+1",)


def test_every_value_of_the_papers_recipe_names_its_place() -> None:
    text = ready_recipe("paper")
    ours = ("encoder:", "output_dir:", "seeds:", "seeds_from:", "plain:", "{path:", "data: {", "options", "evaluate:")
    for line in text.splitlines():
        body, _, comment = line.partition("#")
        key = body.strip()
        if ":" not in key or key.endswith(":") or key.startswith(ours):
            continue
        assert comment.strip(), line
    assert yaml.safe_load(text)["encoder"].startswith("google/siglip2")
