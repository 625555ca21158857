"""Rows that say where a row is, and the collator that looks them up."""

import pickle
from typing import Any

from pivot_plugin.training.rows import Loading, pointing, streaming

LETTERS = [{"id": letter} for letter in "abc"]
DIGITS = [{"id": digit} for digit in "01"]


def listed(rows: Any) -> dict[str, Any]:
    return {"rows": list(rows)}


def test_every_row_of_every_source_is_found_again() -> None:
    loading = Loading([LETTERS, DIGITS], listed)
    letters, digits = pointing(loading.sources)
    assert loading(list(letters)) == {"rows": LETTERS}
    assert loading([digits[1], letters[0]]) == {"rows": [DIGITS[1], LETTERS[0]]}
    assert loading.source_of(digits) is DIGITS


def test_a_shuffled_share_finds_the_same_rows() -> None:
    loading = Loading([LETTERS], listed)
    (letters,) = pointing(loading.sources)
    assert loading(list(letters.select([2, 0]))) == {"rows": [LETTERS[2], LETTERS[0]]}


def test_sources_may_come_later_and_go_on_counting() -> None:
    loading = Loading([LETTERS], listed)
    loading.sources.append(DIGITS)
    (digits,) = pointing([DIGITS], first=1)
    assert loading(list(digits)) == {"rows": DIGITS}


def test_added_columns_come_with_the_row() -> None:
    (letters,) = pointing([LETTERS])
    scored = letters.add_column("score", [1.0, 2.0, 3.0])
    assert Loading([LETTERS], listed)([scored[1]]) == {"rows": [{"id": "b", "score": 2.0}]}
    assert LETTERS[1] == {"id": "b"}


def test_rows_of_a_stream_come_as_they_are() -> None:
    assert Loading([], listed)(list(streaming(LETTERS))) == {"rows": LETTERS}


def test_the_collator_goes_to_worker_processes() -> None:
    (letters,) = pointing([LETTERS])
    again = pickle.loads(pickle.dumps(Loading([LETTERS], listed)))
    assert again(list(letters)) == {"rows": LETTERS}
