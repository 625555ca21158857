"""Curves as SVG that stands in the page: its text is text, and takes the page's colour in light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any

import numpy as np

from pivot_plugin.extras import require

# replaced by currentColor, so that axes and labels follow the page
_PAGE_COLOUR = "#010203"
# told apart in light, in dark, in print and without colour vision, together with the markers
LINES = (("#3b7dd8", "o", "-"), ("#c8641a", "s", "--"), ("#3a9a5b", "^", "-."), ("#a352b8", "D", ":"))
MARKERS_UP_TO = 40
SMOOTHED_FROM = 60
BINS = 30

Series = Sequence[tuple[float, float]]


def curve(title: str, lines: Mapping[str, Series], number: int, zero: bool = False, kept: float | None = None) -> str:
    """A small plot over optimiser steps.

    Args:
        title: what is plotted, with its unit.
        lines: by name the points (step, value).
        number: of the figure, unique on its page.
        zero: whether to draw a line at 0.
        kept: the step whose weights were kept, which is marked; None for none.

    Returns:
        an svg element with a description for those who cannot see it.
    """
    figure, context = _figure(number)
    with context:
        axes = figure.subplots()
        for index, (name, points) in enumerate(lines.items()):
            colour, marker, style = LINES[index % len(LINES)]
            steps, values = zip(*points, strict=True)
            marks = marker if len(points) <= MARKERS_UP_TO else None
            look: dict[str, Any] = {"color": colour, "marker": marks, "markersize": 3.5, "linewidth": 1.4}
            if len(points) > SMOOTHED_FROM:
                # what was logged stays to be seen behind its running mean
                axes.plot(steps, values, "-", color=colour, linewidth=0.6, alpha=0.35)
                values = tuple(running_mean(values))
            axes.plot(steps, values, style, label=name, **look)
        if kept is not None:
            axes.axvline(kept, color=_PAGE_COLOUR, linewidth=0.8, linestyle=":", label="kept")
        if zero:
            axes.axhline(0, color=_PAGE_COLOUR, linewidth=0.5)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlabel("optimiser step")
        axes.set_title(title, fontsize=10)
        axes.locator_params(axis="x", nbins=6, integer=True)
        if len(lines) > 1 or kept is not None:
            axes.legend(frameon=False, fontsize=8)
        svg = _drawn(figure)
    return _inline(svg, f"{title} over optimiser steps: {_described(lines, kept)}", number)


def histogram(title: str, values: Mapping[str, np.ndarray], number: int) -> str:
    """How numbers of several kinds are spread, as outlines over one axis.

    Args:
        title: what is counted, with its unit.
        values: by name the numbers, at least one each.
        number: of the figure, unique on its page.

    Returns:
        an svg element with a description for those who cannot see it.
    """
    together = np.concatenate(list(values.values()))
    # the outermost hundredth would stretch the axis
    low, high = np.quantile(together, [0.01, 0.99])
    edges = np.linspace(min(low, 0.0) - 1e-6, max(high, 0.0) + 1e-6, BINS + 1)
    figure, context = _figure(number)
    with context:
        axes = figure.subplots()
        for index, (name, numbers) in enumerate(values.items()):
            colour, _, style = LINES[index % len(LINES)]
            clipped = np.clip(numbers, edges[0], edges[-1])
            axes.hist(clipped, edges, histtype="step", color=colour, linestyle=style, linewidth=1.4, label=name)
        axes.axvline(0, color=_PAGE_COLOUR, linewidth=0.5)
        axes.set_xlabel(title)
        axes.set_ylabel("pairs")
        axes.legend(frameon=False, fontsize=8)
        svg = _drawn(figure)
    told = "; ".join(
        f"{name}: median {np.median(numbers):.3g}, {100 * (numbers > 0).mean():.0f} % above 0"
        for name, numbers in values.items()
    )
    return _inline(svg, f"{title}: {told}.", number)


def _figure(number: int) -> tuple[Any, AbstractContextManager[Any]]:
    """An empty figure, and the looks that it is to be drawn with."""
    figure_class = require("matplotlib.figure", "probes", "A report").Figure
    context = require("matplotlib", "probes", "A report").rc_context
    look = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"figure-{number}",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _PAGE_COLOUR,
        "axes.labelcolor": _PAGE_COLOUR,
        "axes.edgecolor": _PAGE_COLOUR,
        "xtick.color": _PAGE_COLOUR,
        "ytick.color": _PAGE_COLOUR,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    return figure_class(figsize=(4.2, 2.5), layout="constrained"), context(look)


def _drawn(figure: Any) -> str:
    svg = io.StringIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return svg.getvalue()


def running_mean(values: Sequence[float]) -> list[float]:
    """Each value as the mean of a tenth of all up to it."""
    width = max(len(values) // 10, 1)
    sums = np.cumsum([0.0, *values])
    return [float(sums[i + 1] - sums[max(i + 1 - width, 0)]) / min(width, i + 1) for i in range(len(values))]


def _described(lines: Mapping[str, Series], kept: float | None) -> str:
    parts = [
        f"{name} from {points[0][1]:.3g} at step {points[0][0]:g} to {points[-1][1]:.3g} at step {points[-1][0]:g}"
        for name, points in lines.items()
    ]
    parts += [] if kept is None else [f"kept was step {kept:g}"]
    return "; ".join(parts) + "."


def _inline(svg: str, description: str, number: int) -> str:
    """An SVG document as an element of a page that has others."""
    body = svg[svg.index("<svg") :].replace(_PAGE_COLOUR, "currentColor")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="f{number}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#f{number}-", body)
    # the width of the column, and the height that goes with it
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
