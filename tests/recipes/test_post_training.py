"""A recipe that begins with an MLLM: TWIN's numbers to the step, its rows as they are published, and a run of it."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from pivot_plugin.cli.app import cli
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.preferences import load, load_questions
from pivot_plugin.recipes import PostTraining, load_recipe, plan_recipe, ready_recipe, run_recipe
from pivot_plugin.recipes.post_training import RolloutArm
from tests.helpers import picture


def twin_rows(folder: Path, count: int) -> Path:
    """Rows as glab-caltech/TWIN has them: the names of two image files, a question, a verdict."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(count):
        same = number % 2 == 0
        for side in (1, 2):
            seed = number if same or side == 1 else 100 + number
            picture(40, 40, seed).save(folder / "images" / f"{number}_{side}.png")
        row = {
            "image_1": f"images/{number}_1.png",
            "image_2": f"images/{number}_2.png",
            "question": "Do these two show the same object? Say yes or no in <answer> tags.",
            "answer": "yes" if same else "no",
        }
        lines.append(json.dumps(row))
    (folder / "twin.jsonl").write_text("\n".join(lines))
    return folder / "twin.jsonl"


def test_rows_of_twin_are_questions_about_two_pictures_and_pairs_of_verdicts(tmp_path: Path) -> None:
    path = twin_rows(tmp_path, 4)
    question = load_questions(path)[1]
    assert question["answer"] == "no"
    assert [part["type"] for part in question["prompt"][0]["content"]] == ["image", "image", "text"]
    assert [image.tobytes() for image in question["images"]] == [picture(40, 40, n).tobytes() for n in (1, 101)]
    pair = load(path)[1]
    assert [pair[side][0]["content"][0]["text"] for side in ("chosen", "rejected")] == ["no", "yes"]
    assert pair["image_key"] == question["image_key"]
    rows = [{**json.loads(line), "answer": answer} for line, answer in zip(path.open(), ("Yes.", "SAME"), strict=False)]
    images = {name: picture(40, 40, 1) for name in ("image_1", "image_2")}
    said = load([{**row, **images} for row in rows])
    texts = [[said[n][side][0]["content"][0]["text"] for side in ("chosen", "rejected")] for n in (0, 1)]
    assert texts == [["Yes.", "No."], ["SAME", "DIFFERENT"]]
    with pytest.raises(DataError, match=r"row 0 of prefs: answer is 'a cat'.*contrary"):
        load([{**rows[0], **images, "answer": "a cat"}])[0]


def test_twin_has_the_numbers_of_its_scripts() -> None:
    recipe = load_recipe("twin")
    assert isinstance(recipe, PostTraining)
    plan = {stage.name: stage for stage in plan_recipe(recipe).stages}
    # 561K pairs but for those held out, 480 of them a step, once
    steps = math.ceil(561_000 * (1 - recipe.eval_fraction) / 480)
    assert {name: (stage.batch, stage.steps, stage.runs) for name, stage in plan.items()} == dict.fromkeys(
        ("grpo", "sft", "dpo"), (480, steps, 1)
    )
    assert steps == 1159
    grpo = recipe.arms["grpo"]
    assert isinstance(grpo, RolloutArm)
    assert grpo.rewards == {"accuracy": 1.0}
    wanted = {"num_generations": 5, "learning_rate": 1e-6, "beta": 0.01, "max_completion_length": 2048}
    assert wanted.items() <= grpo.settings.items()
    options = recipe.options("grpo")
    # five roll-outs of each of 480 questions
    assert options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] == 2400
    assert recipe.model == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert {label: one.probe for label, one in recipe.evaluate.items()} == {
        "pets": "linear",
        "cifar": "knn",
        "segmentation": "segmentation",
    }
    printed = CliRunner().invoke(cli, ["recipe", "run", "twin", "--dry-run", "--json"])
    assert [stage["steps"] for stage in json.loads(printed.stdout)["stages"]] == [steps] * 3


WRONG = [
    ("num_generations: 5", "num_generation: 5", "arms.grpo has no key 'num_generation'. Did you mean num_generations"),
    ("  sft:\n    batch: 480", "  stf:\n    batch: 480", "arms.stf"),
    ("train: all", "train: al", "train is 'al'"),
    ("rewards: {accuracy: 1.0}", "rewards: {accurate: 1.0}", "arms.grpo.rewards: There is no reward 'accurate'"),
    ("eval_fraction: 0.009", "eval_fraction: 2", "eval_fraction is 2"),
    ("probe: knn,", "probe: knn, of: encoder,", "evaluate.cifar.of is 'encoder'"),
    ("    beta: 0.01", "    max_length: 7", "arms.grpo has no key 'max_length'"),
    ("model: Qwen", "model: 3 #", "model is 3"),
]


@pytest.mark.parametrize(("old", "new", "said"), WRONG)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = ready_recipe("twin")
    assert text.count(old) == 1
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(SettingsError) as error:
        load_recipe(path)
    assert said in str(error.value)
    line = next(n for n, line in enumerate(path.read_text().splitlines(), 1) if new.splitlines()[0] in line)
    assert f"mine.yaml, line {line}" in str(error.value)


def test_a_batch_that_processes_cannot_make_up_is_refused_by_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(ready_recipe("twin").replace("per_device_train_batch_size: 60", "per_device_train_batch_size: 70"))
    with pytest.raises(SettingsError, match="A batch of 2400 cannot be made up"):
        plan_recipe(load_recipe(path))


@pytest.mark.training
def test_a_recipe_of_this_kind_is_run_and_goes_on_where_it_stopped(make: Any, tmp_path: Path) -> None:
    model, processor = make("llava")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "mllm")
    rows = twin_rows(tmp_path / "TWIN", 6)
    small = {"batch": 2, "max_steps": 1, "use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True}
    small |= {"save_strategy": "no", "gradient_checkpointing": False, "warmup_steps": 0}
    written = {
        "model": str(tmp_path / "mllm"),
        "data": {"path": str(rows), "sample": 4},
        "output_dir": str(tmp_path / "out"),
        "eval_fraction": 0.0,
        "arms": {
            "grpo": {**small, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4},
            "sft": {**small, "per_device_train_batch_size": 2},
        },
    }
    written["arms"]["grpo"]["rewards"] = {"accuracy": 1.0}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(written))
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert isinstance(recipe, PostTraining)
    colours = [
        Image.new("RGB", (40, 40), (80 * label + seed, 90, 200 - seed)) for seed in range(4) for label in range(3)
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    data = datasets.Dataset.from_dict({"image": colours, "label": [0, 1, 2] * 4}, features=features)
    recipe = PostTraining(**{**vars(recipe), "evaluate": {"colours": {"probe": "knn", "data": data}}})
    result = run_recipe(recipe)
    assert [(stage.name, stage.ran) for stage in result.stages] == [("grpo, seed 0", True), ("sft, seed 0", True)]
    comparison = result.comparisons[0]
    assert comparison.names == ["base", "grpo", "sft"]
    assert comparison.tower_changes["sft"].trained
    of_seed = tmp_path / "out" / "seed-0"
    assert (of_seed / "comparison.json").is_file() and (of_seed / "sft" / "encoder" / "pivot.json").is_file()
    assert len(list((of_seed / "towers").iterdir())) == 3
    again = run_recipe(recipe)
    assert [stage.ran for stage in again.stages] == [False, False]
    assert "The weights of the tower of sft" in str(again)
