"""The Generalisation Factor: how much of what a run gains on its own data it also gains on other data.

Source: arXiv 2510.25801 (SPECS).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pivot_plugin.errors import SettingsError
from pivot_plugin.extras import require

ID, OOD, FACTOR = "generalization/in", "generalization/out", "generalization/factor"


def generalization_factor(
    in_distribution: Sequence[float],
    out_of_distribution: Sequence[float] | Sequence[Sequence[float]],
    b: float = 2.0,
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """Gamma(n) = (1 + b^2) G_ID G_OOD / (b^2 G_ID + G_OOD) of the gains G(n) = score(n) - score(0).

    An F-measure of two gains, leaning to the second where b > 1. The formula means nothing where a gain is not
    positive: a loss on either side would be hidden or blown up by the other. There the smaller of the two gains is
    returned, which is 0 for none and negative for a loss, and which the formula meets at 0.

    Args:
        in_distribution: (n,) scores on held-out data of the training distribution, before training first.
        out_of_distribution: (n,) scores on other data at the same points, or one such row per data set.
        b: weight of the out-of-distribution gain.
        weights: one per out-of-distribution data set; equal where not given.

    Returns:
        (n,) factors, 0 at the first point.

    Raises:
        SettingsError: if the scores are not equally many, not finite, or b is not positive.

    Source:
        arXiv 2510.25801; the rule for gains that are not positive is this package's.
    """
    inside = np.asarray(in_distribution, dtype=float)
    outside = np.atleast_2d(np.asarray(out_of_distribution, dtype=float))
    if inside.ndim != 1 or not len(inside) or outside.shape[1:] != inside.shape:
        raise SettingsError(
            f"There are scores of shape {inside.shape} in and {outside.shape} out of distribution.",
            "Give one score per point on either side, before training first.",
        )
    if not (np.isfinite(inside).all() and np.isfinite(outside).all()) or b <= 0:
        raise SettingsError(f"A score is not finite, or b is {b}.", "Give finite scores and a positive b.")
    try:
        mean = np.average(outside, axis=0, weights=weights)
    except (ValueError, ZeroDivisionError, TypeError) as error:
        raise SettingsError(f"weights are {weights}: {error}", "Give one positive weight per data set.") from error
    gain_in, gain_out = inside - inside[0], mean - mean[0]
    positive = (gain_in > 0) & (gain_out > 0)
    factor = np.minimum(gain_in, gain_out)
    factor[positive] = (1 + b**2) * (gain_in * gain_out)[positive] / (b**2 * gain_in + gain_out)[positive]
    return factor


def plot_generalization(history: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Draw scores in and out of distribution and the factor over training steps.

    Args:
        history: of a run with `ood_prefs`; entries without these scores are left out.
        path: of the picture; its suffix says the format.

    Raises:
        SettingsError: if the history holds no such scores, or matplotlib is missing.
    """
    points = [entry for entry in history if FACTOR in entry]
    if not points:
        raise SettingsError(
            "The history holds no scores out of distribution.", "Give ood_prefs= and held-out rows to optimize."
        )
    figure_class = require("matplotlib.figure", "probes", "A plot").Figure
    figure = figure_class(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in points]
    for name, label, style in (
        (ID, "in distribution", "o-"),
        (OOD, "out of distribution", "s-"),
        (FACTOR, "Generalisation Factor of the gains", "^--"),
    ):
        axes.plot(steps, [entry[name] for entry in points], style, label=label, markersize=4)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="optimiser step", ylabel="score")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)
    return Path(path)
