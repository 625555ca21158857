"""Candidates into pairs, against a plain enumeration."""

from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivot_plugin.data.layout import text_of
from pivot_plugin.errors import DataError, SettingsError, TrainingError
from pivot_plugin.preferences import PairDataset, rank
from tests.helpers import picture


def question(completions: list[str] | None, answer: str | None = "3", **beside: Any) -> dict[str, Any]:
    return {"question": "how many?", "image": picture(9, 9, 1), "completions": completions, "answer": answer, **beside}


def told(pairs: PairDataset) -> list[tuple[str, str]]:
    return [(text_of(pair["chosen"]), text_of(pair["rejected"])) for pair in map(pairs.__getitem__, range(len(pairs)))]


def test_a_right_answer_stands_against_a_wrong_one() -> None:
    pairs = rank([question(["2", "3", "4"])], "accuracy")
    assert told(pairs) == [("3", "4")]
    pair = pairs[0]
    assert (pair["score_chosen"], pair["score_rejected"]) == (1.0, 0.0)
    assert pair["source"] == "rank by accuracy, best-worst"
    assert pair["images"][0].size == (9, 9)


def test_an_answer_with_an_image_marker_stands_in_no_pair() -> None:
    pairs = rank([question(["2", "3 <image>", "3", "<image>"])], "accuracy")
    assert told(pairs) == [("3", "2")]
    with pytest.raises(DataError, match="None of 1 questions has two candidates"):
        rank([question(["2", "3 <image>"])], "accuracy")


def by_length(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@given(
    st.lists(st.text("x", min_size=1, max_size=9), min_size=2, max_size=6),
    st.floats(0, 4),
    st.sampled_from(["best-worst", "best-each", "all"]),
)
def test_pairs_are_those_that_the_rule_names(texts: list[str], margin: float, pair_up: Any) -> None:
    distinct = set(texts)
    best, worst = max(map(len, distinct)), min(map(len, distinct))
    expected = {
        (a, b)
        for a, b in permutations(distinct, 2)
        if len(a) - len(b) > margin
        and (pair_up == "all" or len(a) == best)
        and (pair_up != "best-worst" or len(b) == worst)
    }
    try:
        found = told(rank([question(texts)], by_length, pair_up=pair_up, margin=margin))
    except DataError as error:
        assert error.kind == "no signal"
        found = []
    assert sorted(found) == sorted(expected)


def test_weights_decide_between_rewards() -> None:
    candidates = ["<think>a</think><answer>2</answer>", "3"]
    for weights, chosen in (([1.0, 2.0], candidates[1]), ([2.0, 1.0], candidates[0])):
        pairs = rank([question(candidates)], ["format", "accuracy"], weights)
        assert told(pairs)[0][0] == chosen


def test_scores_in_the_rows_are_taken_where_there_are_no_rewards() -> None:
    rows = [{"question": "?", "completions": ["a", "b", "c"], "scores": [0.1, 0.9, 0.5]}]
    assert told(rank(rows, pair_up="all")) == [("b", "c"), ("b", "a"), ("c", "a")]


def test_ids_tell_the_pairs_of_a_question_apart() -> None:
    pairs = rank([question(["1", "33", "222"], id="q7")], by_length, pair_up="all")
    assert [pairs[i]["id"] for i in range(3)] == ["q7-0", "q7-1", "q7-2"]


def test_questions_without_signal_give_none_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [question(["3", "3"]), question(["3", "4"]), question(["4", ""])]
    with caplog.at_level("INFO"):
        assert len(rank(rows, "accuracy")) == 1
    assert "3 questions gave 1 pairs; 2 gave none" in caplog.text
    with pytest.raises(DataError, match="None of 1 questions has two candidates that score differently by accuracy"):
        rank(rows[:1], "accuracy")


@pytest.mark.parametrize(
    ("rows", "options", "error", "said"),
    [
        ([question(["3"])], {"pair_up": "worst"}, SettingsError, "pair_up is 'worst'"),
        ([question(["3"])], {"margin": -1}, SettingsError, "margin -1"),
        ([question(None)], {}, DataError, "no list of texts in its column 'completions'"),
        ([question(["3", "4"], answer=None)], {}, DataError, "needs an expected answer"),
        ([question(["3", "4"])], {"rewards": lambda **_: [1.0]}, TrainingError, "1 scores for 2 completions"),
    ],
)
def test_what_is_wrong_is_said(rows: Any, options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        rank(rows, **{"rewards": "accuracy", **options})
