"""How far a run is, from the lines of its log, and how that is drawn."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pivot_plugin.errors import SettingsError
from pivot_plugin.files import logged
from pivot_plugin.runs.panel import duration, html, line, panel, side_by_side, sparkline
from pivot_plugin.runs.progress import Lines, of_lines, read_progress


def begun(at: float, first: int = 0, **more: Any) -> dict[str, Any]:
    about = {"planned": 100, "batch": 8, "rows_are": "pairs", "trained": {"encoder": [10, 20], "projector": [0, 5]}}
    return {"time": at, "event": "begin", "first_step": first, **about, **more}


def log(at: float, step: int, **logs: float) -> dict[str, Any]:
    return {"time": at, "event": "log", "step": step, "logs": logs, "memory": 2**30}


def test_the_rate_of_a_resumed_run_is_that_of_its_own_steps() -> None:
    lines = [begun(0), log(100, 40, loss=0.6), log(110, 50, loss=0.5), begun(1000, first=40), log(1010, 60, loss=0.4)]
    progress = of_lines("run", lines)
    # 20 steps of 8 pairs in 10 seconds, not 60 in 10
    assert progress.rate == pytest.approx(16.0)
    assert progress.left == pytest.approx(20.0)
    # what was logged behind the checkpoint is written anew
    assert [entry["step"] for entry in progress.history] == [40, 60]
    assert progress.series("loss") == [0.6, 0.4]


def test_nothing_is_divided_by_nothing() -> None:
    for lines in ([], [begun(5)], [begun(5), log(5, 0, eval_loss=0.7)]):
        progress = of_lines("run", lines)
        assert progress.rate is None and progress.left is None
        assert line(progress) and html(progress)


def test_a_curve_runs_from_the_lowest_to_the_highest_block() -> None:
    assert sparkline([0, 1]) == "\u2581\u2588"
    assert sparkline([3, 3, 3]) == "\u2581\u2581\u2581"
    assert sparkline([float("nan"), 1.0]) == "\u2581" and sparkline([]) == ""
    assert len(sparkline(list(range(1000)))) == 24
    assert duration(3725) == "1:02:05" and duration(65) == "1:05" and duration(None) == "-"


def test_a_panel_fits_eighty_columns_and_says_what_there_is() -> None:
    logs = {"eval_loss": 0.6, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 0.2, "eval_logps/chosen": -43.2}
    lines = [begun(0), log(10, 10, loss=0.61), log(11, 10, **logs), {"time": 12, "event": "said", "text": "it [fell]"}]
    progress = of_lines("a [red] run", lines)
    console = Console(width=80, record=True, force_terminal=False)
    console.print(panel(progress, now=15.0))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("10 of 100 steps", "held-out reward accuracy", "0.750", "+0.200", "-43.2", "1.00 GiB", "encoder 10"):
        assert words in text, words
    assert "watch: it [fell]" in text and "a [red] run: runs" in text and "projector" not in text
    console.print(side_by_side([progress, of_lines("other", [begun(0)])]))
    assert "other" in console.export_text()
    console.print(panel(progress, now=12 + 3600))
    assert "no word for 1:00:00" in console.export_text()
    assert "&lt;" in html(of_lines("<b>", [begun(0)]))


def test_a_log_that_is_being_written_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "run")
    lines.write(**begun(0))
    lines.write(**log(1, 3, loss=0.5))
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"time": 3, "event": "lo')
    assert read_progress(tmp_path / "run").step == 3
    assert logged(tmp_path / "run") == [{"loss": 0.5, "step": 3}]
    with pytest.raises(SettingsError, match="holds no run"):
        read_progress(tmp_path / "none")
