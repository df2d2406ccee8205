"""Distributions: moments, bounds, and samples that begin alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from servegym.envs.workloads.distributions import Distribution, choose, sample_whole, zipf_weights

ADAPTER: TypeAdapter[Any] = TypeAdapter(Distribution)
COUNT = 200_000

CASES: list[tuple[dict[str, Any], float]] = [
    ({"kind": "fixed", "value": 7}, 7.0),
    ({"kind": "uniform", "low": 10, "high": 30}, 20.0),
    ({"kind": "lognormal", "mu": [3.0], "sigma": [0.5]}, float(np.exp(3.125))),
    ({"kind": "lognormal", "weights": [1, 3], "mu": [2.0, 4.0], "sigma": [0.0, 0.0]}, 0.25 * np.e**2 + 0.75 * np.e**4),
    ({"kind": "quantiles", "values": [0, 10, 40]}, 15.0),
    # Half the mass uniform on [0, 10], half Pareto from 10 with index 3, whose mean is 15, uncut in effect.
    ({"kind": "quantiles", "values": [0, 10, 1e9], "tail_index": 3}, 10.0),
    ({"kind": "zipf", "exponent": 0, "high": 9}, 5.0),
    ({"kind": "zipf", "exponent": 1, "high": 3}, 18 / 11),
    ({"kind": "geometric", "p": 0.25}, 4.0),
    ({"kind": "geometric", "p": 0.51, "first_p": 0.756}, 1 + 0.244 / 0.51),
    ({"kind": "beta", "a": 1, "b": 3, "low": 100, "high": 500}, 200.0),
]


@pytest.mark.parametrize(("config", "mean"), CASES)
def test_mean(config: dict[str, Any], mean: float) -> None:
    values = ADAPTER.validate_python(config).sample(np.random.default_rng(1), COUNT)
    assert values.mean() == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("config", [config for config, _ in CASES])
def test_a_sample_begins_like_a_longer_one(config: dict[str, Any]) -> None:
    distribution = ADAPTER.validate_python(config)
    short = distribution.sample(np.random.default_rng(5), 100)
    long = distribution.sample(np.random.default_rng(5), 5000)
    np.testing.assert_array_equal(short, long[:100])


def test_lognormal_is_cut_at_its_ends() -> None:
    config = {"kind": "lognormal", "mu": [5.0], "sigma": [2.0], "low": 10, "high": 400}
    values = ADAPTER.validate_python(config).sample(np.random.default_rng(0), COUNT)
    assert values.min() == 10
    assert values.max() == 400
    assert (values == 400).mean() > 0.1


def test_quantiles_reproduce_themselves() -> None:
    knots = np.sort(np.random.default_rng(3).lognormal(5, 1.5, 101))
    values = ADAPTER.validate_python({"kind": "quantiles", "values": tuple(knots)}).sample(
        np.random.default_rng(0), COUNT
    )
    assert (values[:, None] <= knots[::10]).mean(axis=0) == pytest.approx(np.linspace(0, 1, 11), abs=0.005)
    assert values.max() <= knots[-1]


def test_geometric_probabilities() -> None:
    turns = ADAPTER.validate_python({"kind": "geometric", "p": 0.5, "first_p": 0.8}).sample(
        np.random.default_rng(0), COUNT
    )
    shares = np.bincount(turns.astype(int))[1:5] / COUNT
    assert shares == pytest.approx([0.8, 0.1, 0.05, 0.025], rel=0.06)


@given(
    mu=st.floats(-5, 30),
    sigma=st.floats(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_whole_samples_are_at_least_one_and_bounded(mu: float, sigma: float, seed: int) -> None:
    distribution = ADAPTER.validate_python({"kind": "lognormal", "mu": (mu,), "sigma": (sigma,)})
    tokens = sample_whole(distribution, np.random.default_rng(seed), 50)
    assert tokens.dtype == np.int32
    assert tokens.min() >= 1


def test_choose_follows_the_weights() -> None:
    chosen = choose([2.0, 0.0, 6.0], np.random.default_rng(0), COUNT)
    assert np.bincount(chosen, minlength=3) / COUNT == pytest.approx([0.25, 0.0, 0.75], abs=0.01)


def test_zipf_weights() -> None:
    assert zipf_weights(3, 1.0) == pytest.approx(np.array([6, 3, 2]) / 11)
    assert zipf_weights(4, 0.0) == pytest.approx([0.25] * 4)


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "uniform", "low": 5, "high": 4},
        {"kind": "lognormal", "mu": [1.0, 2.0], "sigma": [1.0]},
        {"kind": "lognormal", "mu": [1.0], "sigma": [-1.0]},
        {"kind": "lognormal", "mu": [1.0], "sigma": [1.0], "low": 9, "high": 3},
        {"kind": "lognormal", "mu": [], "sigma": []},
        {"kind": "quantiles", "values": [3, 2]},
        {"kind": "quantiles", "values": [3]},
        {"kind": "zipf", "exponent": 1, "low": 5, "high": 4},
        {"kind": "geometric", "p": 0},
        {"kind": "geometric", "p": 0.5, "first_p": 1.5},
        {"kind": "beta", "a": 0, "b": 1, "low": 0, "high": 1},
        {"kind": "beta", "a": 1, "b": 1, "low": 2, "high": 1},
        {"kind": "fixed", "value": float("nan")},
        {"kind": "fixed", "value": 1, "extra": 2},
        {"kind": "normal", "mean": 1},
        {"value": 1},
    ],
)
def test_bad_configs(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(config)
