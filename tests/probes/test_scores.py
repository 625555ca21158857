"""Intervals and paired tests, against scipy and by their properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pivot_plugin.errors import PluginError
from pivot_plugin.probes.scores import (
    ProbeResult,
    Score,
    apart,
    as_result,
    difference,
    holm,
    mcnemar,
    plain_score,
    score_of,
)


def test_the_mean_and_its_interval_agree_with_scipy() -> None:
    samples = np.random.default_rng(0).normal(3, 2, 200)
    score = score_of(samples)
    assert score.value == pytest.approx(samples.mean())
    expected = stats.bootstrap((samples,), np.mean, method="percentile", rng=1).confidence_interval
    assert score.low == pytest.approx(expected.low, abs=0.05)
    assert score.high == pytest.approx(expected.high, abs=0.05)


def test_the_ratio_is_the_mean_over_classes_of_sums_over_sums() -> None:
    samples = np.random.default_rng(0).integers(1, 9, (30, 4, 2)).astype(float)
    samples[:, 3] = 0
    expected = np.mean([samples[:, k, 0].sum() / samples[:, k, 1].sum() for k in range(3)])
    assert score_of(samples).value == pytest.approx(expected)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        score = score_of(np.random.default_rng(seed).binomial(1, 0.3, 150).astype(float), seed)
        hits += score.low <= 0.3 <= score.high
    assert 180 <= hits <= 200


def test_the_permutation_test_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    first = rng.normal(0, 1, 40)
    second = first + rng.normal(0.3, 0.8, 40)
    expected = stats.permutation_test(
        (second - first,), lambda gap, axis: gap.mean(axis=axis), permutation_type="samples", n_resamples=9999, rng=1
    ).pvalue
    found = difference(score_of(first), score_of(second))
    assert found.p == pytest.approx(expected, abs=0.02)
    assert found.low < found.value < found.high  # type: ignore[operator]


def test_without_a_difference_p_values_are_uniform() -> None:
    p_values = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        base = rng.normal(0, 1, 30)
        p_values.append(difference(score_of(base), score_of(base + rng.normal(0, 1, 30)), seed).p)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_equal_samples_do_not_differ() -> None:
    ratio = np.random.default_rng(0).integers(1, 9, (20, 3, 2)).astype(float)
    for samples in (np.arange(10.0), ratio):
        found = difference(score_of(samples), score_of(samples))
        assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_samples_of_other_data_are_not_paired() -> None:
    found = difference(score_of(np.zeros(5)), score_of(np.ones(6)))
    assert found.value == 1
    assert found.p is None
    assert difference(plain_score(1), plain_score(3)).value == 2


def test_intervals_that_touch_and_numbers_without_any_are_not_apart() -> None:
    assert apart(Score(1, 0.9, 1.1), Score(2, 1.9, 2.1)) and apart(Score(2, 1.9, 2.1), Score(1, 0.9, 1.1))
    assert not apart(Score(1, 0.9, 1.1), Score(1.2, 1.1, 1.3))
    assert not apart(plain_score(1), plain_score(2))
    assert apart(plain_score(1), Score(2, 1.9, 2.1))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    assert max(adjusted) <= 1
    assert all(
        adjusted[i] <= adjusted[j]
        for i in range(len(p_values))
        for j in range(len(p_values))
        if p_values[i] < p_values[j]
    )


def test_holm_on_an_example_worked_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_plugin_may_answer_with_numbers() -> None:
    found = as_result("mine", {"a": 1.5, "b": 2})
    assert isinstance(found, ProbeResult)
    assert found.main.value == 1.5
    with pytest.raises(PluginError, match="Probe 'mine' returned a list"):
        as_result("mine", [1])


def test_right_and_wrong_are_tested_by_mcnemar() -> None:
    """Against scipy's binomial test of the samples that one alone got right."""
    rng = np.random.default_rng(3)
    for count in (1, 7, 40, 400):
        a, b = ((rng.random(count) < share).astype(float) for share in (0.4, 0.55))
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        assert mcnemar(a, b) == pytest.approx(expected)
        assert difference(score_of(a), score_of(b)).p == pytest.approx(expected)
    graded = score_of(rng.random(40)), score_of(rng.random(40))
    # of grades in between there is no McNemar: the permutation test draws
    assert (difference(*graded).p * 5001) == pytest.approx(round(difference(*graded).p * 5001))
