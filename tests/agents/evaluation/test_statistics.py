"""Statistics against scipy, closed forms and simulated coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from servegym.agents.statistics import (
    interquartile_mean,
    mean_interval,
    probability_of_improvement,
    relative_difference,
    stratified_bootstrap,
    t_quantile,
)


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 30, 31, 60, 1000])
def test_t_quantiles_are_those_of_scipy(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)


def test_mean_intervals_are_those_of_scipy() -> None:
    values = np.array([1.0, 1.4, 0.9, 1.2, 1.1])
    interval = mean_interval(values)
    expected = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-3)
    single = mean_interval([2.0])
    assert single.value == 2.0
    assert np.isnan(single.low)
    assert not single.excludes_zero


def test_relative_differences_are_paired_and_cover_as_they_claim() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        level = rng.lognormal(0, 1.0, 5)  # seeds differ wildly, policies by 10 %
        gap = relative_difference(level * 0.9 * rng.lognormal(0, 0.03, 5), level * rng.lognormal(0, 0.03, 5))
        covered += gap.low <= -0.1 <= gap.high
    assert 0.935 <= covered / 2000 <= 0.965


def test_interquartile_mean_ignores_outliers() -> None:
    assert interquartile_mean([1, 2, 3, 4, 5, 6, 7, 1e9]) == pytest.approx(4.5)
    assert interquartile_mean([[0.0, 10.0], [2.0, 4.0]]) == pytest.approx(3.0)


def test_probability_of_improvement_is_that_of_mann_whitney() -> None:
    rng = np.random.default_rng(1)
    mine, other = rng.normal(0, 1, 20), rng.normal(0.5, 1, 30)
    u = stats.mannwhitneyu(other, mine).statistic
    assert probability_of_improvement([mine], [other]) == pytest.approx(u / (20 * 30))


def test_bootstrap_agrees_with_scipy_and_repeats_itself() -> None:
    values = np.random.default_rng(2).exponential(1.0, 40)
    mine = stratified_bootstrap([values], lambda cells: float(cells[0].mean()), resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), rel=0.03)
    assert mine == stratified_bootstrap([values], lambda cells: float(cells[0].mean()), resamples=4000)
