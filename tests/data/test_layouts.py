"""Layouts of published sets, unknown ones, and columns named by the user."""

from typing import Any

import datasets
import pytest

from pivot_plugin.data.layout import text_of
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.preferences import PairDataset
from tests.helpers import picture

ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def vlfeedback(*ratings: tuple[str, str, str]) -> dict[str, Any]:
    completions = [
        {
            "annotations": {
                name: {"Rating": value, "Rationale": ""} for name, value in zip(ASPECTS, given, strict=True)
            },
            "model": f"m{number}",
            "response": f"answer {number}",
        }
        for number, given in enumerate(ratings)
    ]
    return {"id": "x", "prompt": "what?", "completions": completions}


def answers(row: dict[str, Any]) -> tuple[str, str]:
    pair = PairDataset([row])[0]
    return text_of(pair["chosen"]), text_of(pair["rejected"])


def test_vlfeedback_is_ranked_by_the_mean_of_its_aspects() -> None:
    row = vlfeedback(("3", "5", "1"), ("5", "5", "N/A"), ("2", "2", "4"))
    assert answers(row) == ("answer 1", "answer 2")
    pair = PairDataset([row])[0]
    assert (pair["score_chosen"], pair["score_rejected"]) == (5.0, pytest.approx(8 / 3))


def test_scored_completions_keep_their_form_in_a_table() -> None:
    row = vlfeedback(("3", "5", "1"), ("5", "5", "4"))
    table = datasets.Dataset.from_list([row])
    assert PairDataset(table)[0]["chosen"] == PairDataset([row])[0]["chosen"]


@pytest.mark.parametrize(
    "row",
    [
        {"completions": ["a", "b", "c"], "scores": [0.5, 0.1, 0.9]},
        {"responses": [{"text": "a"}, {"text": "b"}, {"text": "c"}], "ratings": [5, 1, "9"]},
        {"candidates": [{"content": t, "score": s} for t, s in (("a", 0), ("b", -1), ("c", 1))]},
        {"ranked": ["c", "a", "b"]},
    ],
)
def test_scored_and_ranked_candidates_give_the_best_and_the_worst(row: dict[str, Any]) -> None:
    assert answers({"question": "?", **row}) == ("c", "b")


def test_rlhf_v_keeps_its_pair_in_a_string() -> None:
    text = '{"question": "what?", "chosen": "good", "rejected": "bad"}'
    assert answers({"ds_name": "RLHF-V", "text": text, "idx": 3}) == ("good", "bad")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "?", "completions": ["a"], "scores": [1]}, "fewer than two completions"),
        ({"prompt": "?", "completions": ["a", "b"], "scores": [1]}, "2 completions and 1 scores"),
        ({"prompt": "?", "completions": ["a", "b"], "scores": [1, None]}, "A score is NoneType"),
        ({"prompt": "?", "completions": ["a", "b"], "scores": [1, float("nan")]}, "A score is float"),
        ({"prompt": "?", "completions": ["a", "b"], "scores": [1, 1]}, "have the score 1"),
        ({"prompt": "?", "completions": ["a", 3], "scores": [1, 2]}, "A completion is a int"),
        ({"prompt": "?", "ranked": "abc"}, "ranked is str"),
        ({"text": '{"chosen": "a"'}, "not JSON"),
    ],
)
def test_what_is_wrong_with_a_scored_row_is_said(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"row 0 of prefs: .*{said}"):
        PairDataset([row]).verify()


def test_an_unknown_layout_is_told_from_the_nearest_known() -> None:
    with pytest.raises(DataError) as caught:
        PairDataset([{"question": "?", "chosen": "a", "worse": "b", "picture": "x.png"}])
    said = str(caught.value)
    assert "columns question, chosen, worse, picture" in said
    assert "no 'rejected'" in said
    assert "The nearest is RLAIF-V and MMPR" in said
    assert "columns={" in said


def test_columns_can_be_named() -> None:
    row = {"ask": "<image>what?", "good": "a", "bad": "b", "pic": [], "n": 3}
    named = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    with pytest.raises(DataError, match="0 image"):
        PairDataset([row], columns=named).verify()
    pair = PairDataset([{**row, "ask": "what?"}], columns={**named, "images": "pic"})[0]
    assert (text_of(pair["prompt"]), text_of(pair["chosen"])) == ("what?", "a")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": "instrction"}, "Did you mean instruction"),
        ({"promt": "instruction"}, "columns names 'promt'. Its keys are prompt, chosen"),
    ],
)
def test_a_typo_in_columns_is_said(columns: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        PairDataset([{"instruction": "?", "chosen": "a", "rejected": "b"}], columns=columns)


IMAGE = picture(20, 20, 1)
ASKED = [{"role": "user", "content": "what?"}]
BETTER = {"chosen": "The animal is a cat", "rejected": "The animal is a dog", "image": IMAGE}


@pytest.mark.parametrize("column", ["instruction", "query", "problem"])
@pytest.mark.parametrize("question", ["which?", [{"role": "user", "content": "which?"}]])
def test_a_question_under_an_unknown_name_is_not_lost(column: str, question: object) -> None:
    try:
        prompt = PairDataset([{**BETTER, column: question}])[0]["prompt"]
    except DataError as error:
        assert error.kind in ("lost question", "wrong type")
    else:
        assert text_of(prompt) == "which?"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": None}, "its prompt is null"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "content": "x"}]}]}, "has not one text but"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": 0}]}]}, "has not one text but"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": ["a"]}]}]}, "has not one text but"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a", "value": "b"}]}]},
            "has not one text but",
        ),
        (
            {"prompt": [*ASKED, {"role": "assistant", "content": "an <image>"}, *ASKED]},
            "the assistant turn of prompt holds",
        ),
        ({"prompt": "a?", "chosen": [{"role": "assistant", "content": "b", "tool_calls": [1]}]}, "has tool_calls"),
        ({"prompt": "a?", "images": [picture(20, 20, 2)]}, "1 image.* in 'images' and 1 in 'image'"),
        ({"prompt": "a \ud800?"}, "prompt holds '.ud800' at character 2"),
        ({"prompt": "a?", "score_chosen": float("nan")}, "score_chosen is float"),
        ({"prompt": "a?", "score_chosen": 10**5000}, "score_chosen is int"),
    ],
)
def test_what_would_change_in_silence_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"row 0 of prefs.*{said}"):
        PairDataset([{**BETTER, **change}])[0]


def test_an_empty_list_of_images_does_not_hide_an_image() -> None:
    assert PairDataset([{**BETTER, "prompt": "a?", "images": []}])[0]["images"][0].size == (20, 20)


@pytest.mark.parametrize("names", [("prompt", "question"), ("question", "prompt")])
def test_of_prompt_and_question_the_prompt_is_asked_in_either_order(names: tuple[str, str]) -> None:
    row = {name: f"{name}?" for name in names} | {"chosen": "a", "reject": "b"}
    assert text_of(PairDataset([row])[0]["prompt"]) == "prompt?"


def test_a_row_has_its_question_where_the_first_row_has_none() -> None:
    rows = [
        {"prompt": "first?", "chosen": "a", "rejected": "b"},
        {"question": "second?", "chosen": "a", "rejected": "b"},
    ]
    assert [text_of(pair["prompt"]) for pair in PairDataset(rows)] == ["first?", "second?"]


def test_the_layout_is_that_of_the_first_row_that_has_one() -> None:
    good = {"question": "what?", "chosen": "a", "rejected": "b"}
    pairs = PairDataset([{"nothing": 1}, 3, good])  # type: ignore[list-item]
    assert text_of(pairs[2]["prompt"]) == "what?"
    with pytest.raises(DataError, match="row 0 of prefs"):
        pairs.verify()
