"""SPECS pairs: right answers in the format against the five broken ones."""

from collections import Counter
from typing import Any

import pytest

from pivot_plugin.data.layout import text_of
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.generation.distillation import CORRUPTIONS, INSTRUCTION, agrees, model_judge
from pivot_plugin.preferences import self_distill
from tests.helpers import Tiny, picture

FORMED = "<think>There are 3 cats.</think><answer>3</answer>"


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        ("no tags", "There are 3 cats.3"),
        ("no answer tags", "<think>There are 3 cats.</think>3"),
        ("no think tags", "There are 3 cats.<answer>3</answer>"),
        ("think around all", "<think>There are 3 cats.3</think>"),
        ("answer in words", "<think>There are 3 cats.</think>Answer: 3"),
    ],
)
def test_the_five_ways_to_break_a_format(kind: str, broken: str) -> None:
    assert CORRUPTIONS[kind](FORMED) == broken
    assert len(CORRUPTIONS) == 5


@pytest.mark.parametrize(
    ("reasoning", "answer", "said"),
    [
        ("I count 2 dogs and 3 cats.", "3", True),
        ("I count 3 cats and 2 dogs.", "3", False),
        ("It costs 1,200.", "1200", True),
        ("So the answer is B.", "B", True),
        ("First (A), no, then (C).", "C", True),
        ("First (C), then (A).", "C", False),
        ("It is the round one.", "B", True),
        ("The cat is red.", "a red cat", False),
        ("It is the red cat.", "red cat", True),
        ("", "3", False),
    ],
)
def test_the_rule_judges_whether_reasoning_ends_at_the_answer(reasoning: str, answer: str, said: bool) -> None:
    assert agrees("?", reasoning, answer) is said


def questions(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"how many {n}?", "image": picture(9, 9, n), "answer": "3", "id": str(n)} for n in range(count)
    ]


def engine(*texts: str) -> Any:
    return lambda questions, sampling, seed: [list(texts)] * len(questions)


def distill(llava: Tiny, *texts: str, count: int = 1, **options: Any) -> Any:
    drawn = {"n": len(texts), "engine": engine(*texts), **options}
    return self_distill(llava[0], questions(count), processor=llava[1], **drawn)


def test_decoupled_pairs_are_both_right(llava: Tiny) -> None:
    other = "<think>One, two: 3.</think><answer>3</answer>"
    pairs = distill(llava, "<think>2</think><answer>2</answer>", FORMED, other, count=40)
    assert len(pairs) == 40
    for position in range(40):
        pair = pairs[position]
        assert text_of(pair["chosen"]) == FORMED
        kind = pair["source"].removeprefix("self-distilled, decoupled: ").removesuffix(", from the model")
        assert text_of(pair["rejected"]) == CORRUPTIONS[kind](other)
        assert INSTRUCTION in text_of(pair["prompt"])
    kinds = Counter(pairs.plain(position)["source"] for position in range(40))
    assert len(kinds) == 5


def test_the_chosen_answer_is_broken_where_there_is_no_other(llava: Tiny) -> None:
    pair = distill(llava, FORMED, "4", proportions={"no tags": 1})[0]
    assert text_of(pair["rejected"]) == CORRUPTIONS["no tags"](FORMED)
    assert pair["source"] == "self-distilled, decoupled: no tags, from the chosen answer"


def test_a_right_answer_out_of_format_is_taken_as_it_came(llava: Tiny) -> None:
    pair = distill(llava, FORMED, "It is 3. Answer: 3")[0]
    assert text_of(pair["rejected"]) == "It is 3. Answer: 3"
    assert pair["source"] == "self-distilled, decoupled: out of format as sampled, from the model"


def test_coupled_pairs_differ_in_content(llava: Tiny) -> None:
    wrong = "<think>I see 4.</think><answer>4</answer>"
    pair = distill(llava, FORMED, wrong, kind="coupled", proportions={"answer in words": 2})[0]
    assert text_of(pair["rejected"]) == "<think>I see 4.</think>Answer: 4"
    with pytest.raises(DataError, match="lacking: a wrong answer in 1"):
        distill(llava, FORMED, FORMED, kind="coupled")


def test_proportions_are_kept(llava: Tiny) -> None:
    pairs = distill(llava, FORMED, "4", count=200, proportions={"no tags": 3, "answer in words": 1})
    kinds = Counter(pairs.plain(position)["source"].split(": ")[1].split(",")[0] for position in range(200))
    assert set(kinds) == {"no tags", "answer in words"}
    assert 120 <= kinds["no tags"] <= 180


def test_the_base_model_s_own_answers_are_the_rejected_ones(llava: Tiny, tmp_path: Any) -> None:
    def two_models(questions: Any, sampling: Any, seed: int) -> list[list[str]]:
        asked.append(seed)
        return [[FORMED] if len(asked) == 1 else ["<think>ja, 3</think><answer>3</answer>"]] * len(questions)

    asked: list[int] = []
    pairs = distill(llava, FORMED, base=llava[0], engine=two_models, n=1, output_dir=str(tmp_path))
    assert "ja, 3" in text_of(pairs[0]["rejected"])
    assert pairs[0]["source"].endswith("from the base model")
    assert len(set(asked)) == 2
    assert (tmp_path / "candidates.jsonl").exists()
    assert (tmp_path / "base" / "candidates.jsonl").exists()


def test_what_was_lacking_is_counted(llava: Tiny) -> None:
    with pytest.raises(DataError, match=r"lacking: a right answer in the format in 1.*Train the model on the format"):
        distill(llava, "3", "<think>a</think><answer>4</answer>")
    with pytest.raises(DataError, match="lacking: reasoning that agrees with it in 1"):
        distill(llava, "<think>It is 4.</think><answer>3</answer>")


def test_a_judge_can_be_given(llava: Tiny) -> None:
    seen = []

    def judge(question: str, reasoning: str, answer: str) -> bool:
        seen.append((question, reasoning, answer))
        return True

    distill(llava, "<think>It is 4.</think><answer>3</answer>", judge=judge)
    assert seen == [("how many 0?", "It is 4.", "3")]


def test_a_model_can_judge(llava: Tiny) -> None:
    judge = model_judge(*llava)
    assert judge("?", "It is 3.", "3") is judge("?", "It is 3.", "3")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "both"}, "kind is 'both'"),
        ({"proportions": {"no tag": 1}}, r"proportions names \['no tag'\]. Its keys are 'no tags'"),
        ({"proportions": {"no tags": 0}}, "one of them above 0"),
        ({"reward": "acuracy"}, "Did you mean accuracy"),
    ],
)
def test_a_typo_is_said(llava: Tiny, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        distill(llava, FORMED, **options)
