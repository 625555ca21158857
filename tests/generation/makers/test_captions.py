"""Phrases of captions: which are found, by which they are replaced, and that no text tells the planted one."""

from collections import Counter

import numpy as np
import pytest

from pivot_plugin.data.layout import text_of
from pivot_plugin.errors import DataError
from pivot_plugin.generation.makers import make
from pivot_plugin.generation.makers.phrases import KINDS, Replacements, planted, slots
from tests.helpers import picture

IMAGE = picture(20, 20, 1)


def rows(*captions: str) -> list[dict[str, object]]:
    return [{"image": IMAGE, "caption": caption} for caption in captions]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A red dog in front of two buses.", ["red", "dog", "in front of", "two", "buses"]),
        ("A red car and a red bus", ["car", "bus"]),
        ("a well-known redhead onwards", []),
        ("Left of the Living room", ["left"]),
    ],
)
def test_phrases_stand_alone_and_once(caption: str, words: list[str]) -> None:
    assert [slot.word for slot in slots(caption)] == words
    assert all(caption[slot.start : slot.end].casefold() == slot.word for slot in slots(caption))


def test_a_planted_word_is_written_as_the_old_one() -> None:
    caption = "Red dogs"
    assert planted(caption, slots(caption)[0], "blue") == "Blue dogs"


def test_words_of_one_meaning_never_replace_each_other_nor_those_of_another_article() -> None:
    replacements = Replacements([[f"a {word} thing"] for word in ("large", "big", "tiny", "red", "orange", "blue")])
    assert set(replacements.of("large")[0]) == {"tiny"}
    assert set(replacements.of("red")[0]) == {"blue"}
    assert replacements.of("orange")[0] == []


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (5, 3, 1, 1), (30, 20, 15, 1)])
def test_a_word_is_planted_as_often_as_it_is_said_and_as_often_as_it_is_replaced(counts: tuple[int, ...]) -> None:
    words = ("red", "blue", "green", "yellow")
    captions = [[f"a {word} thing"] for word, count in zip(words, counts, strict=True) for _ in range(count)]
    replacements = Replacements(captions)
    said = np.array(counts) / sum(counts)
    flow = np.zeros((4, 4))
    for number, word in enumerate(words):
        for other, share in zip(*replacements.of(word), strict=True):
            flow[number, words.index(other)] = said[number] * share
    np.testing.assert_allclose(flow, flow.T, atol=1e-6)
    if max(said) <= 0.5:
        np.testing.assert_allclose(flow.sum(axis=0), said * flow.sum(), atol=2e-3)
    assert not np.diag(flow).any()


def test_the_wrong_phrase_is_asked_for_and_the_pair_is_the_two_captions() -> None:
    data = rows("a red dog", "a blue cat", "a red cat", "a blue dog")
    question = make(data, "planted_error", difficulty=0.5, count=8).plain(3)
    caption = text_of(question["prompt"]).split('"')[1]
    assert question["answer"] in caption and question["wrong_answers"][0] in caption
    pair = make(data, "planted_error", difficulty=0.5, count=8, form="pairs").plain(3)
    chosen, rejected = text_of(pair["chosen"]).split(), text_of(pair["rejected"]).split()
    assert sum(one != other for one, other in zip(chosen, rejected, strict=True)) == 1
    assert " ".join(chosen) in {str(row["caption"]) for row in data}
    assert " ".join(rejected) == caption


def test_the_right_description_is_chosen_where_it_is_easy() -> None:
    data = rows("a red thing", "a blue thing")
    questions = make(data, "planted_error", difficulty=0.2, count=20)
    answers = Counter(questions.plain(position)["answer"] for position in range(20))
    assert answers == {"A": 10, "B": 10}


def test_captions_without_a_phrase_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    data = [*rows("a red dog", "a blue cat", "a red cat", "a blue dog", "nothing here", "one red"), {"image": IMAGE}]
    make(data, "planted_error", count=4)
    assert "5 of 7 pictures" in caplog.text
    assert "1 whose captions hold fewer than 2 phrases, 1 without a caption" in caplog.text
    with pytest.raises(DataError, match=r"needs one picture .* has 0 that it can use, of 2. 2 whose captions hold no"):
        make(rows("nothing", "nothing at all"), "planted_error", difficulty=0.1, count=4)
    with pytest.raises(DataError, match=r"of 2. 2 without a caption"):
        make([{"image": IMAGE}, {"image": IMAGE}], "planted_error", count=4)
    with pytest.raises(DataError, match="can make nothing of"):
        make(rows("a red dog", "a red dog"), "planted_error", difficulty=0.1, count=4)


def test_captions_are_read_wherever_people_keep_them() -> None:
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "a red dog"}]
    other = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "a blue cat"}]
    kept = [
        [{"image": IMAGE, "text": "a red dog"}, {"image": IMAGE, "text": "a blue cat"}],
        [{"image": IMAGE, "captions": ["a red dog", "x"]}, {"image": IMAGE, "captions": ["a blue cat"]}],
        [{"image": IMAGE, "conversations": turns}, {"image": IMAGE, "conversations": other}],
    ]
    for data in kept:
        pair = make(data, "planted_error", difficulty=0, count=4, form="pairs").plain(0)
        assert text_of(pair["chosen"]) in {"a red dog", "a blue cat"}


def test_no_word_has_two_meanings_of_a_kind() -> None:
    for kind, meanings in KINDS.items():
        words = [word for meaning in meanings for word in meaning]
        assert len(words) == len(set(words)), kind
