"""Slow changes of the arrival rate, as a relative rate ``m(t)`` of mean 1 over absolute time.

A modulated arrival process is a renewal process on a clock that runs at speed ``m(t)`` (a Cox process where the renewal
process is Poisson). The time scale of the changes stays as it is when the mean rate of arrivals is raised.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.configuration import Config
from servegym.envs.workloads.distributions import Float, NonNegative, Positive

Pieces = Iterator[tuple[Float, Float]]
"""Endless pieces of ``m(t)`` from time 0 on: durations in seconds and the mean relative rate in each, same shape."""

_CHUNK = 1024


class _Modulation(Config, ABC):
    @abstractmethod
    def pieces(self, rng: np.random.Generator) -> Pieces:
        """Yield a path of the relative rate."""


class AutoRegressive(_Modulation):
    """First-order autoregressive log-rate, one value per ``step_s``.

    ``m_k = exp(x_k - sigma**2 / 2)``, ``x_{k+1} = phi x_k + sigma sqrt(1 - phi**2) e_k`` with standard normal ``e_k``;
    ``x_0`` is stationary, so ``sigma`` is the standard deviation of every ``x_k`` and the mean of ``m`` is 1. The mean
    over a finite run varies from seed to seed, as the load of a real system does from hour to hour.
    """

    kind: Literal["ar1"]
    phi: Annotated[float, Field(ge=0, lt=1)] = Field(description="correlation of neighbouring steps")
    sigma: NonNegative = Field(description="standard deviation of the log-rate")
    step_s: Positive = Field(default=60.0, description="time between two values, seconds")

    def pieces(self, rng: np.random.Generator) -> Pieces:
        """Yield a random path."""
        innovation = self.sigma * math.sqrt(1.0 - self.phi**2)
        state = self.sigma * rng.standard_normal()
        while True:
            logs = np.empty(_CHUNK)
            for k, noise in enumerate(rng.standard_normal(_CHUNK).tolist()):
                logs[k] = state
                state = self.phi * state + innovation * noise
            yield np.full(_CHUNK, self.step_s), np.exp(logs - self.sigma**2 / 2)


class Sinusoid(_Modulation):
    """``m(t) = 1 + amplitude * sin(2 pi (t / period_s + phase))``, in pieces of 1/256 period."""

    kind: Literal["sinusoid"]
    period_s: Positive = Field(description="length of a period, seconds")
    amplitude: Annotated[float, Field(ge=0, le=1)] = Field(description="share of the mean rate by which it swings")
    phase: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="share of the period at time 0")

    def pieces(self, rng: np.random.Generator) -> Pieces:
        """Yield the same period again and again; nothing is random."""
        angles = 2 * np.pi * (np.linspace(0, 1, 257) + self.phase)
        integral = np.diff(-np.cos(angles)) / (2 * np.pi)
        rates = 1.0 + self.amplitude * integral * 256
        while True:
            yield np.full(256, self.period_s / 256), rates


class RateProfile(_Modulation):
    """A repeating profile, such as one level per hour of the day; only the ratios of the levels count."""

    kind: Literal["profile"]
    step_s: Positive = Field(description="duration of each level")
    levels: tuple[NonNegative, ...] = Field(min_length=1, description="relative rates, one after the other")

    @model_validator(mode="after")
    def _positive_somewhere(self) -> Self:
        if not any(self.levels):
            raise ValueError("at least one level above 0")
        return self

    def pieces(self, rng: np.random.Generator) -> Pieces:
        """Yield the levels over and over; nothing is random."""
        rates = np.array(self.levels) / np.mean(self.levels)
        while True:
            yield np.full(len(rates), self.step_s), rates


def markov_pieces(relative_rates: Sequence[float], mean_stay_s: Sequence[float], rng: np.random.Generator) -> Pieces:
    """Yield the path of a Markov chain in continuous time; a piece is the stay in one state.

    Stays are exponential, and every other state is next with equal probability. The shares of time are thus
    proportional to ``mean_stay_s``; ``relative_rates``, one per state, are scaled to a mean of 1 over them. The chain
    starts in its stationary state.
    """
    stays, rates, states = np.array(mean_stay_s), np.array(relative_rates), len(mean_stay_s)
    rates = rates / (rates @ stays / stays.sum())
    state = int(rng.choice(states, p=stays / stays.sum()))
    while True:
        moves = rng.integers(1, states, _CHUNK)
        path = (state + np.cumsum(moves) - moves) % states
        state = int((path[-1] + moves[-1]) % states)
        yield stays[path] * rng.standard_exponential(_CHUNK), rates[path]


Modulation = Annotated[AutoRegressive | Sinusoid | RateProfile, Field(discriminator="kind")]
"""Any modulation; its ``kind`` says which."""


class Clock:
    """Operational time ``M(t)``, the integral of ``m`` from 0 to ``t``, and its inverse; grows as far as it is asked.

    Args:
        pieces: the path of ``m``; without one the clock is real time.
    """

    def __init__(self, pieces: Pieces | None = None) -> None:
        self._pieces = pieces
        self._times = np.zeros(1)
        self._masses = np.zeros(1)

    def mass(self, time_s: float) -> float:
        """Return ``M(time_s)``."""
        if self._pieces is None:
            return time_s
        while self._times[-1] < time_s:
            self._grow()
        return float(np.interp(time_s, self._times, self._masses))

    def times(self, masses: Float) -> Float:
        """Return the times at which ``M`` reaches ``masses`` (increasing), seconds, same shape."""
        if self._pieces is None or not len(masses):
            return masses
        while self._masses[-1] < masses[-1]:
            self._grow()
        return np.interp(masses, self._masses, self._times)

    def _grow(self) -> None:
        assert self._pieces is not None
        durations, masses = [], []
        # Doubling keeps the total cost of growing linear.
        for _ in range(max(1, len(self._times) // _CHUNK)):
            duration, rate = next(self._pieces)
            durations.append(duration)
            masses.append(duration * rate)
        self._times = np.append(self._times, self._times[-1] + np.cumsum(np.concatenate(durations)))
        self._masses = np.append(self._masses, self._masses[-1] + np.cumsum(np.concatenate(masses)))
