"""Questions where pairs are wanted, and pairs where questions are: each is told which command takes it."""

import pytest

from pivot_plugin.data.layout import recognise
from pivot_plugin.data.questions import QuestionDataset
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.runs.own_answers import refuse_pairs_as_questions


def test_questions_given_as_pairs_are_told_what_takes_them() -> None:
    with pytest.raises(DataError, match=r"are questions with answers .*--reward accuracy.*--objective grpo"):
        recognise({"question": "what?", "answer": "a cat", "image": "1.png"}, "questions.jsonl")
    # what has chosen and rejected is a pair, whatever stands beside
    assert recognise({"prompt": "what?", "chosen": "a", "rejected": "b", "answer": "a"}, "pairs") is None


def test_pairs_given_as_questions_are_told_what_takes_them() -> None:
    pairs = [{"prompt": "what?", "chosen": "a cat", "rejected": "a dog", "images": []}]
    with pytest.raises(SettingsError, match=r"are preference pairs .*objective='grpo' asks questions.*--objective dpo"):
        refuse_pairs_as_questions(QuestionDataset(pairs, name="pairs.jsonl"), "grpo")
    refuse_pairs_as_questions(QuestionDataset([{**pairs[0], "answer": "a cat"}]), "grpo")
    refuse_pairs_as_questions(QuestionDataset([{"question": "what?", "answer": "a cat"}]), "grpo")
