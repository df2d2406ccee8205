"""Engines that die, hang, slow down, fall silent, leave and return, and the age of what they report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import random_table

from servegym.baselines.interface import E_TELEMETRY_AGE_S, E_WAITING, R_RECEIVED_TOKENS
from servegym.baselines.registry import create
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.kernel.state import FINISHED
from servegym.envs.workloads.table import RequestTable


def run(profile: str, faults: list[dict[str, Any]], order: str = "fcfs", **config: Any) -> SimulatedCluster:
    cluster = ClusterConfig.model_validate({"profile": profile, "engines": 2, "faults": faults} | config)
    simulated = SimulatedCluster(
        cluster, random_table(1, rate_rps=60.0), create("request", order), create("engine", "least_requests")
    )
    simulated.run()
    return simulated


def _totals_are_exact(simulated: SimulatedCluster) -> None:
    requests = simulated.memory.requests
    ttft, e2e = requests["first_s"] - requests["arrival_s"], requests["finish_s"] - requests["arrival_s"]
    np.testing.assert_allclose(simulated.totals[:2], [ttft.sum(), e2e.sum()], rtol=1e-12)


@pytest.mark.parametrize("request_policy", ["fcfs", "priority", "sjf_age", "spf_aging"])
@pytest.mark.parametrize("mode", ["independent", "lockstep"])
def test_requests_of_a_dead_engine_are_served_elsewhere(toy_profile: str, request_policy: str, mode: str) -> None:
    faults = [{"at_s": 2.0, "engine": 0, "kind": "die"}, {"at_s": 4.0, "engine": 0, "kind": "recover"}]
    simulated = run(toy_profile, faults, request_policy, mode=mode)
    requests = simulated.memory.requests
    assert (requests["status"] == FINISHED).all()
    assert requests["retries"].sum() > 0
    dead = (requests["arrival_s"] > 2.0) & (requests["arrival_s"] < 4.0)
    assert (requests["engine"][dead] == 1).all()
    assert (requests["engine"][requests["arrival_s"] > 4.0] == 0).any()
    assert (simulated.memory.engines["free_blocks"] == simulated.memory.engines["num_blocks"] - 1).all()
    _totals_are_exact(simulated)


def test_the_router_knows_what_a_resumed_request_has_received(toy_profile: str) -> None:
    fault = {"at_s": 2.0, "engine": 0, "kind": "die"}
    cluster = ClusterConfig.model_validate({"profile": toy_profile, "engines": 2, "faults": [fault]})
    simulated = SimulatedCluster(cluster, random_table(1, rate_rps=60.0), create("request", "fcfs"))
    requests, resumed = simulated.memory.requests, 0
    pending = simulated.next_decision()
    while pending:
        view = simulated.request_view()
        row = requests[view.index]
        assert view.received_tokens == row["generated"] == simulated.memory.request_row[R_RECEIVED_TOKENS]
        assert (view.received_tokens > 0) == (0.0 < row["first_s"] <= view.now_s)
        assert row["retries"] > 0 or view.received_tokens == 0
        resumed += view.received_tokens > 0
        pending = simulated.dispatch(view.index % 2 if simulated.engine_views().available[0] else 1)
    assert 0 < resumed < requests["retries"].sum()


def test_requests_wait_for_an_engine_when_all_are_dead(toy_profile: str) -> None:
    faults = [{"at_s": 1.0, "engine": e, "kind": "die"} for e in (0, 1)]
    simulated = run(toy_profile, [*faults, {"at_s": 20.0, "engine": 1, "kind": "recover"}])
    requests = simulated.memory.requests
    assert (requests["status"] == FINISHED).all()
    late = requests["arrival_s"] > 1.0
    assert (requests["first_s"][late] >= 20.0).all()
    _totals_are_exact(simulated)
    forever = run(toy_profile, faults)
    assert 0 < forever.finished < 400


def test_a_hung_engine_finishes_late_and_loses_nothing(toy_profile: str) -> None:
    calm = run(toy_profile, [])
    hung = run(toy_profile, [{"at_s": 2.0, "engine": 0, "kind": "hang"}, {"at_s": 5.0, "engine": 0, "kind": "resume"}])
    assert (hung.memory.requests["status"] == FINISHED).all()
    assert hung.memory.requests["retries"].sum() == 0
    finish = hung.memory.requests["finish_s"][hung.memory.requests["engine"] == 0]
    assert not ((finish > 2.0) & (finish < 5.0)).any()
    assert np.nansum(hung.memory.requests["first_s"]) > np.nansum(calm.memory.requests["first_s"])
    _totals_are_exact(hung)


def test_a_slow_engine_takes_as_many_times_longer(toy_profile: str) -> None:
    table = RequestTable.build([0.0], [100], [10])
    times = []
    for factor in (1.0, 3.0):
        config = ClusterConfig.model_validate(
            {
                "profile": toy_profile,
                "engines": 1,
                "faults": [{"at_s": 0.0, "engine": 0, "kind": "slow", "factor": factor}],
            }
        )
        simulated = SimulatedCluster(config, table, create("request", "fcfs"), create("engine", "random"))
        simulated.run()
        times.append(float(simulated.memory.requests["finish_s"][0]))
    assert times[1] == pytest.approx(3 * times[0])


def test_an_engine_that_leaves_drains(toy_profile: str) -> None:
    simulated = run(toy_profile, [{"at_s": 2.0, "engine": 1, "kind": "leave"}])
    requests = simulated.memory.requests
    assert (requests["engine"][requests["arrival_s"] > 2.0] == 0).all()
    assert (requests["finish_s"][requests["engine"] == 1] > 2.0).any()


@pytest.mark.parametrize(("period", "lag"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.25)])
def test_telemetry_is_as_old_as_configured(toy_profile: str, period: float, lag: float) -> None:
    config = ClusterConfig.model_validate(
        {"profile": toy_profile, "engines": 2, "telemetry": {"period_s": period, "lag_s": lag}}
    )
    simulated = SimulatedCluster(config, random_table(2, rate_rps=90.0), create("request", "fcfs"))
    ages, waiting, alive, turn = [], [], simulated.next_decision(), 0
    while alive:
        view = simulated.engine_views().data
        ages.append(float(view[0, E_TELEMETRY_AGE_S]))
        waiting.append(float(view[:, E_WAITING].sum()))
        turn += 1
        alive = simulated.dispatch(turn % 2)
    settled = np.array(ages[50:])
    assert (settled >= lag - 1e-9).all()
    assert (settled <= lag + period + 1e-9).all()
    assert max(waiting) > 0


def test_a_mute_engine_shows_its_last_report(toy_profile: str) -> None:
    config = ClusterConfig.model_validate(
        {"profile": toy_profile, "engines": 2, "faults": [{"at_s": 1.0, "engine": 0, "kind": "mute"}]}
    )
    simulated = SimulatedCluster(config, random_table(3), create("request", "fcfs"))
    alive, turn, oldest = simulated.next_decision(), 0, 0.0
    while alive:
        view = simulated.engine_views().data
        oldest = max(oldest, float(view[0, E_TELEMETRY_AGE_S]))
        assert view[1, E_TELEMETRY_AGE_S] <= 0.1 + 1e-9
        turn += 1
        alive = simulated.dispatch(turn % 2)
    assert oldest > 5.0


@pytest.mark.parametrize("dispatch", ["vllm", "gimbal2"])
def test_a_pause_changes_nothing(toy_profile: str, dispatch: str) -> None:
    """Also where no request arrives for several periods of the telemetry."""
    config = ClusterConfig.model_validate({"profile": toy_profile, "engines": 3})
    table = random_table(4, count=200, rate_rps=4.0, user=np.arange(200) % 5)
    chosen = []
    for pauses in ([], 0.7 * np.arange(1, 60)):
        simulated = SimulatedCluster(config, table, create("request", "fcfs"), create("engine", dispatch))
        for pause in pauses:
            simulated.run_until(float(pause))
        simulated.run()
        chosen.append(simulated.memory.requests["engine"].copy())
    np.testing.assert_array_equal(*chosen)
