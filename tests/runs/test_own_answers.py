"""A run on questions whose pairs are the model's own answers: the pairs, what is counted, rounds, and going on."""

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin.errors import DataError, SettingsError, TrainingError
from pivot_plugin.generation.engines import Sampling, TransformersEngine
from pivot_plugin.preferences import load
from tests.helpers import Tiny, picture, row

SAID = ["right", "wrong", "right indeed", "", "wrong too", "right"]


def questions(count: int = 8) -> list[dict[str, Any]]:
    return [
        {"images": [picture(40, 40, number)], "question": f"how many {number}?", "answer": "right"}
        for number in range(count)
    ]


def begins_right(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
    return [float(said[0]["content"].startswith(right)) for said, right in zip(completions, answer, strict=True)]


class Scripted:
    """An engine that says what it is told to; it may die at a question, or after so many."""

    def __init__(
        self,
        texts: Sequence[str] = SAID,
        fails_at: int | None = None,
        dies_after: int | None = None,
        alike: Sequence[int] = (),
    ) -> None:
        self.texts, self.fails_at, self.dies_after, self.alike = list(texts), fails_at, dies_after, set(alike)
        self.asked: list[tuple[str, int]] = []

    def __call__(self, asked: Sequence[dict[str, Any]], sampling: Sampling, seed: int) -> list[list[str]]:
        answers = []
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise ConnectionError("the server is gone")
        for question in asked:
            text = question["prompt"][-1]["content"][-1]["text"]
            number = int("".join(filter(str.isdigit, text)))
            if self.fails_at is not None and number >= self.fails_at:
                raise ConnectionError("the server is gone")
            before = sum(earlier == text for earlier, _ in self.asked)
            self.asked.append((text, seed))
            silent = number in self.alike and not before
            answers.append(["no", "never"] * 3 if silent else self.texts[: sampling.n])
        return answers


@pytest.fixture
def asking(fast: dict[str, Any]) -> dict[str, Any]:
    return fast | {"rewards": [begins_right], "samples": 6, "eval_fraction": 0, "max_steps": 2, "lora": 4}


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_answers_become_pairs_that_are_trained_on(llava: Tiny, asking: dict[str, Any], objective: str) -> None:
    model, processor = llava
    result = pivot.optimize(model, questions(), processor=processor, objective=objective, engine=Scripted(), **asking)
    (summary,) = result.answers
    assert (summary.questions, summary.paired, summary.share, summary.pairs) == (8, 8, 1.0, 8)
    assert (summary.score_chosen, summary.score_rejected) == (1.0, 0.0)
    kept = load(str(result.output_dir / "own-answers" / "pairs"))
    assert len(kept) == 8
    pair = kept[3]
    assert pair["prompt"][0]["content"][-1]["text"] == "how many 3?"
    assert [pair[side][0]["content"][0]["text"] for side in ("chosen", "rejected")] == ["right", "wrong too"]
    assert pair["images"][0].tobytes() == picture(40, 40, 3).tobytes()
    record = json.loads((result.output_dir / "run.json").read_text())
    assert record["answers"][0]["paired"] == 8
    assert (record["settings"]["samples"], record["settings"]["rewards"]) == (6, ["begins_right"])
    assert record["origin"]["data"] | {"fingerprint": ""} == {
        "name": "own answers to questions",
        "rows": 8,
        "fingerprint": "",
        "held_out": 0,
    }
    assert any(change > 0 for change in result.weight_change.values())


def test_training_is_what_it_is_on_the_pairs_that_were_kept(llava: Tiny, asking: dict[str, Any]) -> None:
    model, processor = llava
    other = copy.deepcopy(model)
    first = pivot.optimize(model, questions(), processor=processor, engine=Scripted(), **asking)
    plain = {name: asking[name] for name in asking if name not in ("rewards", "samples", "output_dir")}
    again = pivot.optimize(
        other,
        str(first.output_dir / "own-answers" / "pairs"),
        processor=processor,
        output_dir=first.output_dir.with_name("again"),
        **plain,
    )
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_what_gave_no_pair_is_counted_and_asked_again(
    llava: Tiny, asking: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Scripted(alike=[2, 5])
    with caplog.at_level(logging.INFO):
        result = pivot.optimize(llava[0], questions(), processor=llava[1], redraw=3, engine=engine, **asking)
    (summary,) = result.answers
    assert (summary.paired, summary.alike, summary.redrawn, summary.won) == (8, 0, 2, 2)
    # the two are asked once more, with other random numbers, and nobody else is
    again = engine.asked[8:]
    assert [text for text, _ in again] == ["how many 2?", "how many 5?"]
    assert not {seed for _, seed in again} & {seed for _, seed in engine.asked[:8]}
    assert "8 of 8 questions gave a pair (100 %); asked again 2, of which 2 gave one then." in caplog.text
    assert "Mean score of the chosen answers 1.000, of the rejected 0.000." in caplog.text
    assert caplog.text.count("Example ") == 3


def test_without_redraw_silent_questions_are_left_out(llava: Tiny, asking: dict[str, Any]) -> None:
    result = pivot.optimize(llava[0], questions(), processor=llava[1], engine=Scripted(alike=[2, 5]), **asking)
    (summary,) = result.answers
    assert (summary.paired, summary.alike, summary.redrawn, summary.pairs) == (6, 2, 0, 6)


def test_held_out_questions_are_answered_too_and_no_image_is_on_both_sides(llava: Tiny, asking: dict[str, Any]) -> None:
    result = pivot.optimize(
        llava[0], questions(12), processor=llava[1], engine=Scripted(), **asking | {"eval_fraction": 0.25}
    )
    folder = result.output_dir / "own-answers"
    trained, held_out = load(str(folder / "pairs")), load(str(folder / "held-out" / "pairs"))
    assert (len(trained), len(held_out)) == (9, 3)
    assert not set(trained.image_keys) & set(held_out.image_keys)
    assert result.metrics["before"].keys() == result.metrics["after"].keys() >= {"preference_accuracy"}


def test_what_an_engine_gave_before_it_died_is_kept(llava: Tiny, asking: dict[str, Any]) -> None:
    model, processor = llava
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    asking = asking | {"sampling_batch_size": 2}
    with pytest.raises(TrainingError, match="The engine failed at questions 4 to 5 with ConnectionError: the server"):
        pivot.optimize(model, questions(), processor=processor, engine=Scripted(fails_at=5), **asking)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    lines = (Path(asking["output_dir"]) / "own-answers" / "draw-0" / "candidates.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 4
    engine = Scripted()
    result = pivot.optimize(model, questions(), processor=processor, engine=engine, **asking)
    assert [text for text, _ in engine.asked] == [f"how many {number}?" for number in range(4, 8)]
    assert result.answers[0].paired == 8


def test_answers_are_scored_and_asked_for_once(llava: Tiny, asking: dict[str, Any]) -> None:
    """A run that dies in training goes on without a question and without a score."""
    model, processor = llava
    calls: list[int] = []

    def counted(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
        calls.append(len(completions))
        return begins_right(prompts, completions, answer)

    broken = asking | {"rewards": [counted], "learning_rate": 1e9}
    with pytest.raises(TrainingError):
        pivot.optimize(model, questions(), processor=processor, engine=Scripted(), **broken)
    assert len(calls) == 1
    pairs = Path(asking["output_dir"]) / "own-answers" / "pairs"
    assert len(load(str(pairs))) == 8
    engine = Scripted()
    mended = asking | {"rewards": [counted], "learning_rate": 1e-3}
    with pytest.raises(SettingsError, match="had learning_rate"):
        pivot.optimize(model, questions(), processor=processor, engine=engine, **mended, resume=True)
    (Path(asking["output_dir"]) / "run.json").unlink()
    pivot.optimize(model, questions(), processor=processor, engine=engine, **mended)
    assert (engine.asked, len(calls)) == ([], 1)


@pytest.mark.parametrize("reference", ["previous", "first"])
def test_a_second_round_asks_the_trained_policy(llava: Tiny, asking: dict[str, Any], reference: str) -> None:
    """Two rounds are two runs one after the other; the second's answers are the trained model's own."""
    model, processor = llava
    untouched, by_hand = copy.deepcopy(model), copy.deepcopy(model)

    def by_length(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [float(len(said[0]["content"])) for said in completions]

    settings = asking | {"rewards": [by_length], "samples": 4, "max_new_tokens": 6, "learning_rate": 2e-2}
    result = pivot.optimize(model, questions(), processor=processor, rounds=2, reference=reference, **settings)
    folder = result.output_dir
    assert len(result.answers) == 2
    one = json.loads((folder / "round-1" / "run.json").read_text())
    assert one["finished"]
    first = pivot.optimize(
        by_hand, questions(), processor=processor, **settings | {"output_dir": folder.with_name("one")}
    )
    assert first.weight_change == pytest.approx(one["weight_change"], rel=1e-5)
    pairs = {name: load(str(folder / part / "own-answers" / "pairs")) for name, part in (("1", "round-1"), ("2", ""))}
    assert pairs["1"].fingerprint() != pairs["2"].fingerprint()
    # the second round's first answers are those of the model after one round
    drawn = json.loads((folder / "own-answers" / "draw-0" / "candidates.jsonl").read_text().splitlines()[1])
    asked = pivot.preferences.load_questions(questions())
    from pivot_plugin.generation.sampling import _seed

    engine = TransformersEngine(first.model, processor)
    rows = [asked[position] for position in range(8)]
    assert drawn["completions"] == engine(rows, Sampling(4, 1.0, 1.0, 6), _seed(42 + 101, 0))[0]
    # and held against the reference that was asked for
    reference_model = untouched if reference == "first" else first.model
    plain = {name: settings[name] for name in settings if name not in ("rewards", "samples", "max_new_tokens")}
    from pivot_plugin.config import PivotConfig
    from pivot_plugin.training.pair_trainer import PivotTrainer

    kept = {name: value for name, value in plain.items() if name not in ("lora", "eval_fraction", "output_dir")}
    trainer = PivotTrainer(
        copy.deepcopy(first.model),
        PivotConfig(output_dir=str(folder.with_name("two")), **kept),
        str(folder / "own-answers" / "pairs"),
        processing_class=processor,
        lora=4,
        ref_model=copy.deepcopy(reference_model),
    )
    history = [entry["rewards/margins"] for entry in result.history if "rewards/margins" in entry]
    expected = trainer.train_dataset["ref_chosen_logps"]
    assert len(expected) == len(pairs["2"])
    # before its first step a policy that is its own reference has no margin
    assert (abs(history[0]) < 1e-5) == (reference == "previous")


def test_rounds_go_on_in_the_round_that_was_cut_off(llava: Tiny, asking: dict[str, Any]) -> None:
    model, processor = llava
    whole_model, cut = copy.deepcopy(model), copy.deepcopy(model)
    settings = asking | {"rounds": 2, "learning_rate": 2e-2}
    whole = pivot.optimize(
        whole_model,
        questions(),
        processor=processor,
        engine=Scripted(),
        **settings | {"output_dir": Path(asking["output_dir"]).with_name("whole")},
    )

    before = {name: weight.clone() for name, weight in cut.state_dict().items()}
    with pytest.raises(TrainingError, match="engine failed"):
        pivot.optimize(cut, questions(), processor=processor, engine=Scripted(dies_after=8), **settings)
    assert all(torch.equal(weight, before[name]) for name, weight in cut.state_dict().items())
    with pytest.raises(SettingsError, match="holds an earlier run"):
        pivot.optimize(cut, questions(), processor=processor, engine=Scripted(), **settings)
    other = copy.deepcopy(cut)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.5)
    with pytest.raises(SettingsError, match="began with a model of other weights"):
        pivot.optimize(other, questions(), processor=processor, engine=Scripted(), resume=True, **settings)
    engine = Scripted()
    result = pivot.optimize(cut, questions(), processor=processor, engine=engine, resume=True, **settings)
    assert len(engine.asked) == 8
    assert [summary.paired for summary in result.answers] == [8, 8]
    for name, weight in whole.model.state_dict().items():
        assert torch.allclose(weight, result.model.state_dict()[name], atol=1e-6), name
    assert result.weight_change == pytest.approx(whole.weight_change, rel=1e-4)


PAIRS = [row("what is it?", "a red cat", "a red dog!", picture(60, 60, 1))] * 4
BAD = [
    (questions(), {"rewards": "numeric", "samples": 1}, SettingsError, "samples is 1. Give 2 or more"),
    (questions(), {"rewards": "numeric", "rounds": 0}, SettingsError, "rounds is 0. Give 1 or more"),
    (questions(), {"rewards": "numeric", "rounds": 1.5}, SettingsError, "rounds is 1.5. Give 1 or more, a whole"),
    (questions(), {"rewards": "numeric", "margin": float("nan")}, SettingsError, "margin is nan. Give 0 or more"),
    (
        questions(),
        {"rewards": "numeric", "engine": lambda asked, sampling, seed: [[1, 2]] * len(asked)},
        TrainingError,
        "engine gave .*1, 2.* for question 0. An engine returns 8 texts",
    ),
    (questions(), {"rewards": "numeric", "engine": lambda *_: []}, TrainingError, "gave a list of 0 for 8 questions"),
    (questions(), {"rewards": "numeric", "redraw": -1}, SettingsError, "redraw is -1. Give 0 or more"),
    (questions(), {"rewards": "numeric", "reference": "last"}, SettingsError, "reference is 'last'"),
    (questions(), {"rewards": "numeric", "temperature": 0}, SettingsError, "temperature is 0"),
    (questions(), {"rewards": "numeric", "sample": 4}, SettingsError, "no option 'sample'. Did you mean samples"),
    (questions(), {"rewards": "numerik"}, SettingsError, "no reward 'numerik'"),
    (questions(), {"rewards": ["numeric"], "reward_weights": [1.0, 2.0]}, SettingsError, "1 rewards and 2 weights"),
    (PAIRS, {"rewards": "numeric"}, SettingsError, "are preference pairs .*rewards are given"),
    (load(PAIRS), {"rewards": "numeric"}, SettingsError, "holds preference pairs.*rewards are given"),
    (PAIRS, {"samples": 4}, SettingsError, "samples is given, and objective='dpo' makes no pairs"),
    (
        questions(),
        {"rewards": "numeric", "objective": "grpo", "rounds": 2},
        SettingsError,
        "rounds is given.*roll-outs",
    ),
    ([{"question": "what?"}], {"rewards": "accuracy"}, DataError, "row 0 of prefs has no 'answer'|row 0 of questions"),
    ([{"question": "what?"}], {"rewards": begins_right}, DataError, "'begins_right' needs a column 'answer'"),
    (questions(), {"rewards": "numeric", "engine": Scripted([""] * 8)}, DataError, "model answers nothing: of 8"),
    (questions(), {"rewards": begins_right, "engine": Scripted(["no"] * 8)}, DataError, "8 whose answers are all the"),
    (
        questions(),
        {"rewards": begins_right, "engine": Scripted(["no", "never"] * 4)},
        DataError,
        "No question gave a pair by begins_right .* 8 whose answers score alike",
    ),
]


@pytest.mark.parametrize(("rows", "options", "error", "said"), BAD)
def test_what_cannot_be_is_said_before_training(
    llava: Tiny, fast: dict[str, Any], rows: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        pivot.optimize(llava[0], rows, processor=llava[1], eval_fraction=0, **{**fast, **options})
    assert not (Path(fast["output_dir"]) / "run.json").exists()
