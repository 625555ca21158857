"""What every verb shares: options refused before anything is loaded, one plan, held-out rows, and a record."""

import os
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import pivot_plugin as pivot
from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.files import read_record
from pivot_plugin.runs.run import Run, RunOptions, begin
from pivot_plugin.runs.settings import configuration
from pivot_plugin.training import plan as plan_module
from pivot_plugin.training.processes import Processes
from tests.helpers import Tiny, picture, row
from tests.helpers.recipes import QUICK, conversations

VERBS = ("optimize", "instruct", "align")


def options_for(folder: Path, **changed: Any) -> RunOptions:
    config = configuration({"use_cpu": True}, folder, "dpo", "encoder", True, True)
    values = {"choices": {}, "lora": 4, "eval_fraction": 0.25, "on_bad_row": "raise", "resume": False}
    return RunOptions(config, **{**values, **changed})


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_fraction": -0.1}, "eval_fraction is -0.1"),
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"on_bad_row": "drop"}, "on_bad_row is 'drop'. Choose 'raise' or 'skip'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    verb: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        getattr(pivot, verb)("no-such-model", [], output_dir=tmp_path / "run", use_cpu=True, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["optimize", "instruct"])
def test_a_lora_of_another_kind_is_refused_before_anything_is_loaded(verb: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="lora is '16'"):
        getattr(pivot, verb)("no-such-model", [], lora="16", output_dir=tmp_path / "run", use_cpu=True)


@pytest.mark.parametrize("objective", ["dpo", "grpo", "instruct"])
def test_the_plan_is_made_once(
    objective: str, llava: Tiny, fast: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = []
    training_plan = plan_module.TrainingPlan
    monkeypatch.setattr(plan_module, "TrainingPlan", lambda *args: made.append(training_plan(*args)) or made[-1])
    model, processor = llava
    if objective == "instruct":
        settings = {name: value for name, value in QUICK.items() if name != "batch"} | {"output_dir": tmp_path / "run"}
        pivot.instruct(model, conversations(), processor=processor, train="all", lora=4, **settings)
    elif objective == "dpo":
        rows = [row(f"{n}?", "yes", "no", picture(40, 40, n)) for n in range(4)]
        pivot.optimize(model, rows, processor=processor, eval_fraction=0, **fast | {"max_steps": 1})
    else:
        questions = [{"image": picture(40, 40, n), "question": "how many?", "answer": str(n)} for n in range(4)]
        online = {"num_generations": 2, "max_completion_length": 4, "max_steps": 1, "eval_fraction": 0}
        pivot.optimize(model, questions, processor=processor, objective="grpo", **fast | online)
    assert len(made) == 1


def begun_alone(model: Any, processor: Any, options: RunOptions, load_rows: Any) -> Run:
    """A run of this process by itself."""
    return begin(model, processor, options, load_rows, Processes(options.config.distributed_state))


@pytest.fixture
def begun(llava: Tiny, tmp_path: Path) -> Run:
    rows = [row(f"{n}?", "yes", "no", picture(40, 40, n)) for n in range(16)]
    options = options_for(tmp_path / "run")
    return begun_alone(*llava, options, lambda judge: (PairDataset(rows).verify(judge=judge), None))


def test_a_share_of_the_rows_is_held_out_where_none_are_given(begun: Run) -> None:
    assert isinstance(begun.rows, PairDataset) and begun.held_out is not None
    assert (len(begun.rows), len(begun.held_out)) == (12, 4)
    assert not set(begun.rows.image_keys) & set(begun.held_out.image_keys)
    assert begun.config.eval_strategy == "steps" and begun.config.load_best_model_at_end


def test_where_too_few_rows_are_there_to_hold_some_out_the_watch_is_off(llava: Tiny, tmp_path: Path) -> None:
    pairs = PairDataset([row("?", "yes", "no", picture(40, 40, 1))])
    run = begun_alone(*llava, options_for(tmp_path / "run"), lambda judge: (pairs.verify(), None))
    assert run.held_out is None
    assert run.config.eval_strategy == "no" and not run.config.load_best_model_at_end


def test_rows_given_to_be_held_out_are_taken_as_they_are(llava: Tiny, tmp_path: Path) -> None:
    rows = PairDataset([row(f"{n}?", "yes", "no", picture(40, 40, n)) for n in range(16)]).verify()
    run = begun_alone(*llava, options_for(tmp_path / "run"), lambda judge: (rows, rows.select([0])))
    assert run.rows is rows and run.held_out is not None and len(run.held_out) == 1


def test_a_run_that_begins_leaves_a_record_that_is_not_finished(begun: Run) -> None:
    assert read_record(begun.output_dir) is None
    begun.announce()
    record = read_record(begun.output_dir)
    assert record is not None
    # by which a start that goes on is told from one that has failed
    assert record.pop("process")["pid"] == os.getpid()
    assert record == {"finished": False, "settings": begun.settings}


def test_the_settings_of_a_lora_are_the_same_in_every_process(tmp_path: Path) -> None:
    """peft keeps module names in a set, whose order differs from process to process; a resumed run compares them."""
    options = options_for(tmp_path, lora=LoraConfig(r=4, target_modules=["v_proj", "q_proj", "k_proj"]))
    assert options.settings["lora"]["target_modules"] == ["k_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("train", ["encoder", "projector", "encoder+projector"])
def test_rows_of_which_none_has_an_image_are_refused_where_no_text_reaches_what_trains(
    train: str, llava: Tiny, tmp_path: Path
) -> None:
    model, processor = llava
    rows = PairDataset([row("say hello", "hello", "good bye")] * 3)
    config = configuration({"use_cpu": True}, tmp_path / "run", "dpo", train, True, True)
    options = RunOptions(config, {}, None, 0.0, "raise", False)
    with pytest.raises(DataError, match="None of the 3 rows of prefs has an image, and only the "):
        begun_alone(model, processor, options, lambda judge: (rows, None))


def test_rows_without_image_train_the_language_model(llava: Tiny, tmp_path: Path) -> None:
    model, processor = llava
    rows = PairDataset([row("say hello", "hello", "good bye")] * 3)
    config = configuration({"use_cpu": True}, tmp_path / "run", "dpo", "all", True, True)
    run = begun_alone(model, processor, RunOptions(config, {}, None, 0.0, "raise", False), lambda judge: (rows, None))
    assert len(run.rows) == 3
