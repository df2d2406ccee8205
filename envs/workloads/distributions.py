"""Distributions of request properties: token counts, turns of a session, think times.

A sample of ``n`` values is the beginning of a sample of ``m > n`` values from the same generator state. Two runs that
differ only in their number of requests, or in their rate, thus see the same values request by request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from servegym.configuration import Config

Float = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]

# Token counts travel as int32; no context comes near this.
MOST_TOKENS = 2**28


class _Distribution(Config, ABC):
    @abstractmethod
    def sample(self, rng: np.random.Generator, count: int) -> Float:
        """Return independent draws, shape (count,)."""


class Fixed(_Distribution):
    """Always the same value."""

    kind: Literal["fixed"]
    value: NonNegative = Field(description="the value")

    def sample(self, rng: np.random.Generator, count: int) -> Float:
        """Return ``value``, shape (count,)."""
        return np.full(count, self.value)


class Uniform(_Distribution):
    """Uniform on ``[low, high]``."""

    kind: Literal["uniform"]
    low: NonNegative = Field(description="smallest value")
    high: NonNegative = Field(description="largest value")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high ({self.high}) at least as large as low ({self.low})")
        return self

    def sample(self, rng: np.random.Generator, count: int) -> Float:
        """Return draws, shape (count,)."""
        return rng.uniform(self.low, self.high, count)


class LogNormal(_Distribution):
    """Mixture of lognormals ``sum_k weights_k LN(mu_k, sigma_k)`` (natural logarithm), cut to ``[low, high]``.

    Values beyond an end are set to it, as a serving system does that caps a request at its context length.
    """

    kind: Literal["lognormal"]
    weights: tuple[Positive, ...] = Field(default=(1.0,), description="relative; need not sum to 1")
    mu: tuple[float, ...] = Field(min_length=1, description="means of the logarithms, one per component")
    sigma: tuple[NonNegative, ...] = Field(
        min_length=1, description="standard deviations of the logarithms, one per component"
    )
    low: NonNegative = Field(default=0.0, description="smaller values are set to this")
    high: Positive | None = Field(default=None, description="larger values are set to this; default: no limit")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.weights) == len(self.mu) == len(self.sigma):
            raise ValueError(
                f"as many weights ({len(self.weights)}) as mu ({len(self.mu)}) and sigma ({len(self.sigma)})"
            )
        if self.high is not None and self.high < self.low:
            raise ValueError(f"high ({self.high}) at least as large as low ({self.low})")
        return self

    def sample(self, rng: np.random.Generator, count: int) -> Float:
        """Return draws, shape (count,)."""
        components, values = rng.spawn(2)
        chosen = choose(self.weights, components, count)
        mu, sigma = np.array(self.mu), np.array(self.sigma)
        logs = mu[chosen] + sigma[chosen] * values.standard_normal(count)
        return np.clip(np.exp(logs), self.low, self.high)


class Quantiles(_Distribution):
    """Inverse of an empirical distribution function, linear between quantiles at equal steps of probability.

    ``values[i]`` is the quantile at ``i / (len(values) - 1)``: the first is the minimum, the last the maximum. Over the
    last step a straight line puts far too much weight on the maximum of a heavy-tailed sample; with ``tail_index`` the
    values there are ``values[-2] * (probability of a larger one within the step) ** (-1 / tail_index)`` instead, a
    Pareto tail that is cut at the maximum.
    """

    kind: Literal["quantiles"]
    values: tuple[NonNegative, ...] = Field(
        min_length=2, description="quantiles at equal steps of probability, from minimum to maximum"
    )
    tail_index: Positive | None = Field(
        default=None, description="index of a Pareto tail in the last step; default: a straight line"
    )

    @model_validator(mode="after")
    def _sorted(self) -> Self:
        if any(right < left for left, right in zip(self.values, self.values[1:], strict=False)):
            raise ValueError("values in increasing order")
        return self

    def sample(self, rng: np.random.Generator, count: int) -> Float:
        """Return draws, shape (count,)."""
        uniform = rng.random(count) * (len(self.values) - 1)
        values = np.interp(uniform, np.arange(len(self.values)), self.values)
        if self.tail_index is not None:
            last = len(self.values) - 2
            tail = uniform > last
            survival = 1.0 - (uniform[tail] - last)
            values[tail] = np.minimum(self.values[-2] * survival ** (-1.0 / self.tail_index), self.values[-1])
        return values


class Zipf(_Distribution):
    """Whole numbers ``x`` of ``[low, high]`` with probability proportional to ``x ** -exponent``."""

    kind: Literal["zipf"]
    exponent: NonNegative = Field(description="0: all alike; larger: small values are more frequent")
    low: PositiveInt = Field(default=1, description="smallest value")
    high: Annotated[int, Field(ge=1, le=10_000_000)] = Field(description="largest value")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high ({self.high}) at least as large as low ({self.low})")
        return self

    def sample(self, rng: np.random.Generator, count: int) -> Float:
        """Return draws, shape (count,)."""
        support = np.arange(self.low, self.high + 1, dtype=np.float64)
        return support[choose(support**-self.exponent, rng, count)]


class Geometric(_Distribution):
    """Number of turns until a stop: the first is the last with probability ``first_p``, every later one with ``p``.

    ``P(1) = first_p`` and ``P(n) = (1 - first_p) (1 - p) ** (n - 2) p`` after that; ``first_p`` defaults to ``p``, the
    plain geometric distribution. The mean is ``1 + (1 - first_p) / p``.
    """

    kind: Literal["geometric"]
    p: Annotated[float, Field(gt=0, le=1)] = Field(description="probability that a later turn is the last")
    first_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="probability that the first turn is the last; default: p"
    )

    def sample(self, rng: np.random.Generator, count: int) -> Float:
        """Return draws, shape (count,)."""
        first_p = self.p if self.first_p is None else self.first_p
        first, later = rng.spawn(2)
        stopped = first.random(count) < first_p
        return np.where(stopped, 1.0, 1.0 + later.geometric(self.p, count))


class Beta(_Distribution):
    """Beta distribution stretched over ``[low, high]``: a hump, a slope or a bathtub, by ``a`` and ``b``."""

    kind: Literal["beta"]
    a: Positive = Field(description="first shape parameter")
    b: Positive = Field(description="second shape parameter")
    low: NonNegative = Field(description="smallest value")
    high: NonNegative = Field(description="largest value")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high ({self.high}) at least as large as low ({self.low})")
        return self

    def sample(self, rng: np.random.Generator, count: int) -> Float:
        """Return draws, shape (count,)."""
        return self.low + (self.high - self.low) * rng.beta(self.a, self.b, count)


Distribution = Annotated[
    Fixed | Uniform | LogNormal | Quantiles | Zipf | Geometric | Beta,
    Field(discriminator="kind"),
]
"""Any distribution; its ``kind`` says which."""


def choose(weights: npt.ArrayLike, rng: np.random.Generator, count: int) -> npt.NDArray[np.intp]:
    """Draw indices with probability proportional to ``weights``, one uniform number each. Shape (count,)."""
    cumulative = np.cumsum(np.asarray(weights, dtype=np.float64))
    chosen: npt.NDArray[np.intp] = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")
    return chosen


def zipf_weights(count: int, exponent: float) -> Float:
    """Shares of ``count`` items by popularity rank, ``rank ** -exponent`` normalised to 1. Shape (count,)."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def sample_whole(distribution: Distribution, rng: np.random.Generator, count: int) -> Int32:
    """Draw whole numbers of at least 1: token counts or turns, rounded to the nearest. Shape (count,)."""
    return np.clip(np.rint(distribution.sample(rng, count)), 1, MOST_TOKENS).astype(np.int32)
