"""Arrival processes: rate, burstiness, and common random numbers across rates."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from servegym.envs.workloads.arrivals import Arrivals
from servegym.envs.workloads.distributions import Float
from servegym.envs.workloads.modulation import Clock, markov_pieces

ADAPTER: TypeAdapter[Any] = TypeAdapter(Arrivals)
RATE = 5.0

PROCESSES: dict[str, dict[str, Any]] = {
    "constant": {"process": "constant"},
    "poisson": {"process": "poisson"},
    "gamma": {"process": "gamma", "shape": 0.3},
    "weibull": {"process": "weibull", "shape": 0.6},
    "ar1": {"process": "modulated", "modulation": {"kind": "ar1", "phi": 0.7, "sigma": 0.25, "step_s": 60}},
    "sinusoid": {"process": "modulated", "modulation": {"kind": "sinusoid", "period_s": 600, "amplitude": 0.8}},
    "profile": {"process": "modulated", "modulation": {"kind": "profile", "step_s": 100, "levels": [1, 3, 0, 2]}},
    "mmpp": {"process": "mmpp", "relative_rates": [1, 5, 0.2], "mean_stay_s": [30, 10, 20]},
    "on_off": {"process": "on_off", "mean_on_s": 5, "mean_off_s": 20, "gaps": {"process": "gamma", "shape": 0.5}},
}


def make(name: str) -> Any:
    return ADAPTER.validate_python(PROCESSES[name])


def dispersion(times: Float, window_s: float) -> float:
    counts = np.histogram(times, np.arange(0, times[-1], window_s))[0]
    return float(counts.var() / counts.mean())


@pytest.mark.parametrize("name", PROCESSES)
def test_mean_rate(name: str) -> None:
    times = make(name).sample(RATE, np.random.default_rng(0), count=400_000)
    assert len(times) == 400_000
    assert (np.diff(times) >= 0).all()
    assert len(times) / times[-1] == pytest.approx(RATE, rel=0.03)


@pytest.mark.parametrize("name", PROCESSES)
def test_mean_count_over_a_span(name: str) -> None:
    process = make(name)
    counts = [len(process.sample(RATE, np.random.default_rng(seed), duration_s=1200.0)) for seed in range(150)]
    # A renewal process that starts with a full gap is late by (CV**2 - 1) / 2 arrivals: at most 2 of 6,000 here.
    error = 4 * np.std(counts) / math.sqrt(len(counts)) + 2
    assert abs(np.mean(counts) - RATE * 1200) < error
    assert error < 0.1 * RATE * 1200


@pytest.mark.parametrize(
    ("name", "cv"),
    [
        ("constant", 0.0),
        ("poisson", 1.0),
        ("gamma", 0.3**-0.5),
        ("weibull", math.sqrt(math.gamma(1 + 2 / 0.6) / math.gamma(1 + 1 / 0.6) ** 2 - 1)),
    ],
)
def test_coefficient_of_variation(name: str, cv: float) -> None:
    gaps = np.diff(make(name).sample(RATE, np.random.default_rng(1), count=400_000))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.02, abs=1e-6)


def test_dispersion_of_a_cox_process() -> None:
    """Counts per minute of an AR(1) Cox process: 1 + mean * variance of the lognormal rate."""
    times = make("ar1").sample(RATE, np.random.default_rng(2), count=1_000_000)
    assert dispersion(times, 60.0) == pytest.approx(1 + 60 * RATE * (math.exp(0.25**2) - 1), rel=0.1)


def test_correlation_of_a_cox_process() -> None:
    times = make("ar1").sample(RATE, np.random.default_rng(4), count=1_000_000)
    counts = np.histogram(times, np.arange(0, times[-1], 60.0))[0]
    # Of the variance 60 * RATE is Poisson noise, the rest is that of a lognormal rate.
    rate_variance = (60 * RATE) ** 2 * (math.exp(0.25**2) - 1)
    expected = (60 * RATE) ** 2 * (math.exp(0.7 * 0.25**2) - 1) / (rate_variance + 60 * RATE)
    assert np.corrcoef(counts[1:], counts[:-1])[0, 1] == pytest.approx(expected, abs=0.05)


def test_dispersion_of_a_two_state_mmpp() -> None:
    config = {"process": "mmpp", "relative_rates": [1, 4], "mean_stay_s": [6, 3]}
    times = ADAPTER.validate_python(config).sample(RATE, np.random.default_rng(3), count=1_000_000)
    low, high = RATE / 2, 4 * RATE / 2  # Time shares 2/3 and 1/3: mean relative rate 2.
    q1, q2 = 1 / 6, 1 / 3
    limit = 1 + 2 * q1 * q2 * (low - high) ** 2 / ((q1 + q2) ** 2 * (low * q2 + high * q1))
    assert dispersion(times, 200.0) == pytest.approx(limit, rel=0.1)


def test_profile_levels() -> None:
    times = make("profile").sample(RATE, np.random.default_rng(0), count=200_000)
    shares = np.histogram(times % 400, [0, 100, 200, 300, 400])[0] / len(times)
    assert shares == pytest.approx([1 / 6, 3 / 6, 0, 2 / 6], abs=0.01)


def test_sinusoid_peaks_after_a_quarter_period() -> None:
    times = make("sinusoid").sample(RATE, np.random.default_rng(0), count=400_000)
    shares = np.histogram(times % 600, np.linspace(0, 600, 13))[0] / len(times)
    angles = np.linspace(0, 2 * np.pi, 13)
    expected = np.diff(angles - 0.8 * np.cos(angles)) / (2 * np.pi)
    assert shares == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize("name", ["constant", "poisson", "gamma", "weibull"])
def test_rate_only_scales_renewal_processes(name: str) -> None:
    slow = make(name).sample(2.0, np.random.default_rng(9), count=1000)
    fast = make(name).sample(8.0, np.random.default_rng(9), count=1000)
    np.testing.assert_allclose(slow, 4 * fast, rtol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_span_and_count_give_the_same_arrivals(name: str) -> None:
    process = make(name)
    by_count = process.sample(RATE, np.random.default_rng(7), count=20_000)
    by_span = process.sample(RATE, np.random.default_rng(7), duration_s=500.0)
    both = process.sample(RATE, np.random.default_rng(7), count=20_000, duration_s=500.0)
    np.testing.assert_array_equal(by_span, by_count[: len(by_span)])
    np.testing.assert_array_equal(by_span, both)
    assert by_count[len(by_span)] >= 500.0
    assert len(process.sample(RATE, np.random.default_rng(7), count=3, duration_s=500.0)) <= 3


@pytest.mark.parametrize("name", PROCESSES)
def test_sample_within_a_span(name: str) -> None:
    times = make(name).sample_within(300.0, 1000, np.random.default_rng(0))
    assert len(times) == 1000
    assert times[0] >= 0
    assert times[-1] <= 300.0
    assert (np.diff(times) >= 0).all()


def test_an_empty_span() -> None:
    assert len(make("constant").sample(1.0, np.random.default_rng(0), duration_s=0.5)) == 0


def test_count_or_duration_is_needed() -> None:
    with pytest.raises(ValueError, match="count or duration_s"):
        make("poisson").sample(1.0, np.random.default_rng(0))


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), times=st.lists(st.floats(0, 1000), min_size=1, max_size=20))
def test_clock_inverts_itself(seed: int, times: list[float]) -> None:
    clock = Clock(markov_pieces((1.0, 3.0), (5.0, 2.0), np.random.default_rng(seed)))
    ordered = np.sort(np.array(times))
    masses = np.array([clock.mass(time) for time in ordered])
    np.testing.assert_allclose(clock.times(masses), ordered, atol=1e-6)


def test_markov_time_shares() -> None:
    pieces = markov_pieces((1.0, 2.0, 4.0), (1.0, 2.0, 3.0), np.random.default_rng(0))
    durations, rates = (np.concatenate(part) for part in zip(*(next(pieces) for _ in range(100)), strict=True))
    mean_rate = (1 * 1 + 2 * 2 + 4 * 3) / 6
    for relative, share in ((1.0, 1 / 6), (2.0, 2 / 6), (4.0, 3 / 6)):
        in_state = np.isclose(rates, relative / mean_rate)
        assert durations[in_state].sum() / durations.sum() == pytest.approx(share, rel=0.03)
    assert (rates[1:] != rates[:-1]).all()


def test_a_million_arrivals_take_well_under_two_seconds() -> None:
    start = time.perf_counter()
    for name in PROCESSES:
        make(name).sample(RATE, np.random.default_rng(0), count=1_000_000)
    assert time.perf_counter() - start < 1.0 * len(PROCESSES)


@pytest.mark.parametrize(
    "config",
    [
        {"process": "gamma"},
        {"process": "gamma", "shape": 0},
        {"process": "weibull", "shape": 0.001},
        {"process": "mmpp", "relative_rates": [1, 2], "mean_stay_s": [1]},
        {"process": "mmpp", "relative_rates": [0, 0], "mean_stay_s": [1, 1]},
        {"process": "mmpp", "relative_rates": [1], "mean_stay_s": [1]},
        {"process": "on_off", "mean_on_s": 1, "mean_off_s": 0},
        {"process": "modulated"},
        {"process": "modulated", "modulation": {"kind": "ar1", "phi": 1.0, "sigma": 1}},
        {"process": "modulated", "modulation": {"kind": "sinusoid", "period_s": 1, "amplitude": 2}},
        {"process": "modulated", "modulation": {"kind": "profile", "step_s": 1, "levels": [0, 0]}},
        {"process": "poisson", "rate_rps": 3},
        {"process": "bursty"},
    ],
)
def test_bad_configs(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(config)
