"""Built-in rewards against worked examples and the libraries behind them."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.preferences import load_questions
from pivot_plugin.rewards import answer_of, available, needs_answer, reasoning_of, resolve_rewards
from pivot_plugin.rewards.overlap import iou


def score(name: str, completion: object, answer: object = None) -> Any:
    (function,) = resolve_rewards(name)
    columns = {"rule": ["accuracy"]} if answer is None else {"rule": ["accuracy"], "answer": [answer]}
    (value,) = function(prompts=["?"], completions=[completion], **columns)  # type: ignore[operator]
    return value


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think><answer> B </answer>", "B"),
        ("first <answer>1</answer> then <answer>2</answer>", "2"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("I see two. The answer is 7.", "7"),
        ("Final answer: a red cat", "a red cat"),
        ("Answer: 3", "3"),
        ("<think>the answer is 9</think> four", "four"),
        ("a red cat", "a red cat"),
        ("", ""),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str) -> None:
    assert answer_of(text) == answer


def test_reasoning_is_what_stands_in_its_tags() -> None:
    assert reasoning_of("<think> a </think>x<think>b</think>") == "a b"
    assert reasoning_of("none") == ""


@pytest.mark.parametrize(
    ("name", "completion", "answer", "expected"),
    [
        ("exact_match", "red", "red", 1),
        ("exact_match", "Red", "red", 0),
        ("normalised_match", "The Red, cat!", "a red cat", 1),
        ("normalised_match", "a red dog", "a red cat", 0),
        ("normalised_match", "+", "-", 0),
        ("multiple_choice", "(b)", "B", 1),
        ("multiple_choice", "B. a red cat", "b", 1),
        ("multiple_choice", "The answer is (C)", "C", 1),
        ("multiple_choice", "A", "B", 0),
        ("multiple_choice", "apple", "A", 0),
        ("numeric", "1,200", "1200", 1),
        ("numeric", "0.33333", "1/3", 1),
        ("numeric", "50%", "0.5", 1),
        ("numeric", "3.2", "3.1", 0),
        ("numeric", r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}", 1),
        ("accuracy", "<answer>B</answer>", "(B)", 1),
        ("accuracy", "12.0", "12", 1),
        ("accuracy", "seven", "eight", 0),
        ("accuracy", "a Cat", "cat", 1),
        ("accuracy", "cat", ["dog", "cat"], 1),
        ("permutation", "2, 1, 3, 4", "2, 1, 3, 4", 1),
        ("permutation", "The order is <answer>2 1 3 4</answer>", "2, 1, 3, 4", 1),
        ("permutation", "2, 1, 4, 3", "2, 1, 3, 4", pytest.approx(0.2 * 2 / 4)),
        ("permutation", "1, 2, 4, 3", "2, 1, 3, 4", 0),
        ("permutation", "2, 1, 3", "2, 1, 3, 4", 0),
        ("permutation", "2, 1, 2, 1", "2, 1, 3, 4", 0),
        ("bleu", "the cat sat on the mat", "the cat sat on the mat", pytest.approx(1)),
        ("bleu", "x", "the cat sat on the mat", 0),
        ("rouge_l", "the cat sat", "the cat sat", 1),
        ("rouge_l", "the cat", "the cat sat down", pytest.approx(2 / 3)),
        ("box_iou", "[0, 0, 2, 2]", [1, 0, 3, 2], pytest.approx(1 / 3)),
        ("box_iou", "nothing", "0 0 1 1", 0),
        ("format", "<think>a</think>\n<answer>b</answer>", None, 1),
        ("format", "<answer>b</answer><think>a</think>", None, 0),
        ("format", "<think>a</think><answer>b</answer> more", None, 0),
        ("format", "<think>a<think>b</think></think><answer>b</answer>", None, 0),
        ("length_penalty", "x" * 2000, None, 0),
        ("length_penalty", "x" * 5000, None, -0.5),
        ("length_penalty", "x" * 9000, None, -1),
    ],
)
def test_scores(name: str, completion: str, answer: object, expected: object) -> None:
    assert score(name, completion, answer) == expected
    # a completion may come as messages, as TRL hands it on
    assert score(name, [{"role": "assistant", "content": completion}], answer) == expected
    assert score(name, [{"role": "assistant", "content": [{"type": "text", "text": completion}]}], answer) == expected


def test_bleu_and_rouge_are_the_libraries_own() -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    said, right = "a small red cat on a mat", "the small red cat sat on the mat"
    assert score("bleu", said, right) == pytest.approx(
        sacrebleu.sentence_bleu(said, [right], use_effective_order=True).score / 100
    )
    assert score("rouge_l", said, right) == pytest.approx(RougeScorer(["rougeL"]).score(right, said)["rougeL"].fmeasure)


coordinates = st.integers(0, 20)
boxes = st.tuples(coordinates, coordinates, st.integers(1, 10), st.integers(1, 10)).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)


@given(boxes, boxes)
def test_iou_is_what_counting_pixels_gives(first: Any, second: Any) -> None:
    cells = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in (first, second)]
    assert iou(first, second) == pytest.approx(len(cells[0] & cells[1]) / len(cells[0] | cells[1]))


@given(st.text(max_size=60))
def test_rewards_take_any_completion(text: str) -> None:
    for name in available():
        assert 0 <= abs(score(name, text, "3")) <= 1


def test_solution_is_taken_where_there_is_no_answer() -> None:
    (function,) = resolve_rewards("accuracy")
    assert function(prompts=["?"], completions=["3"], solution=["3"]) == [1.0]  # type: ignore[operator]


def test_a_missing_answer_is_said() -> None:
    with pytest.raises(DataError, match="The reward 'accuracy' needs an expected answer per question"):
        score("accuracy", "3")
    with pytest.raises(DataError, match="row 0 of its batch has none"):
        resolve_rewards("accuracy")[0](prompts=["?"], completions=["x"], answer=[None])  # type: ignore[operator]


def test_a_typo_in_a_name_is_said_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"no reward 'acuracy'. Did you mean accuracy"):
        resolve_rewards(["format", "acuracy"])
    with pytest.raises(SettingsError, match="No reward is given"):
        resolve_rewards([])


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(SettingsError, match=r"pip install .*pivot-plugin\[rewards\]"):
        score("bleu", "a", "b")


def test_a_reward_is_named_by_where_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def longer(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (f"{tmp_path / 'mine.py'}:longer", "mine.longer"):
        (function,) = resolve_rewards(name)
        assert function(["a", "b"]) == [1.0, 1.0]
    for name, message in (
        (f"{tmp_path / 'mine.py'}:shorter", "has no function 'shorter'"),
        (f"{tmp_path / 'none.py'}:longer", "is no file"),
        (f"{tmp_path / 'broken.py'}:longer", "cannot be imported: ModuleNotFoundError"),
        ("mine.shorter", "has no function 'shorter'"),
        ("acuracy", "Did you mean accuracy"),
    ):
        with pytest.raises(SettingsError, match=re.escape(message)):
            resolve_rewards(name)


def test_a_row_may_name_the_reward_that_judges_it() -> None:
    (by_rule,) = resolve_rewards("by_rule")
    assert callable(by_rule)
    rules = ["permutation", "accuracy", "permutation"]
    scores = by_rule(["?"] * 3, ["1, 2", "a dog", "2, 1"], rule=rules, answer=["1, 2", "dog", "1, 2"])
    assert scores == [1.0, 1.0, 0.0]
    with pytest.raises(SettingsError, match=r"no reward 'permutatoin'.*permutation"):
        by_rule(["?"], ["1"], rule=["permutatoin"], answer=["1"])
    questions = load_questions([{"images": [], "question": "?", "answer": "1"}])
    with pytest.raises(DataError, match="needs a column 'rule'"):
        needs_answer([by_rule], questions)
