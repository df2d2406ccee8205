"""What requests are about, and how it drifts: the mix of tasks over time."""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from servegym.configuration import Config
from servegym.errors import InputError

NonNegative = Annotated[float, Field(ge=0)]
Weights = dict[str, NonNegative]


class Change(Config):
    """From ``at_s`` on the mix moves to other weights: at once, or along a line over ``ramp_s``."""

    at_s: NonNegative = Field(description="begin of the move, seconds from the start of the run")
    weights: Weights = Field(min_length=1, description="weight of each task by name; absent ones 0")
    ramp_s: NonNegative = Field(default=0.0, description="duration of the move; 0: a step")


class Daily(Config):
    """The mix swings to other weights and back, as a cosine, once per period."""

    weights: Weights = Field(min_length=1, description="weights at the far end of the swing")
    period_s: Annotated[float, Field(gt=0)] = Field(default=86_400.0, description="length of a period, seconds")


class TaskMix(Config):
    """Shares of the tasks among arriving requests, and how they drift. Tasks are named by the routing source."""

    weights: Weights = Field(default_factory=dict, description="at the start; default: all tasks alike")
    changes: tuple[Change, ...] = Field(default=(), description="moves to other weights, in order of time")
    daily: Daily | None = Field(default=None, description="a swing on top of them; default: none")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        end = 0.0
        for change in self.changes:
            if change.at_s < end:
                raise ValueError(f"changes one after the other (the one before ends at {end:g} s, got {change.at_s:g})")
            end = change.at_s + change.ramp_s
        return self

    def weights_at(self, time_s: npt.ArrayLike, names: tuple[str, ...]) -> npt.NDArray[np.float64]:
        """Return the shares of tasks, shape (times, tasks).

        Args:
            time_s: times, shape (times,).
            names: tasks of the routing source.

        Raises:
            InputError: a task that the source does not have, or weights that are all 0.
        """
        time = np.asarray(time_s, dtype=np.float64)
        now = np.tile(_shares(self.weights, names), (len(time), 1))
        for change in self.changes:
            target = _shares(change.weights, names)
            since = time - change.at_s
            done = np.clip(since / change.ramp_s, 0.0, 1.0) if change.ramp_s > 0 else (since >= 0).astype(np.float64)
            now = now + done[:, None] * (target - now)
        if self.daily is not None:
            swing = 0.5 - 0.5 * np.cos(2.0 * np.pi * time / self.daily.period_s)
            now = now + swing[:, None] * (_shares(self.daily.weights, names) - now)
        return now

    def assign(
        self, arrival_s: npt.NDArray[np.float64], session: npt.NDArray[np.int32], seed: int, names: tuple[str, ...]
    ) -> npt.NDArray[np.int32]:
        """Draw the task of each request from the mix at its arrival; a session keeps the task of its first request.

        Args:
            arrival_s: arrivals, shape (requests,).
            session: sessions, -1 without one, same shape.
            seed: the draw.
            names: tasks of the routing source.

        Raises:
            InputError: a task that the source does not have, or weights that are all 0.
        """
        first = np.arange(len(session))
        in_session = np.flatnonzero(session >= 0)
        if len(in_session):
            order = in_session[np.lexsort((arrival_s[in_session], session[in_session]))]
            _, opening, member = np.unique(session[order], return_index=True, return_inverse=True)
            first[order] = order[opening[member]]
        uniform = np.random.default_rng((seed, 0x7A5)).random(len(session))[first]
        edges = np.cumsum(self.weights_at(arrival_s[first], names), axis=1)
        drawn = (uniform[:, None] >= edges).sum(axis=1)
        return np.asarray(np.minimum(drawn, len(names) - 1), dtype=np.int32)


def _shares(weights: Weights, names: tuple[str, ...]) -> npt.NDArray[np.float64]:
    for name in weights:
        if name not in names:
            raise InputError("task_mix", "weights", f"got task {name!r}; allowed: {', '.join(names)}")
    values = np.array([weights.get(name, 0.0) for name in names]) if weights else np.ones(len(names))
    if values.sum() <= 0:
        raise InputError("task_mix", "weights", f"got {weights}; allowed: at least one above 0")
    return np.asarray(values / values.sum())
