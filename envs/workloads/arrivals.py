"""Arrival processes: points in time at a given mean rate.

Every process is a renewal process with gaps of mean 1 on an operational clock (:mod:`.modulation`) that is read at the
asked rate. The random numbers do not depend on the rate, so that runs at different loads differ in the density of
arrivals alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.configuration import Config
from servegym.envs.workloads.distributions import Float, NonNegative, Positive
from servegym.envs.workloads.modulation import Clock, Modulation, Pieces, markov_pieces


class _Process(Config, ABC):
    @abstractmethod
    def unit_gaps(self, rng: np.random.Generator, count: int) -> Float:
        """Return gaps of mean 1, shape (count,)."""

    def pieces(self, rng: np.random.Generator) -> Pieces | None:
        """Return the path of the relative rate, None where the rate is constant."""
        return None

    def sample(
        self, rate_rps: float, rng: np.random.Generator, *, count: int | None = None, duration_s: float | None = None
    ) -> Float:
        """Draw arrival times in seconds, increasing, from time 0 on; the first one follows a full gap.

        Args:
            rate_rps: mean rate, arrivals per second.
            rng: generator; equal state gives equal gaps at any rate.
            count: number of arrivals.
            duration_s: end of the time span, not included; with ``count`` too, whichever is reached first.

        Returns:
            Shape (arrivals,). With ``count`` arrivals the expected time of the last is ``count / rate_rps`` (of a
            modulated process: approached as the run gets long against the modulation).
        """
        if count is None and duration_s is None:
            raise ValueError("count or duration_s")
        gap_rng, path_rng = rng.spawn(2)
        clock = Clock(self.pieces(path_rng))
        if duration_s is None:
            assert count is not None
            return clock.times(np.cumsum(self.unit_gaps(gap_rng, count)) / rate_rps)
        end = clock.mass(duration_s) * rate_rps
        chunk = count if count is not None else int(1.1 * end) + 100
        points = np.zeros(0)
        while len(points) == 0 or (count is None and points[-1] < end):
            gaps = self.unit_gaps(gap_rng, chunk)
            gaps[0] += points[-1] if len(points) else 0.0
            points = np.append(points, np.cumsum(gaps))
        times = clock.times(points[points < end] / rate_rps)
        return times[times < duration_s]

    def sample_within(self, duration_s: float, count: int, rng: np.random.Generator) -> Float:
        """Draw exactly ``count`` arrival times of ``[0, duration_s)``, increasing, shape (count,).

        The gaps are scaled so that arrival ``count + 1`` falls on the end; for Poisson arrivals that is their exact
        distribution given their number.
        """
        gap_rng, path_rng = rng.spawn(2)
        clock = Clock(self.pieces(path_rng))
        points = np.cumsum(self.unit_gaps(gap_rng, count + 1))
        return clock.times(points[:-1] * (clock.mass(duration_s) / points[-1]))


class Constant(_Process):
    """Equal gaps."""

    process: Literal["constant"]

    def unit_gaps(self, rng: np.random.Generator, count: int) -> Float:
        """Return ones."""
        return np.ones(count)


class Poisson(_Process):
    """Exponential gaps: coefficient of variation (CV) 1."""

    process: Literal["poisson"]

    def unit_gaps(self, rng: np.random.Generator, count: int) -> Float:
        """Return exponential gaps of mean 1, shape (count,)."""
        return rng.standard_exponential(count)


class Gamma(_Process):
    """Gamma gaps: CV ``shape ** -0.5``; bursts below shape 1, more regular than Poisson above."""

    process: Literal["gamma"]
    shape: Positive = Field(description="shape of the Gamma distribution; the CV of the gaps is shape ** -0.5")

    def unit_gaps(self, rng: np.random.Generator, count: int) -> Float:
        """Return Gamma gaps of mean 1, shape (count,)."""
        return rng.standard_gamma(self.shape, count) / self.shape


class Weibull(_Process):
    """Weibull gaps: ``CV**2 = G(1 + 2 / shape) / G(1 + 1 / shape)**2 - 1`` with the Gamma function G."""

    process: Literal["weibull"]
    shape: Annotated[float, Field(ge=0.05)] = Field(
        description="shape of the Weibull distribution: 1 is Poisson, less is burstier"
    )

    def unit_gaps(self, rng: np.random.Generator, count: int) -> Float:
        """Return Weibull gaps of mean 1, shape (count,)."""
        return rng.weibull(self.shape, count) / math.gamma(1.0 + 1.0 / self.shape)


Renewal = Annotated[Constant | Poisson | Gamma | Weibull, Field(discriminator="process")]
"""A process of independent gaps."""


class _Modulated(_Process):
    gaps: Renewal = Field(default=Poisson(process="poisson"), description="renewal process on the modulated clock")

    def unit_gaps(self, rng: np.random.Generator, count: int) -> Float:
        """Return the gaps of mean 1 on the modulated clock, shape (count,)."""
        return self.gaps.unit_gaps(rng, count)


class Modulated(_Modulated):
    """A rate that changes over time: autoregressive, sinusoidal, or by a profile.

    With Poisson gaps, a Cox process: the dispersion (variance over mean) of counts in windows short against the
    modulation is ``1 + mean count * variance of m``.
    """

    process: Literal["modulated"]
    modulation: Modulation = Field(description="how the rate changes over time")

    def pieces(self, rng: np.random.Generator) -> Pieces:
        """Return the path of the modulation."""
        return self.modulation.pieces(rng)


class Mmpp(_Modulated):
    """Markov-modulated Poisson process: one rate per state of a Markov chain, see :func:`.modulation.markov_pieces`.

    With two states of rates ``l1, l2`` left at rates ``q1, q2``, the dispersion of counts grows with the window to
    ``1 + 2 q1 q2 (l1 - l2)**2 / ((q1 + q2)**2 (l1 q2 + l2 q1))``.
    """

    process: Literal["mmpp"]
    relative_rates: tuple[NonNegative, ...] = Field(min_length=2, description="per state; only their ratios count")
    mean_stay_s: tuple[Positive, ...] = Field(min_length=2, description="mean time in each state per visit")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.relative_rates) != len(self.mean_stay_s):
            raise ValueError(
                f"as many relative_rates ({len(self.relative_rates)}) as mean_stay_s ({len(self.mean_stay_s)})"
            )
        if not any(self.relative_rates):
            raise ValueError("at least one of relative_rates above 0")
        return self

    def pieces(self, rng: np.random.Generator) -> Pieces:
        """Return a path of the chain."""
        return markov_pieces(self.relative_rates, self.mean_stay_s, rng)


class OnOff(_Modulated):
    """Bursts: exponential periods of a high rate and of a low one, by default none. An MMPP of two states."""

    process: Literal["on_off"]
    mean_on_s: Positive = Field(description="mean length of a burst, seconds")
    mean_off_s: Positive = Field(description="mean length of the period between two bursts, seconds")
    off_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="rate when off, share of that when on"
    )

    def pieces(self, rng: np.random.Generator) -> Pieces:
        """Return a path of on and off periods."""
        return markov_pieces((1.0, self.off_rate), (self.mean_on_s, self.mean_off_s), rng)


Arrivals = Annotated[
    Constant | Poisson | Gamma | Weibull | Modulated | Mmpp | OnOff,
    Field(discriminator="process"),
]
"""Any arrival process; its ``process`` says which."""
