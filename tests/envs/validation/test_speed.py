"""The speed of a machine during a live run."""

from __future__ import annotations

import numpy as np
import pytest
from support import random_table

from servegym.baselines.registry import create
from servegym.envs.calibration.records import Step
from servegym.envs.profiles.profile import load_profile
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.validation.speed import Speed, expected_s


def steps(slowness: list[float]) -> list[Step]:
    """Decode steps for a second at each slowness, from time 100 on."""
    cost, now, found = load_profile("cpu-tiny-moe").compile(), 100.0, []
    for second, factor in enumerate(slowness):
        while now < 101 + second:
            step = Step(now, now, True, 4, 0, 0, 0.0, 4, 800)
            found.append(step)
            now += factor * expected_s(cost, step)
    return found


def test_steps_are_compared_with_the_profile() -> None:
    profile = load_profile("cpu-tiny-moe")
    step = Step(0.0, 0.0, True, 3, 100, 50, 100 * (50 + 101 / 2), 2, 700)
    assert expected_s(profile.compile(), step) == pytest.approx(profile.compile().step_s([(50, 100)], [300, 400]))

    speed = Speed.of(steps([1.0, 1.5, 1.2]), profile, 100.0)
    factors = [fault.factor for fault in speed.faults(1)]
    assert factors == pytest.approx([1.0, 1.5, 1.2], rel=0.01)
    assert [fault.at_s for fault in speed.faults(1)] == [0.0, 1.0, 2.0]
    summary = speed.summary()
    assert summary["busy_s"] == pytest.approx(3.0, abs=0.03)
    assert summary["measured_over_profile"] == pytest.approx(3 / (1 + 1 / 1.5 + 1 / 1.2), rel=0.01)
    assert Speed.of([], profile, 0.0).faults(0) == []


def test_a_simulation_at_that_speed_takes_as_long() -> None:
    table = random_table(0, 100, rate_rps=5.0)
    speed = Speed.of(steps([1.4] * 30), load_profile("cpu-tiny-moe"), 100.0)
    totals = []
    for faults in ((), tuple(speed.faults(0))):
        config = ClusterConfig(engines=1, profile="cpu-tiny-moe", faults=faults)
        run = SimulatedCluster(config, table, create("request", "fcfs"), create("engine", "round_robin"))
        run.run()
        records = run.memory.requests
        totals.append(float(np.mean((records["finish_s"] - records["first_s"]) / np.maximum(records["output"] - 1, 1))))
    assert totals[1] > 1.3 * totals[0]
