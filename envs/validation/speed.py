"""How fast a machine was during a live run, as its engines' step records show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servegym.envs.calibration.records import Step, durations
from servegym.envs.profiles.profile import Profile, StepCost
from servegym.envs.simulator.config import Fault

EVERY_S = 1.0
"""Interval over which a speed is averaged: long beside a step, short beside what disturbs a machine."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Durations of an engine's steps, measured and as a profile promises of the same steps.

    Attributes:
        start_s: when each began, seconds from the start of the run, shape (steps,).
        measured_s, expected_s: its duration, same shape.
    """

    start_s: npt.NDArray[np.float64]
    measured_s: npt.NDArray[np.float64]
    expected_s: npt.NDArray[np.float64]

    @classmethod
    def of(cls, steps: list[Step], profile: Profile, start_s: float) -> Speed:
        """Compare recorded steps with a profile.

        Args:
            steps: of one engine.
            profile: the profile.
            start_s: of the run, on the clock of the records.
        """
        cost = profile.compile()
        rows = [(step.start_s - start_s, seconds, expected_s(cost, step)) for step, seconds in durations(steps)]
        return cls(*np.array(rows, dtype=np.float64).reshape(-1, 3).T)

    def faults(self, engine: int) -> list[Fault]:
        """Return changes of an engine's speed that make a simulation's steps as slow as these, interval by interval."""
        interval = (self.start_s // EVERY_S).astype(int)
        found = []
        for number in np.unique(interval[interval >= 0]):
            inside = interval == number
            factor = float(self.measured_s[inside].sum() / self.expected_s[inside].sum())
            found.append(Fault(at_s=float(number * EVERY_S), engine=engine, kind="slow", factor=factor))
        return found

    def summary(self) -> dict[str, float]:
        """Return the number of steps, their time, and how much longer than promised all and the usual one took."""
        if not len(self.measured_s):
            return {"steps": 0.0, "busy_s": 0.0}
        ratio = self.measured_s / self.expected_s
        return {
            "steps": float(len(ratio)),
            "busy_s": float(self.measured_s.sum()),
            "measured_over_profile": float(self.measured_s.sum() / self.expected_s.sum()),
            "median": float(np.median(ratio)),
            "p95": float(np.quantile(ratio, 0.95)),
        }


def expected_s(cost: StepCost, step: Step) -> float:
    """Return what a profile promises of a recorded step, seconds."""
    tokens = step.prefill_tokens + step.decodes
    return float(
        cost.fixed_s
        + cost.sequence_s * step.sequences
        + cost.local_table_s[tokens]
        + cost.moe_table_s[tokens]
        + cost.pair_s * step.prefill_pairs
        + cost.context_s * step.context_tokens
    )
