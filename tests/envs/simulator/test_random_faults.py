"""Faults as a random process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import random_table

from servegym.baselines.registry import create
from servegym.configuration import validate
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig, Fault
from servegym.envs.simulator.kernel.state import FINISHED
from servegym.errors import InputError

PROCESSES: list[dict[str, Any]] = [
    {"kind": "die", "mean_between_s": 4.0, "mean_duration_s": 1.0},
    {"kind": "hang", "mean_between_s": 5.0, "mean_duration_s": 0.5},
    {"kind": "slow", "mean_between_s": 3.0, "mean_duration_s": 2.0, "factor": (1.5, 4.0)},
    {"kind": "mute", "mean_between_s": 3.0, "mean_duration_s": 2.0},
    {"kind": "leave", "mean_between_s": 6.0, "mean_duration_s": 1.0},
]


def run(profile: str, seed: int, dispatch: str = "least_requests", **config: Any) -> SimulatedCluster:
    cluster = ClusterConfig.model_validate({"profile": profile, "engines": 3} | config)
    simulated = SimulatedCluster(
        cluster, random_table(1, 800, rate_rps=60.0), create("request", "fcfs"), create("engine", dispatch), seed=seed
    )
    simulated.run()
    return simulated


@pytest.mark.parametrize("mode", ["independent", "lockstep"])
def test_every_request_is_served_and_the_log_repeats_the_run(toy_profile: str, mode: str) -> None:
    simulated = run(toy_profile, 3, mode=mode, random_faults=PROCESSES)
    requests = simulated.memory.requests
    assert (requests["status"] == FINISHED).all()
    log = simulated.random_faults.log
    assert {fault.kind for fault in log} >= {"die", "recover", "hang", "resume", "slow", "mute", "unmute", "leave"}
    totals = (requests["finish_s"] - requests["arrival_s"]).sum()
    np.testing.assert_allclose(simulated.totals[1], totals, rtol=1e-12)
    again = run(toy_profile, 99, mode=mode, faults=[fault.model_dump() for fault in log])
    np.testing.assert_array_equal(again.memory.requests["finish_s"], requests["finish_s"])


def test_a_seed_gives_the_same_faults_whatever_the_policy(toy_profile: str) -> None:
    slow = [PROCESSES[2]]
    one, two = (run(toy_profile, 5, policy, random_faults=slow) for policy in ("round_robin", "lmetric"))
    end = min(one.now_s, two.now_s)

    def until_end(simulated: SimulatedCluster) -> list[Fault]:
        return [fault for fault in simulated.random_faults.log if fault.at_s < end]

    assert until_end(one) == until_end(two)
    assert len(until_end(one)) > 5
    assert run(toy_profile, 6, random_faults=slow).random_faults.log != one.random_faults.log


def test_enough_engines_keep_serving(toy_profile: str) -> None:
    simulated = run(
        toy_profile, 1, random_faults=[{"kind": "die", "mean_between_s": 0.3, "mean_duration_s": 3.0, "min_alive": 2}]
    )
    down = 0
    for fault in simulated.random_faults.log:
        down += 1 if fault.kind == "die" else -1
        assert 0 <= down <= 1
    assert len(simulated.random_faults.log) >= 5


def test_a_run_ends_when_nothing_can_bring_an_engine_back(toy_profile: str) -> None:
    faults = [{"at_s": 1.0, "engine": e, "kind": "die"} for e in range(3)]
    simulated = run(toy_profile, 1, faults=faults, random_faults=[PROCESSES[2]])
    assert 0 < simulated.finished < 800


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"mean_between_s": 0}, "random_faults.0.mean_between_s: got 0; allowed: greater than 0"),
        ({"factor": (3.0, 2.0)}, "factor: smallest first"),
        ({"kind": "explode"}, "random_faults.0.kind: got 'explode'; allowed: 'die', 'hang', 'slow', 'mute' or 'leave'"),
    ],
)
def test_bad_processes_are_one_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        validate(ClusterConfig, {"random_faults": [PROCESSES[2] | change]}, "cluster.yaml")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
