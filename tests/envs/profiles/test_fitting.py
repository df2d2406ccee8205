"""Relative least squares and fitted curves."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.envs.profiles.fitting import FitQuality, fit_curve, fit_relative, significant


def test_relative_fit_recovers_terms_of_different_size() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(5))
    columns = np.stack([np.ones(200), rng.integers(1, 256, 200), rng.uniform(1, 1e7, 200)], axis=1)
    truth = np.array([10.0, 0.1, 1e-5])
    noisy = columns @ truth * rng.normal(1, 0.01, 200)
    np.testing.assert_allclose(fit_relative(columns, noisy), truth, rtol=0.02)


def test_relative_fit_weighs_small_values_as_much_as_large_ones() -> None:
    # One constant for 1 and 100: the plain mean 50.5 would be 50 times too high for the first.
    (constant,) = fit_relative(np.ones((2, 1)), np.array([1.0, 100.0]))
    assert constant < 2


def test_negative_terms_are_dropped_and_the_rest_refitted() -> None:
    columns = np.stack([np.ones(3), np.array([1.0, 2, 3])], axis=1)
    slope_negative = fit_relative(columns, np.array([3.0, 2.9, 2.8]))
    assert slope_negative[1] == 0
    assert slope_negative[0] == pytest.approx(2.9, rel=0.01)


def test_the_least_error_is_found_where_terms_are_alike() -> None:
    """No coefficient can move to a smaller error, which dropping the most negative one by one does not reach."""
    rng = np.random.default_rng(np.random.SeedSequence(6))
    for _ in range(100):
        columns = np.abs(rng.normal(size=(20, 6)))
        values = columns @ rng.normal(size=6)
        values = np.abs(values) + 0.1
        found = fit_relative(columns, values)
        slope = (columns / values[:, None]).T @ (columns @ found / values - 1)
        assert slope.min() > -1e-6
        assert np.abs(slope[found > 0]).max(initial=0.0) < 1e-6


def test_a_unit_of_the_error() -> None:
    (constant,) = fit_relative(np.ones((2, 1)), np.array([1.0, 100.0]), np.ones(2))
    assert constant == pytest.approx(50.5)


def test_curve_does_not_fall() -> None:
    tokens = np.arange(1.0, 33.0)
    noisy = 10 + 0.1 * np.sin(tokens) + np.maximum(tokens - 16, 0)
    curve = fit_curve(tokens, noisy, np.array([1, 8, 16, 32]))
    assert (np.diff(curve) >= 0).all()
    assert FitQuality.of(np.interp(tokens, [1, 8, 16, 32], curve), noisy).worst < 0.03


@pytest.mark.parametrize(("value", "rounded"), [(123456.0, 123500.0), (0.0, 0.0), (1.23449, 1.234), (1e-7, 1e-7)])
def test_significant_digits(value: float, rounded: float) -> None:
    assert significant(value) == rounded
