"""A run, drawn: one panel in a terminal, one table in a notebook, one line where nobody looks."""

import time
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .progress import SILENT_S, Progress

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
WIDTH = 24


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """A curve in one line of text, from the lowest value to the highest; longer ones are averaged to the width."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if len(finite) > width:
        edges = [round(index * len(finite) / width) for index in range(width + 1)]
        finite = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    return "".join(BLOCKS[min(int((value - low) / span * len(BLOCKS)), len(BLOCKS) - 1)] for value in finite)


def duration(seconds: float | None) -> str:
    """Seconds as people read them."""
    if seconds is None:
        return "-"
    whole = max(round(seconds), 0)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def facts(progress: Progress) -> list[tuple[str, str, str]]:
    """What is told of a run: name, value, curve."""
    told = []
    rate = progress.rate
    if rate is not None:
        told.append((f"{progress.rows_are} per second", f"{rate:.3g}", ""))
    for label, name in (("loss", "loss"), ("held-out loss", "eval_loss")):
        if values := progress.series(name):
            told.append((label, f"{values[-1]:.4f}", sparkline(values)))
    label, values = progress.held_out
    if values:
        told.append((label, f"{values[-1]:.3f}", sparkline(values)))
    margins = progress.series("eval_rewards/margins") or progress.series("rewards/margins")
    if margins:
        where = "held-out margin" if progress.series("eval_rewards/margins") else "margin"
        told.append((where, f"{margins[-1]:+.3f}", sparkline(margins)))
    chosen = progress.series("eval_logps/chosen") or progress.series("logps/chosen")
    if chosen:
        told.append(("log p of chosen", f"{chosen[-1]:.1f}", sparkline(chosen)))
    if progress.memory:
        told.append((f"peak memory, {progress.device}", f"{progress.memory / 2**30:.2f} GiB", ""))
    trains = [f"{part} {numbers[0]:,}" for part, numbers in progress.trained.items() if numbers[0]]
    if trains:
        told.append(("trains", ", ".join(trains), ""))
    return told


def panel(progress: Progress, now: float | None = None) -> RenderableType:
    """A run as a panel for the terminal.

    Args:
        progress: of the run.
        now: seconds since the epoch; the clock's where None.
    """
    now = time.time() if now is None else now
    ended = progress.finished
    head = Table.grid(expand=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    times = f"{duration((progress.seen if ended else now) - progress.begun)}"
    if not ended and progress.left is not None:
        times += f", {duration(progress.left - (now - progress.seen))} left"
    head.add_row(
        ProgressBar(total=max(progress.planned, 1), completed=progress.step, width=None),
        Text(f"  {progress.step:,} of {progress.planned:,} steps  {times}"),
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="left")
    table.add_column(style="cyan", no_wrap=True)
    for row in facts(progress):
        table.add_row(*row)
    silent = not ended and now - progress.seen > SILENT_S
    words = f"no word for {duration(now - progress.seen)}" if silent else progress.opinion
    body = Group(head, table, Text(f"watch: {words}", style="yellow" if silent or progress.words else "dim"))
    state = "finished" if ended else "runs"
    return Panel(body, title=Text(f"{progress.name}: {state}"), title_align="left")


def side_by_side(several: Sequence[Progress]) -> RenderableType:
    """Several runs as one table, a column each.

    Args:
        several: of the runs.
    """
    table = Table()
    table.add_column("")
    for one in several:
        table.add_column(Text(one.name), justify="right", overflow="fold")
    rows: dict[str, list[str]] = {"steps": [f"{one.step:,}/{one.planned:,}" for one in several]}
    for index, one in enumerate(several):
        for label, value, curve in facts(one):
            if label != "trains":
                rows.setdefault(label, [""] * len(several))[index] = f"{value} {curve[-10:]}".strip()
    rows["watch"] = [one.opinion for one in several]
    for label, cells in rows.items():
        table.add_row(label, *map(Text, cells))
    return table


def line(progress: Progress) -> str:
    """A run in one line of text."""
    told = [f"step {progress.step:,} of {progress.planned:,}"]
    told += [f"{label} {value}" for label, value, _ in facts(progress) if label not in ("trains",)]
    if progress.left:
        told.append(f"{duration(progress.left)} left")
    return "; ".join(told)


def html(progress: Progress) -> str:
    """A run as a table for a notebook."""
    rows = [
        ("steps", f"{progress.step:,} of {progress.planned:,}, {duration(progress.left)} left", ""),
        *facts(progress),
    ]
    rows.append(("watch", progress.opinion, ""))
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(label)}</th><td style="text-align:left">{escape(value)}</td>'
        f"<td>{escape(curve)}</td></tr>"
        for label, value, curve in rows
    )
    return f"<table><caption>{escape(progress.name)}</caption>{cells}</table>"
