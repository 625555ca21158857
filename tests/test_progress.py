"""Long work says how far it is: by lines at a rate where nobody watches a bar."""

import logging

import pytest

from pivot_plugin import progress
from pivot_plugin.progress import Progress


def test_a_log_gets_a_line_from_time_to_time_with_rate_and_rest(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "is_watched", lambda: False)
    now = [0.0]
    with caplog.at_level(logging.INFO), Progress(1000, "sampling", "question", done=100, clock=lambda: now[0]) as work:
        for _ in range(100):
            now[0] += 1
            work.update()
    assert [record.getMessage() for record in caplog.records] == [
        "sampling: 130 of 1,000 questions, 1 a second, 14 minutes left",
        "sampling: 160 of 1,000 questions, 1 a second, 14 minutes left",
        "sampling: 190 of 1,000 questions, 1 a second, 14 minutes left",
    ]


def test_a_terminal_gets_a_bar_and_short_work_says_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    with Progress(10, "making", quiet_below=11) as work:
        work.update(10)
    assert capsys.readouterr().err == ""
    with Progress(10, "making", "picture") as work:
        work.update(10)
    assert "making" in capsys.readouterr().err
    assert not caplog.records
