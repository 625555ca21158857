"""The Generalisation Factor against its formula, and what gains that are not positive give."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivot_plugin.errors import SettingsError
from pivot_plugin.probes import generalization_factor, plot_generalization

gains = st.floats(0.01, 10)


@given(gains, gains, st.floats(0.5, 4))
def test_it_is_the_f_measure_of_the_gains(inside: float, outside: float, b: float) -> None:
    found = generalization_factor([1.0, 1.0 + inside], [2.0, 2.0 + outside], b)
    # van Rijsbergen's form: the weighted harmonic mean
    expected = 1 / ((1 / inside + b**2 / outside) / (1 + b**2))
    assert found[0] == 0
    assert found[1] == pytest.approx(expected, rel=1e-6)
    assert min(inside, outside) <= found[1] * (1 + 1e-9)
    assert found[1] <= max(inside, outside) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("inside", "outside", "factor"), [(0, 0, 0), (1, 0, 0), (0, 1, 0), (-1, 2, -1), (3, -2, -2), (-3, -1, -3)]
)
def test_gains_that_are_not_positive_give_the_smaller_one(inside: float, outside: float, factor: float) -> None:
    assert generalization_factor([0.0, inside], [0.0, outside])[1] == factor


def test_it_grows_with_either_gain_across_zero() -> None:
    steps = [value / 10 for value in range(-20, 21)]
    for fixed in (-1.0, 0.5, 2.0):
        for order in (1, -1):
            values = [generalization_factor(*[[0.0, gain] for gain in (step, fixed)[::order]])[1] for step in steps]
            assert all(later >= earlier - 1e-12 for earlier, later in pairwise(values))


def test_the_values_of_the_paper_s_figure() -> None:
    """Step 25 of its figure, whose factors are those of the raw percentages: the score before counts as 0."""
    for inside, outside, drawn in ((98, 69, 73.6), (99, 90, 91.5), (98.5, 95, 95.4)):
        assert generalization_factor([0, inside], [0, outside])[1] == pytest.approx(drawn, abs=0.7)


def test_several_sets_are_averaged_with_weights() -> None:
    found = generalization_factor([0, 2], [[0, 1], [0, 4]], weights=[3, 1])
    assert found[1] == pytest.approx(generalization_factor([0, 2], [0, 1.75])[1])


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (([], []), {}),
        (([0, 1], [0]), {}),
        (([0, float("nan")], [0, 1]), {}),
        (([0, 1], [0, 1]), {"b": 0}),
        (([0, 1], [[0, 1]] * 2), {"weights": [1]}),
    ],
)
def test_scores_that_do_not_go_together(arguments: Any, options: Any) -> None:
    with pytest.raises(SettingsError):
        generalization_factor(*arguments, **options)


def test_a_history_without_such_scores_cannot_be_drawn(tmp_path: Any) -> None:
    with pytest.raises(SettingsError, match="no scores out of distribution"):
        plot_generalization([{"loss": 1.0, "step": 1}], tmp_path / "x.png")
