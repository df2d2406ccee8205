"""Asynchronous scheduling: when a step may hold a request, who waits how long, and that nothing is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import random_table, session_table

from servegym.baselines.interface import FloatArray, QueueView
from servegym.baselines.registry import create
from servegym.configuration import validate
from servegym.envs.profiles.closed_loop import closed_loop
from servegym.envs.profiles.profile import StepCost, load_profile
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.kernel.state import FINISHED
from servegym.envs.simulator.schedule_trace import ScheduleSpec, schedule_trace
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError

AHEAD = {"async_scheduling": True}
TIGHT = AHEAD | {"num_blocks": 160}
STARVING = TIGHT | {"max_num_batched_tokens": 12, "max_num_seqs": 16, "scheduling_policy": "priority"}


def run(table: RequestTable, profile: str, order: Any = "fcfs", **config: Any) -> SimulatedCluster:
    cluster = ClusterConfig.model_validate({"profile": profile, "engines": 1, "engine": AHEAD} | config)
    policy = create("request", order) if isinstance(order, str) else order
    simulated = SimulatedCluster(cluster, table, policy, create("engine", "round_robin"))
    simulated.run()
    return simulated


def _cost(profile: str, tokens: int = 512) -> StepCost:
    return load_profile(profile).compile(tokens)


def _first(simulated: SimulatedCluster) -> list[float]:
    times: list[float] = simulated.memory.requests["first_s"].tolist()
    return times


def test_what_arrives_during_a_step_is_in_the_one_after_the_next(toy_profile: str) -> None:
    cost = _cost(toy_profile)
    prefill, decode = cost.step_s([(0, 400)], []), cost.step_s([], [401])
    table = RequestTable.build([0.0, prefill / 2], [400, 10], [20, 2])
    late = cost.step_s([(0, 10)], [402])
    assert _first(run(table, toy_profile)) == pytest.approx([prefill, prefill + decode + late], rel=1e-12)
    synchronous = run(table, toy_profile, engine={})
    assert _first(synchronous) == pytest.approx([prefill, prefill + cost.step_s([(0, 10)], [401])], rel=1e-12)


def test_what_arrives_at_an_idle_engine_is_scheduled_at_once(toy_profile: str) -> None:
    cost = _cost(toy_profile)
    table = RequestTable.build([1.0, 5.0], [100, 100], [4, 4])
    simulated = run(table, toy_profile, engine=AHEAD | {"enable_prefix_caching": False})
    assert _first(simulated) == pytest.approx([1.0 + cost.step_s([(0, 100)], []), 5.0 + cost.step_s([(0, 100)], [])])
    assert simulated.memory.engines["steps"][0] == 8


def test_a_step_without_tokens_takes_no_time(toy_profile: str) -> None:
    """Nothing could be scheduled beside the only step of the first request: the second one follows at once."""
    cost = _cost(toy_profile)
    prefill = cost.step_s([(0, 400)], [])
    table = RequestTable.build([0.0, prefill / 2], [400, 10], [1, 1])
    assert _first(run(table, toy_profile)) == pytest.approx([prefill, prefill + cost.step_s([(0, 10)], [])], rel=1e-12)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_closed_loop_is_that_of_the_check_against_published_runs(toy_profile: str, ahead: bool) -> None:
    clients, turns, frontend_s = 4, 6, 0.005
    prompts, outputs = np.full(clients * turns, 300), np.full(clients * turns, 20)
    times = closed_loop(_cost(toy_profile), prompts, outputs, clients, 512, ahead=ahead, frontend_s=frontend_s)
    later = np.arange(len(prompts)) % turns > 0
    table = RequestTable.build(
        np.full(len(prompts), frontend_s),
        prompts,
        outputs,
        parent=np.where(later, np.arange(len(prompts)) - 1, -1),
        think_s=np.where(later, frontend_s, 0.0),
    )
    engine = {"async_scheduling": ahead, "enable_prefix_caching": False}
    requests = run(table, toy_profile, engine=engine).memory.requests
    ttft = requests["first_s"] - requests["arrival_s"] + frontend_s
    tpot = (requests["finish_s"] - requests["first_s"]) / (outputs - 1)
    # Clients are alike, so that it does not matter which of them sends which request.
    np.testing.assert_allclose(np.sort(ttft), np.sort(times.ttft_s), rtol=1e-9)
    np.testing.assert_allclose(np.sort(tpot), np.sort(times.tpot_s), rtol=1e-9)


def test_slots_and_blocks_are_free_one_schedule_later() -> None:
    spec = {"max_num_seqs": 1, "max_num_batched_tokens": 512, "num_blocks": 40, "block_size": 16, "max_model_len": 2048}
    requests = [{"id": name, "prompt": [1] * 32, "output_len": 2} for name in ("a", "b")]
    traces = {}
    for ahead in (False, True):
        content = spec | {"requests": requests, "async_scheduling": ahead}
        steps = list(schedule_trace(validate(ScheduleSpec, content, "spec")))
        traces[ahead] = [(step["scheduled"], step["free_blocks"]) for step in steps]
    assert traces[False] == [({"a": 32}, 37), ({"a": 1}, 36), ({"b": 32}, 37), ({"b": 1}, 36)]
    assert traces[True] == [
        ({"a": 32}, 37),
        ({"a": 1}, 36),
        ({}, 36),
        ({"b": 32}, 37),
        ({"b": 1}, 36),
        ({}, 36),
    ]


@pytest.mark.parametrize("mode", ["independent", "lockstep"])
@pytest.mark.parametrize("engine", [AHEAD, AHEAD | {"enable_prefix_caching": False}, TIGHT, STARVING])
@pytest.mark.parametrize("order", ["fcfs", "priority", "sjf_age", "spf_aging", "vtc"])
def test_every_request_is_served_once_and_rewards_are_exact(
    toy_profile: str, order: str, engine: dict[str, Any], mode: str
) -> None:
    for table in (random_table(1, priority=np.arange(400) % 3, user=np.arange(400) % 5), session_table(2)):
        simulated = run(table, toy_profile, order, engine=engine, engines=3, mode=mode)
        requests, engines = simulated.memory.requests, simulated.memory.engines
        assert (requests["status"] == FINISHED).all()
        assert (engines["free_blocks"] == engines["num_blocks"] - 1).all()
        for name in ("inflight", "prefill_tokens", "leaving", "decoding", "waiting_tokens"):
            assert (engines[name] == 0).all(), name
        assert (requests["finish_s"] >= requests["first_s"]).all()
        ttft, e2e = requests["first_s"] - requests["arrival_s"], requests["finish_s"] - requests["arrival_s"]
        np.testing.assert_allclose(simulated.totals[:2], [ttft.sum(), e2e.sum()], rtol=1e-9)


@pytest.mark.parametrize("mode", ["independent", "lockstep"])
@pytest.mark.parametrize("engine", [AHEAD, TIGHT, STARVING])
@pytest.mark.parametrize("order", ["fcfs", "priority", "spf_aging"])
def test_a_dead_engine_loses_the_tokens_of_its_running_step(
    toy_profile: str, order: str, engine: dict[str, Any], mode: str
) -> None:
    faults = [
        {"at_s": at, "engine": e, "kind": kind}
        for at, e, kind in ((2.0, 0, "die"), (2.5, 0, "recover"), (4.0, 1, "die"), (4.4, 1, "recover"))
    ] + [{"at_s": 6.0, "engine": 0, "kind": "hang"}, {"at_s": 7.0, "engine": 0, "kind": "resume"}]
    table = random_table(1, rate_rps=60.0, priority=np.arange(400) % 3)
    simulated = run(table, toy_profile, order, engine=engine, engines=2, mode=mode, faults=faults)
    requests = simulated.memory.requests
    assert (requests["status"] == FINISHED).all()
    assert requests["retries"].sum() > 0
    ttft, e2e = requests["first_s"] - requests["arrival_s"], requests["finish_s"] - requests["arrival_s"]
    np.testing.assert_allclose(simulated.totals[:2], [ttft.sum(), e2e.sum()], rtol=1e-9)


class Python:
    """A policy without a compiled form: the kernel stops at each order."""

    def __init__(self) -> None:
        self.inner = create("request", "spf_aging")

    def score(self, queue: QueueView) -> FloatArray:
        return self.inner.score(queue)


@pytest.mark.parametrize("mode", ["independent", "lockstep"])
def test_policies_in_python_and_compiled_give_the_same_run(toy_profile: str, mode: str) -> None:
    table = random_table(6, rate_rps=80.0)
    runs = [run(table, toy_profile, order, engines=3, mode=mode, engine=TIGHT) for order in ("spf_aging", Python())]
    for name in ("engine", "first_s", "finish_s"):
        np.testing.assert_array_equal(*(simulated.memory.requests[name] for simulated in runs))


def test_a_rank_that_had_nothing_to_schedule_runs_a_dummy_batch(toy_profile: str) -> None:
    """In lockstep a step without tokens takes its time: what arrives meanwhile is in the one after the next."""
    cost = _cost(toy_profile, 1024)
    moe = cost.moe_table_s
    prefill = cost.step_s([(0, 400)], []) - moe[400] + moe[800]
    table = RequestTable.build([0.0, 0.0, prefill / 2, prefill / 2], [400, 400, 10, 10], [20, 1, 2, 2])
    simulated = run(table, toy_profile, engines=2, mode="lockstep")
    # The third request goes to the rank that decodes, the fourth to the other one, whose only request has ended.
    decode = cost.step_s([], [401]) - moe[1] + moe[2]
    both = cost.step_s([(0, 10)], [402]) - moe[11] + moe[21]
    assert _first(simulated) == pytest.approx([prefill, prefill, *[prefill + decode + both] * 2], rel=1e-12)


def test_ranks_that_schedule_differently_are_refused(toy_profile: str) -> None:
    groups = [{"profile": toy_profile, "engine": {"async_scheduling": ahead}} for ahead in (False, True)]
    config = ClusterConfig.model_validate({"groups": groups, "mode": "lockstep"})
    with pytest.raises(InputError, match=r"^cluster: engine.async_scheduling: got true and false; allowed .* all eng"):
        SimulatedCluster(config, random_table(1), create("request", "fcfs"))
