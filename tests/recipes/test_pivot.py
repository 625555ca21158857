"""The whole recipe on parts small enough for seconds: every stage, every control, resumed, refused, estimated."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, SiglipVisionConfig, SiglipVisionModel

from pivot_plugin import recipes
from pivot_plugin.errors import DataError, EncoderError, SettingsError
from pivot_plugin.hooks import hookimpl, manager
from pivot_plugin.recipes import PivotRecipe, evaluation, plan_recipe, run_recipe
from pivot_plugin.recipes.plan import MEASURED_STEPS
from pivot_plugin.recipes.transplant import kept_layers, load_transplant, transplant
from pivot_plugin.training.instruct_trainer import InstructTrainer
from pivot_plugin.training.pair_trainer import PivotTrainer
from tests.helpers.encoders import SIZED, encoder, language_model
from tests.helpers.processes import launched
from tests.helpers.recipes import QUICK, captions, conversations, pairs, questions

Made = Callable[..., PivotRecipe]
ENCODERS = ("original", "stage-1", "sft", "dpo")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModel.from_pretrained(folder).named_parameters())


def times(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith("results")
    }


def test_every_stage_leaves_a_folder_and_every_control_an_encoder(done: recipes.RecipeResult) -> None:
    place = done.output_dir / "seed-0"
    assert sorted(folder.name for folder in place.iterdir()) == [
        *("1-assemble", "2-align", "3-instruct", "4-optimize", "5-encoders", "6-transplant", "7-evaluate")
    ]
    assert tuple(done.encoders[0]) == ENCODERS
    found = {name: tensors(folder) for name, folder in done.encoders[0].items()}
    assert all(one.keys() == found["original"].keys() for one in found.values())
    for first, second in (("original", "stage-1"), ("stage-1", "sft"), ("stage-1", "dpo"), ("sft", "dpo")):
        assert any(not torch.equal(found[first][name], found[second][name]) for name in found[first]), (first, second)
    # alignment leaves the encoder alone
    aligned = AutoModelForImageTextToText.from_pretrained(place / "2-align" / "model").model.vision_tower
    for name, parameter in aligned.named_parameters():
        assert torch.equal(parameter, found["original"][name]), name


def test_a_transplant_holds_the_encoder_untouched_in_a_new_language_model(done: recipes.RecipeResult) -> None:
    place = done.output_dir / "seed-0" / "6-transplant"
    for name, folder in done.encoders[0].items():
        moved = AutoModelForImageTextToText.from_pretrained(place / name / "projector-0" / "3-instruct" / "model")
        assert type(moved.model.language_model).__name__ == "LlamaModel"
        for path, parameter in tensors(folder).items():
            assert torch.equal(moved.model.vision_tower.get_parameter(path), parameter), path


def test_scores_and_tables_have_every_encoder(done: recipes.RecipeResult) -> None:
    assert [(s.encoder, s.of, s.projector, s.score) for s in done.scores] == [
        (name, "transplant", "0", "answers all") for name in ENCODERS
    ]
    text = (done.output_dir / "results.md").read_text()
    assert text == f"{done}\n"
    for words in ("stage-1, projector 0", "stage-1 - original", "sft - stage-1", "dpo - stage-1", "dpo - sft"):
        assert words in text
    kept = json.loads((done.output_dir / "results.json").read_text())
    assert [score["value"] for score in kept["scores"]] == [score.value for score in done.scores]
    comparison = json.loads((done.output_dir / "seed-0" / "7-evaluate" / "transplant" / "comparison.json").read_text())
    assert len(comparison["compared"]) == 4


def test_what_is_done_is_not_done_again(
    recipe: Made, done: recipes.RecipeResult, copied: Path, monkeypatch: Any
) -> None:
    before = times(copied)
    for trainer in (InstructTrainer, PivotTrainer):
        monkeypatch.setattr(trainer, "train", lambda self, **given: pytest.fail("trained again"))
    again = run_recipe(recipe(), estimate=False)
    assert times(copied) == before
    assert again.scores == done.scores
    assert [stage.name for stage in again.stages] == [stage.name for stage in done.stages]


@pytest.mark.parametrize("where", ["2-align", "3-instruct", "4-optimize/dpo", "6-transplant/sft"])
def test_a_recipe_cut_off_anywhere_goes_on_to_the_same_end(
    recipe: Made, done: recipes.RecipeResult, copied: Path, monkeypatch: Any, where: str
) -> None:
    for folder in (copied / "seed-0").iterdir():
        if folder.name > where.split("/")[0]:
            shutil.rmtree(folder)
    shutil.rmtree(copied / "seed-0" / where)
    steps = {trainer: trainer.training_step for trainer in (InstructTrainer, PivotTrainer)}

    def cut(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert where in str(self.args.output_dir)
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return steps[InstructTrainer if isinstance(self, InstructTrainer) else PivotTrainer](self, *args, **kwargs)

    for trainer in steps:
        monkeypatch.setattr(trainer, "training_step", cut)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), estimate=False)
    monkeypatch.undo()
    result = run_recipe(recipe(), estimate=False)
    for name, folder in done.encoders[0].items():
        other = tensors(result.encoders[0][name])
        for path, parameter in tensors(folder).items():
            assert torch.allclose(parameter, other[path], atol=1e-6), (name, path)
    assert [s.value for s in result.scores] == [s.value for s in done.scores]


DIFFERENT = [
    (
        {"align": {"data": captions(), **QUICK, "learning_rate": 0.5}},
        "2-align",
        "had align.learning_rate=None, now it is 0.5",
    ),
    ({"assemble": {"feature_layer": -1}}, "1-assemble", "had assemble.feature_layer=None, now it is -1"),
    (
        {"instruct": {"data": conversations(4), **QUICK}},
        "3-instruct",
        "had instruct.data='list of 8', now it is 'list of 4'",
    ),
    ({"evaluate": {}}, None, ""),
]


@pytest.mark.parametrize(("other", "folder", "said"), DIFFERENT)
def test_a_folder_of_another_recipe_is_refused_by_the_option_that_differs(
    recipe: Made, copied: Path, other: dict[str, Any], folder: str | None, said: str
) -> None:
    if folder is None:
        assert not run_recipe(recipe(**other), estimate=False).scores
        return
    with pytest.raises(SettingsError) as error:
        run_recipe(recipe(**other), estimate=False)
    assert folder in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(("seeds_from", "shared"), [("assemble", 0), ("optimize", 3), ("transplant", 4)])
def test_seeds_begin_where_the_recipe_says(recipe: Made, copied: Path, seeds_from: str, shared: int) -> None:
    # all of seed 0 is done
    result = run_recipe(recipe(seeds=[0, 5], seeds_from=seeds_from, transplant=None, evaluate={}), estimate=False)
    one, two = result.encoders[0], result.encoders[5]
    assert all((folder / "config.json").is_file() for folder in (*one.values(), *two.values()))
    same = [one[name] == two[name] for name in ENCODERS]
    assert same == {0: [False] * 4, 3: [True, True, False, False], 4: [True] * 4}[shared]


def test_the_first_seed_chooses_the_rate_of_an_arm(recipe: Made, copied: Path, caplog: Any) -> None:
    arms = {"sft": {"learning_rate": [1e-5, 3e-1]}, "dpo": {"learning_rate": 1e-4}}
    given = replace(recipe().optimize, arms=arms, select="logps_chosen")  # type: ignore[arg-type]
    # stage 1 is done
    sections = {"optimize": given, "transplant": None, "evaluate": {}}
    result = run_recipe(recipe(**sections, seeds=[0, 1], seeds_from="optimize"), estimate=False)
    runs = {rate: result.output_dir / f"seed-0/4-optimize/sft/lr-{rate:g}/run.json" for rate in (1e-5, 3e-1)}
    scores = {r: json.loads(f.read_text())["metrics"]["after"]["logps_chosen"] for r, f in runs.items()}
    assert result.rates == {"sft": max(scores, key=lambda rate: scores[rate]), "dpo": 1e-4}
    assert "is at the edge of those tried" in caplog.text
    assert [p.name for p in (result.output_dir / "seed-1/4-optimize/sft").iterdir()] == [f"lr-{result.rates['sft']:g}"]


def test_a_probe_can_choose_the_rate(recipe: Made, copied: Path) -> None:
    select = {"probe": "vqa", "data": questions(), "options": {"rewards": "exact_match", "max_new_tokens": 2}}
    arms = {"sft": {"learning_rate": [1e-5, 1e-4]}}
    given = replace(recipe().optimize, arms=arms, select=select)  # type: ignore[arg-type]
    result = run_recipe(recipe(optimize=given, transplant=None, evaluate={}), estimate=False)
    # both answer nothing right: the first of equals
    assert result.rates == {"sft": 1e-5}


# The transplant by itself


@pytest.fixture
def tuned(done: recipes.RecipeResult) -> Path:
    return done.encoders[0]["dpo"]


@pytest.mark.parametrize(("variant", "layers"), [("0", 2), ("1+1", 2), ("2+2", 4)])
@pytest.mark.parametrize("width", [32, 64])
def test_kept_layers_are_the_tuned_ones_and_new_ones_bridge_widths(
    tuned: Path, tmp_path: Path, variant: str, layers: int, width: int
) -> None:
    model, tokens = language_model("llama")
    if width != 32:
        config = copy.deepcopy(model.config)
        config.hidden_size = width
        model = type(model)(config)
    moved, processor = transplant(tuned, model, variant, tokenizer=tokens)
    linear = [m for m in moved.model.multi_modal_projector.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == layers and linear[-1].out_features == width
    kept = load_file(tuned / "projector.safetensors")
    for number, path in enumerate(kept_layers(moved, variant), 1):
        weight = next(w for name, w in kept.items() if name.endswith(f"linear_{number}.weight"))
        assert torch.equal(moved.get_submodule(path).weight, weight)
    assert len(kept_layers(moved, variant)) == layers // 2 * (variant != "0")
    moved.save_pretrained(tmp_path / "moved")
    processor.save_pretrained(tmp_path / "moved")
    loaded, _ = load_transplant(tmp_path / "moved")
    assert loaded.state_dict().keys() == moved.state_dict().keys()
    for name, parameter in moved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name


@pytest.mark.parametrize("variant", ["1+1", "2+2"])
def test_kept_layers_stay_frozen_through_both_stages(recipe: Made, copied: Path, variant: str) -> None:
    shutil.rmtree(copied / "seed-0" / "6-transplant")
    shutil.rmtree(copied / "seed-0" / "7-evaluate")
    section = {"language_model": language_model("llama"), "projectors": [variant]}
    section |= {stage: {**QUICK, "learning_rate": 1e-2} for stage in ("align", "instruct")}
    result = run_recipe(recipe(transplant=section), estimate=False)
    place = copied / "seed-0" / "6-transplant" / "dpo" / f"projector-{variant}" / "3-instruct" / "model"
    moved, _ = load_transplant(place)
    kept = load_file(result.encoders[0]["dpo"] / "projector.safetensors")
    for number, path in enumerate(kept_layers(moved, variant), 1):
        weight = next(w for name, w in kept.items() if name.endswith(f"linear_{number}.weight"))
        assert torch.equal(moved.get_submodule(path).weight, weight)
    # the original was trained with no projector
    assert [(s.encoder, s.projector) for s in result.scores] == [
        ("original", "0"),
        *[(name, variant) for name in ENCODERS[1:]],
    ]


def test_layers_that_are_not_there_or_do_not_fit_cannot_be_kept(tuned: Path, copied: Path, tmp_path: Path) -> None:
    model, tokens = language_model("llama")
    with pytest.raises(EncoderError, match=r"There is no projector.safetensors with the encoder"):
        transplant(copied / "seed-0" / "1-assemble" / "encoder", model, "1+1", tokenizer=tokens)
    wide = SiglipVisionModel(SiglipVisionConfig(**{**SIZED, "hidden_size": 64}, vision_use_head=False))
    wide.save_pretrained(tmp_path / "wide")
    encoder("siglip")[1].save_pretrained(tmp_path / "wide")
    shutil.copy(tuned / "projector.safetensors", tmp_path / "wide")
    with pytest.raises(EncoderError, match="takes 48 numbers per patch, the encoder gives 64"):
        transplant(tmp_path / "wide", language_model("llama")[0], "1+1", tokenizer=tokens)


# What it costs, and what it is told


def test_the_plan_counts_the_steps_that_are_taken_and_measures_them(
    recipe: Made, caplog: Any, monkeypatch: Any
) -> None:
    caplog.set_level("INFO")
    options = {name: value for name, value in QUICK.items() if name != "max_steps"}
    sections = {
        "align": {"data": captions(10), **options},
        "instruct": {"data": conversations(9), **options, "num_train_epochs": 2},
        "optimize": {
            "data": pairs(),
            "eval_data": pairs(4),
            "arms": {"sft": {}, "dpo": {}},
            **options,
            "num_train_epochs": 3,
        },
    }
    small = recipe(**sections)
    result = run_recipe(small)
    plan = json.loads((result.output_dir / "plan.json").read_text())
    by_name = {stage["name"]: stage for stage in plan["stages"]}
    assert {name: (stage["runs"], stage["steps"]) for name, stage in by_name.items()} == {
        "align": (1, 3),
        "instruct": (1, 6),
        "optimize sft": (1, 6),
        "optimize dpo": (1, 6),
        "transplant align": (4, 2),
        "transplant instruct": (4, 2),
    }
    taken = {stage.name: stage.outcome.get("steps") for stage in result.stages}
    assert (taken["align"], taken["instruct"], taken["transplant dpo align"]) == (3, 6, 2)
    assert all(stage["seconds"] > 0 and stage["tokens"] > 0 for stage in by_name.values())
    record = json.loads((result.output_dir / "seed-0" / "2-align" / "run.json").read_text())
    assert by_name["align"]["tokens"] == pytest.approx(record["cost"]["language_tokens"], rel=0.1)
    assert "Training in all: about" in caplog.text
    # what has ended needs no trial
    monkeypatch.setattr(InstructTrainer, "train", lambda self, **given: pytest.fail("tried again"))
    monkeypatch.setattr(PivotTrainer, "train", lambda self, **given: pytest.fail("tried again"))
    run_recipe(small)
    again = {stage["name"]: stage for stage in json.loads((result.output_dir / "plan.json").read_text())["stages"]}
    assert again["align"]["tokens"] == record["cost"]["language_tokens"]
    assert not (result.output_dir / ".estimate").exists()
    assert MEASURED_STEPS > 1


def test_the_plan_says_what_it_does_not_know(recipe: Made) -> None:
    given = {"path": "somewhere", "sample": 100}
    plan = plan_recipe(recipe(align={"data": "somewhere.json"}, instruct={"data": given, "batch": 8}))
    assert [stage.steps for stage in plan.stages[:2]] == [None, 13]
    assert "?" in str(plan)


def test_a_batch_that_processes_cannot_make_up_is_refused(recipe: Made) -> None:
    with pytest.raises(SettingsError, match=r"A batch of 10 cannot be made up of 1 process"):
        plan_recipe(recipe(align={"data": captions(), "batch": 10, "per_device_train_batch_size": 4}))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"seeds": []}, "seeds is []"),
    ({"seeds": [1, 1]}, "seeds is [1, 1]"),
    ({"seeds_from": "start"}, "seeds_from is 'start'"),
    ({"align": {}}, "align has no data"),
    ({"align": {"data": captions(), "learning_rat": 1}}, "align has no key 'learning_rat'. Did you mean learning_rate"),
    ({"align": {"data": captions(), "train": "all"}}, "align has no key 'train'"),
    ({"align": {"data": {"rows": 3}}}, "align.data has neither path nor source"),
    ({"transplant": {"instruct": {"train": "all"}}}, "transplant.instruct has no key 'train'"),
    ({"transplant": {"projectors": "1+1"}}, "transplant.projectors is '1+1'. Give a list"),
    ({"evaluate": {"a": {"probe": "vqa"}}, "transplant": None}, "evaluate.a.of is 'transplant', and there is none"),
    ({"optimize": {"data": pairs(), "learning_rate": [1, 2], "arms": {"dpo": {}}}}, "nothing says how to choose"),
    ({"optimize": {"data": pairs(), "learning_rate": [], "arms": {"dpo": {}}}}, "an empty list of learning rates"),
    ({"seeds": ["a"]}, "seeds is ['a']"),
    ({"optimize": {"data": pairs(), "arms": {}}}, "optimize.arms names no arm"),
    ({"optimize": {"data": pairs(), "arms": {"dpoo": {}}}}, "optimize.arms.dpoo"),
    ({"optimize": {"data": pairs(), "arms": {"grpo": {}}}}, "which learns from questions"),
    ({"optimize": {"data": pairs(), "arms": {"original": {}}}}, "is the name of a control"),
    ({"optimize": {"data": pairs(), "arms": {"dpo": {"learning_rate": [1, 2]}}}}, "nothing says how to choose"),
    ({"transplant": {"projectors": ["3+1"]}}, "transplant.projectors has '3+1'"),
    ({"evaluate": {"a": {"data": "imagenet-1k"}}}, "evaluate.a names no probe"),
    ({"evaluate": {"a": {"probe": "vqa", "of": "all"}}}, "evaluate.a.of is 'all'"),
    ({"evaluate": {"a": {"probe": "vqa", "of": "transplant"}}, "transplant": None}, "and there is none"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_what_can_be_seen_without_loading_is_refused_at_once(recipe: Made, given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        recipe(**given)
    assert said in str(error.value)


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"align": {"data": [*captions(3), {"a": 1}]}}, "row 3 of align.data is no conversation"),
    ({"optimize": {"data": [*pairs(3), {**pairs(1)[0], "chosen": ""}], "arms": {"dpo": {}}}}, "row 3 of optimize.data"),
    ({"encoder": {"source": "embeded-encoder"}}, "There is no source 'embeded-encoder'"),
    ({"evaluate": {"a": {"probe": "linaer"}}}, "There is no probe 'linaer'"),
    ({"align": {"data": {"source": "embedded-captions", "rows": 3}, **QUICK}}, "Source 'embedded-captions'"),
]


@pytest.mark.parametrize(("given", "said"), UNKNOWN)
def test_what_nobody_has_is_named_before_the_first_stage(recipe: Made, given: dict[str, Any], said: str) -> None:
    made = recipe(**given)
    with pytest.raises((SettingsError, DataError)) as error:
        run_recipe(made)
    assert said in str(error.value)
    assert not Path(made.output_dir).exists()


def test_a_plugin_can_offer_what_a_recipe_names(recipe: Made) -> None:
    class Plugin:
        @hookimpl
        def pivot_sources(self) -> dict[str, Any]:
            return {"my-captions": captions, "my-encoder": lambda seed: encoder("siglip")[:2]}

    plugin = Plugin()
    manager().register(plugin)
    try:
        given = {"encoder": {"source": "my-encoder"}, "align": {"data": {"source": "my-captions", "count": 5}, **QUICK}}
        result = run_recipe(recipe(**given, transplant=None, evaluate={}), estimate=False)
    finally:
        manager().unregister(plugin)
    assert set(result.encoders[0]) == set(ENCODERS)


@pytest.mark.training
def test_the_verb_takes_loaded_parts(tmp_path: Path) -> None:
    tower, images, _ = encoder("dinov2")
    model, tokens = language_model("qwen2")
    before = {name: parameter.clone() for name, parameter in (*tower.named_parameters(), *model.named_parameters())}
    result = recipes.pivot(
        *(tower, model),
        tokenizer=tokens,
        image_processor=images,
        align={"data": captions(), **QUICK},
        instruct={"data": conversations(), **QUICK},
        optimize={"data": pairs(), "eval_fraction": 0, "arms": {"dpo": {}}, **QUICK},
        output_dir=tmp_path / "out",
        estimate=False,
    )
    assert set(result.encoders[0]) == {"original", "stage-1", "dpo"}
    for name, parameter in (*tower.named_parameters(), *model.named_parameters()):
        assert torch.equal(parameter, before[name]), name


def test_benchmarks_are_lmms_evals(recipe: Made, copied: Path, monkeypatch: Any) -> None:
    shutil.rmtree(copied / "seed-0" / "7-evaluate")
    asked: list[str] = []

    def run(model: str, **options: Any) -> dict[str, dict[str, float]]:
        asked.append(model)
        return {"mmvp": {"accuracy": 0.25, "stderr": 0.1}}

    monkeypatch.setattr(evaluation, "run_benchmarks", run)
    result = run_recipe(recipe(evaluate={"suite": {"probe": "lmms-eval"}}), estimate=False)
    assert [(s.score, s.value) for s in result.scores] == [("suite mmvp", 0.25)] * 4
    assert all("6-transplant" in model for model in asked) and len(asked) == 4


IN_TWO = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from pivot_plugin.recipes import run_recipe
from tests.helpers.recipes import small_recipe

run_recipe(small_recipe(Path(sys.argv[1]), size=int(sys.argv[2])))
"""


@pytest.mark.timeout(600)
def test_a_recipe_in_two_processes_ends_like_one_in_one(done: recipes.RecipeResult, tmp_path: Path) -> None:
    run = launched(IN_TWO, 2, 2, tmp_path / "two")
    # the first process to fail is not the last to speak
    assert run.returncode == 0, run.stderr[-30_000:]
    for name, folder in done.encoders[0].items():
        other = tensors(tmp_path / "two" / "run" / folder.relative_to(done.output_dir))
        for path, parameter in tensors(folder).items():
            assert parameter.allclose(other[path], rtol=1e-3, atol=1e-5), (name, path)
    kept = json.loads((tmp_path / "two" / "run" / "results.json").read_text())
    assert [score["encoder"] for score in kept["scores"]] == list(ENCODERS)
