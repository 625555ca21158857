"""SPECS: stages in order, each from the right start, resumed and skipped, and what trains said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from pivot_plugin import recipes
from pivot_plugin.data.layout import text_of
from pivot_plugin.errors import SettingsError
from pivot_plugin.preferences import load
from pivot_plugin.training.pair_trainer import PivotTrainer
from pivot_plugin.training.rollout_trainer import PivotGRPOTrainer
from tests.helpers import Tiny, picture

pytestmark = pytest.mark.training

FORMED = "<think>I count 3.</think><answer>3</answer>"


def questions(count: int = 6) -> list[dict[str, Any]]:
    return [{"question": f"how many {n}?", "image": picture(30, 30, n), "answer": "3"} for n in range(count)]


def by_length(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def engine(questions: Any, sampling: Any, seed: int) -> list[list[str]]:
    return [[FORMED, "4", "<think>so, 3</think> <answer>3</answer>"]] * len(questions)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    rollouts = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 5}
    return {
        "output_dir": tmp_path / "specs",
        "rewards": by_length,
        "lora": 4,
        "stages": {"zero": rollouts, "final": rollouts, "pairs": {"engine": engine, "n": 3}},
        "max_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "eval_fraction": 0,
        "warmup_steps": 0,
    }


def changed(first: Any, second: Any) -> set[str]:
    """Parts whose weights differ."""
    before = first.state_dict()
    names = {name for name, value in second.state_dict().items() if not torch.equal(value, before[name])}
    return {"encoder" if "vision_tower" in name else "language_model" for name in names if "projector" not in name}


def test_stages_follow_each_other_and_say_what_trains(llava: Tiny, options: dict[str, Any]) -> None:
    model, processor = llava
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = recipes.specs(model, questions(), processor=processor, **options)
    folder = options["output_dir"]
    assert [(stage.name, stage.trains) for stage in result.stages] == [
        ("zero", "language_model"),
        ("pairs", None),
        ("cold-start", "language_model"),
        ("final", "all"),
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    trained = {
        name: AutoModelForImageTextToText.from_pretrained(folder / name / "model")
        for name in ("1-zero", "3-cold-start", "4-final")
    }
    assert changed(model, trained["1-zero"]) == {"language_model"}
    assert changed(model, trained["3-cold-start"]) == {"language_model"}
    assert changed(trained["3-cold-start"], trained["4-final"]) == {"language_model", "encoder"}
    assert all(torch.equal(v, trained["4-final"].state_dict()[n]) for n, v in result.model.state_dict().items())
    records = {name: json.loads((folder / name / "run.json").read_text()) for name in trained}
    assert records["3-cold-start"]["settings"]["objective"] == "specs"
    assert records["4-final"]["settings"]["rewards"] == ["by_length"]
    for name in trained:
        assert (folder / name / "encoder" / "pivot.json").exists()
    assert [stage["name"] for stage in json.loads((folder / "specs.json").read_text())] == [
        "zero",
        "pairs",
        "cold-start",
        "final",
    ]


def test_pairs_are_ordinary_pairs_that_say_how_they_came_about(llava: Tiny, options: dict[str, Any]) -> None:
    recipes.specs(llava[0], questions(), processor=llava[1], skip=("zero", "final", "cold-start"), **options)
    pairs = load(options["output_dir"] / "2-pairs" / "pairs")
    assert len(pairs) == 6  # type: ignore[arg-type]
    first = next(iter(pairs[i] for i in range(6)))  # type: ignore[index]
    assert text_of(first["chosen"]) == FORMED
    assert first["source"].startswith("self-distilled, decoupled: ")
    card = (options["output_dir"] / "2-pairs" / "pairs" / "README.md").read_text()
    assert "Such pairs teach format, not seeing." in card


def test_a_killed_recipe_goes_on_and_finished_stages_are_not_run_again(
    llava: Tiny, options: dict[str, Any], monkeypatch: Any
) -> None:
    steps: list[tuple[str, int]] = []
    cut = [("3-cold-start", 1)]

    def counted(trainer: Any) -> Any:
        training_step = trainer.training_step

        def count(self: Any, *args: Any, **kwargs: Any) -> Any:
            step = (Path(self.args.output_dir).name, self.state.global_step)
            if step in cut:
                cut.remove(step)
                raise KeyboardInterrupt
            if step not in steps:
                steps.append(step)
            return training_step(self, *args, **kwargs)

        return count

    for trainer in (PivotTrainer, PivotGRPOTrainer):
        monkeypatch.setattr(trainer, "training_step", counted(trainer))
    chosen = options | {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        recipes.specs(llava[0], questions(), processor=llava[1], **chosen)
    assert steps == [("1-zero", 0), ("1-zero", 1), ("3-cold-start", 0)]
    steps.clear()
    result = recipes.specs(llava[0], questions(), processor=llava[1], **chosen)
    assert steps == [("3-cold-start", 1), ("4-final", 0), ("4-final", 1)]
    assert [stage.ran for stage in result.stages] == [False, False, True, True]
    assert all(stage.seconds > 0 for stage in result.stages)
    steps.clear()
    again = recipes.specs(llava[0], questions(), processor=llava[1], **chosen)
    assert not steps
    assert all(torch.equal(v, again.model.state_dict()[n]) for n, v in result.model.state_dict().items())
    assert [(s.name, s.trains, s.metrics) for s in again.stages] == [
        (s.name, s.trains, s.metrics) for s in result.stages
    ]


def test_finished_stages_with_other_settings_questions_or_starts_are_refused(
    llava: Tiny, options: dict[str, Any]
) -> None:
    recipes.specs(llava[0], questions(), processor=llava[1], skip=("cold-start", "final"), **options)
    per_stage = options["stages"]
    other: list[tuple[dict[str, Any], str, str]] = [
        ({"max_steps": 3}, "1-zero", "had max_steps=2, now it is 3"),
        ({"lora": 8}, "1-zero", "had lora=4, now it is 8"),
        ({"train": {"zero": "all"}}, "1-zero", "had train='language_model', now it is 'all'"),
        ({"rewards": "accuracy"}, "1-zero", "had rewards='by_length', now it is 'accuracy'"),
        ({"questions": questions(5)}, "1-zero", "had rows="),
        # the pairs follow from their own settings, and from what made the model that answered
        ({"stages": {**per_stage, "pairs": {"engine": engine, "n": 2}}}, "2-pairs", "had n=3, now it is 2"),
        ({"skip": ("zero", "cold-start", "final")}, "2-pairs", "had start."),
    ]
    for given, folder, said in other:
        chosen = {"questions": questions(), "skip": ("cold-start", "final"), **options, **given}
        with pytest.raises(SettingsError) as error:
            recipes.specs(llava[0], processor=llava[1], **chosen)
        assert folder in str(error.value) and said in str(error.value)


def test_parts_can_be_chosen_per_stage(llava: Tiny, options: dict[str, Any]) -> None:
    train = {"final": "encoder"}
    result = recipes.specs(
        llava[0], questions(), processor=llava[1], train=train, skip=("zero", "pairs", "cold-start"), **options
    )
    assert [(stage.name, stage.trains) for stage in result.stages] == [("final", "encoder")]
    assert changed(llava[0], result.model) == {"encoder"}


def test_the_instruction_stands_behind_every_question(llava: Tiny, options: dict[str, Any]) -> None:
    seen: list[str] = []

    def looks(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.extend(str(prompt) for prompt in prompts)
        return by_length(prompts, completions)

    chosen = options | {"rewards": looks, "instruction": "Think hard."}
    recipes.specs(llava[0], questions(), processor=llava[1], skip=("zero", "pairs", "cold-start"), **chosen)
    assert seen
    assert all("Think hard." in prompt for prompt in seen)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"skip": ("warm",)}, r"skip names \['warm'\]. The stages are zero, pairs, cold-start, final"),
        ({"train": {"warm": "all"}}, "train names"),
        ({"stages": {"warm": {}}}, "stages names"),
        ({"skip": ("pairs",)}, "the cold start has none"),
        ({"skip": ("zero", "pairs", "cold-start", "final")}, "All stages are skipped"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(wrong: Any, said: str, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=said):
        recipes.specs("no-model", questions(), **options | wrong)
