"""Virtual counters of users and the fairness that VTC promises by them (arXiv 2401.00588)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from support import random_table

from servegym.baselines.registry import create
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads.table import RequestTable


def run(table: RequestTable, profile: str, order: str, **config: object) -> SimulatedCluster:
    cluster = ClusterConfig.model_validate({"profile": profile, "engines": 1} | config)
    simulated = SimulatedCluster(cluster, table, create("request", order), create("engine", "round_robin"))
    simulated.run()
    return simulated


def counters(simulated: SimulatedCluster, engine: int = 0) -> npt.NDArray[np.float64]:
    return simulated.memory.array(engine, "served")


@pytest.mark.parametrize("blocks", [2000, 160])
def test_all_that_one_user_was_served_is_charged_once(toy_profile: str, blocks: int) -> None:
    table = random_table(1, 200, user=np.zeros(200, dtype=int))
    simulated = run(table, toy_profile, "vtc,prompt_weight=3,output_weight=5", engine={"num_blocks": blocks})
    assert (simulated.memory.engines["preemptions"].sum() > 0) == (blocks == 160)
    expected = 3 * table.prompt_tokens.sum() + 5 * table.output_tokens.sum()
    assert counters(simulated)[0] == pytest.approx(float(expected))


def backlog(seed: int) -> RequestTable:
    """Two users who have everything waiting from the start, one with four times as many requests."""
    rng = np.random.default_rng(seed)
    count = 1500
    user = (np.arange(count) % 5 == 4).astype(int)
    return RequestTable.build(
        np.sort(rng.uniform(0, 0.001, count)), rng.integers(20, 400, count), rng.integers(5, 120, count), user=user
    )


def largest_gap(simulated: SimulatedCluster, table: RequestTable) -> float:
    """Largest difference of the service received while both users wait: prompt at first token, output evenly after."""
    requests = simulated.memory.requests
    last = min(requests["first_s"][table.user == user].max() for user in (0, 1))
    largest = 0.0
    for time in np.linspace(0, last, 200):
        served = []
        for user in (0, 1):
            mine = requests[table.user == user]
            span = np.maximum(mine["finish_s"] - mine["first_s"], 1e-9)
            share = np.clip((time - mine["first_s"]) / span, 0, 1)
            served.append(((mine["first_s"] <= time) * mine["prompt"] + 2 * share * mine["output"]).sum())
        largest = max(largest, abs(served[0] - served[1]))
    return largest


def test_backlogged_users_are_served_alike(toy_profile: str) -> None:
    table = backlog(2)
    gaps = {order: largest_gap(run(table, toy_profile, order), table) for order in ("vtc", "fcfs")}
    # Theorem 4.4: 2 max(prompt weight * longest prompt, output weight * tokens that run at once); 32 run at once.
    bound = 2 * max(400, 2 * 32 * 120)
    assert gaps["vtc"] < 0.5 * bound
    assert gaps["fcfs"] > 2 * bound


def test_idle_time_is_no_credit(toy_profile: str) -> None:
    """A user who comes late shares from then on; the early one is not shut out until the other has caught up."""
    rng = np.random.default_rng(4)
    arrival = np.concatenate([np.sort(rng.uniform(0, 0.001, 900)), 6.0 + np.sort(rng.uniform(0, 0.001, 300))])
    user = np.repeat([0, 1], [900, 300])
    table = RequestTable.build(arrival, rng.integers(20, 400, 1200), rng.integers(5, 120, 1200), user=user)
    requests = run(table, toy_profile, "vtc").memory.requests
    window = (requests["first_s"] > 6.0) & (requests["first_s"] < 12.0)
    shares = np.bincount(table.user[window], weights=requests["prompt"][window], minlength=2)
    assert shares.sum() > 5000
    assert 0.35 < shares[0] / shares.sum() < 0.65
