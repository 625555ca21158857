"""Tables over seeds: mean and spread of a score in each cell, as markdown."""

import statistics
from collections.abc import Iterable, Sequence


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which of a single value is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cell(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and, of several values, their standard deviation; empty where there is none.

    Args:
        values: over seeds.
        form: of the mean, as for `format`.
    """
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    return f"{mean:{form}} ± {spread:.3f}" if len(values) > 1 else f"{mean:{form}}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table.

    Args:
        header: of its columns.
        rows: cells of each row, as many as there are columns.
    """
    lines = [header, *rows]
    written = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([written[0], "|---" * len(header) + "|", *written[1:]])
