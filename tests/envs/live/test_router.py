"""The live router sees what the simulated one sees, if the same happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import random_table, session_table

from servegym.baselines import interface as i
from servegym.baselines.prefix_index import PrefixIndexConfig
from servegym.baselines.registry import create
from servegym.engine_bridge.router.choice import PolicyRouter
from servegym.engine_bridge.router.table import EngineLimits, EngineSample, EngineTable
from servegym.engine_bridge.router.telemetry import parse_metrics
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads.table import RequestTable

EXACT = (
    "inflight",
    "inflight_prompt_tokens",
    "prefill_requests",
    "prefill_tokens",
    "uncached_tokens",
    "fresh_tokens",
    "first_token_s",
    "hit_tokens",
    "index_tokens",
    "user_home",
    "session_home",
    "ttft_ewma_s",
    "itl_ewma_s",
    "dispatched",
)


class Shadow:
    """A policy that keeps a live table beside the simulator and compares the two at each decision."""

    def __init__(self, table: RequestTable, engines: int) -> None:
        self.live = EngineTable([EngineLimits()] * engines, PrefixIndexConfig(block_tokens=16))
        self._table = table
        self._rng = np.random.default_rng(3)
        self.compared = 0
        self.hits = 0.0

    def _blocks(self, r: int) -> list[tuple[int, int]]:
        table = self._table
        if (table.stream == table.stream[r]).sum() < 2:
            return []
        return [(int(table.stream[r]), block) for block in range(int(table.prompt_tokens[r]) // 16)]

    def score(self, request: i.RequestView, engines: i.EngineViews) -> i.FloatArray:
        found = self.live.view(request, self._blocks(request.index))
        for name in EXACT:
            np.testing.assert_allclose(getattr(found, name), getattr(engines, name), rtol=1e-9, err_msg=name)
        assert self.live.last_engine == request.last_engine
        self.compared += 1
        self.hits += found.hit_tokens.sum()
        return self._rng.random(len(engines))

    def on_dispatch(self, request: i.RequestView, engine: int) -> None:
        self.live.dispatched(request, engine, self._blocks(request.index))

    def on_first_token(self, index: int, engine: int, now_s: float) -> None:
        self.live.first_token(index, now_s)

    def on_finish(self, index: int, engine: int, now_s: float, output_tokens: int) -> None:
        self.live.finished(index, now_s, output_tokens)


@pytest.mark.parametrize(
    "table",
    [random_table(4, 300, rate_rps=80.0, user=np.arange(300) % 9), session_table(5)],
    ids=["single", "sessions"],
)
def test_the_columns_are_the_simulators(toy_profile: str, table: RequestTable) -> None:
    config = ClusterConfig.model_validate(
        {"engines": 3, "profile": toy_profile, "router": {"prefix_index": {"block_tokens": 16}}}
    )
    shadow = Shadow(table, 3)
    SimulatedCluster(config, table, create("request", "fcfs"), shadow).run()
    assert shadow.compared == len(table)
    assert (shadow.hits > 0) == (table.parent >= 0).any()


def request(index: int, now_s: float = 1.0, **fields: Any) -> i.RequestView:
    return i.RequestView(**{"index": index, "now_s": now_s, "arrival_s": now_s, "prompt_tokens": 100} | fields)


def test_telemetry_has_its_age_and_what_was_sent_since() -> None:
    table = EngineTable([EngineLimits(), EngineLimits()])
    table.dispatched(request(0), 1)
    table.sampled(1, EngineSample(waiting=3, running=2, kv_usage=0.5), taken_s=2.0)
    table.dispatched(request(1), 1)
    view = table.view(request(2, now_s=2.4))
    assert view.waiting.tolist() == [0, 3]
    assert view.kv_usage.tolist() == [0, 0.5]
    np.testing.assert_allclose(view.telemetry_age_s, [2.4, 0.4])
    assert view.dispatched_since.tolist() == [0, 1]
    table.sampled(1, EngineSample(None, 4, None), taken_s=3.0)
    assert table.view(request(3, now_s=3.0)).waiting.tolist() == [0, 3]


def test_lost_requests_take_nothing_and_late_news_changes_nothing() -> None:
    table = EngineTable([EngineLimits()])
    for index in range(3):
        table.dispatched(request(index), 0)
    table.first_token(1, 1.5)
    for index in (0, 1, 1, 7):
        table.lost(index)
    table.first_token(0, 2.0)
    table.finished(1, 2.0, 5)
    view = table.view(request(9))
    assert (view.inflight[0], view.prefill_requests[0], view.prefill_tokens[0]) == (1, 1, 100)
    assert view.ttft_ewma_s[0] == 0.5


def test_homes_are_bounded() -> None:
    table = EngineTable([EngineLimits(), EngineLimits()], homes=2)
    for user in (1, 2, 3):
        table.dispatched(request(user, user=user), 1)
    assert [table.view(request(9, user=user)).user_home.sum() for user in (1, 2, 3)] == [0, 1, 1]


class Faulty:
    def __init__(self, fault: str) -> None:
        self._fault = fault

    def score(self, request: i.RequestView, engines: i.EngineViews) -> i.FloatArray:
        if self._fault == "KeyError":
            raise KeyError("gone")
        if self._fault == "shape":
            return np.zeros(1)
        return np.full(len(engines), np.nan)

    def on_dispatch(self, request: i.RequestView, engine: int) -> None:
        raise RuntimeError("hook")


@pytest.mark.parametrize("fault", ["KeyError", "shape", "not finite"])
def test_a_failing_policy_is_replaced_and_counted(fault: str) -> None:
    router = PolicyRouter(Faulty(fault), EngineTable([EngineLimits()] * 3))  # type: ignore[arg-type]
    assert [router.dispatch(request(index)) for index in range(3)] == [0, 1, 2]
    assert router.fallbacks == {fault: 3, "on_dispatch: RuntimeError": 3}
    assert router.decisions == 3


def test_a_late_decision_does_not_count() -> None:
    router = PolicyRouter(create("engine", "lmetric"), EngineTable([EngineLimits()] * 2), budget_s=0.0)
    router.dispatch(request(0))
    assert router.fallbacks == {"late": 1}


def test_engines_that_are_gone_are_not_chosen() -> None:
    router = PolicyRouter(create("engine", "round_robin"), EngineTable([EngineLimits()] * 3))
    router.table.set_available(1, False)
    chosen = [router.dispatch(request(index, last_engine=router.table.last_engine)) for index in range(4)]
    assert chosen == [0, 2, 0, 2]
    for engine in (0, 2):
        router.table.set_available(engine, False)
    assert router.dispatch(request(9)) == -1
    assert router.fallbacks == {}


def test_a_burst_between_two_readings_spreads() -> None:
    router = PolicyRouter(create("engine", "vllm"), EngineTable([EngineLimits()] * 4))
    chosen = [router.dispatch(request(index)) for index in range(32)]
    assert np.bincount(chosen).tolist() == [8, 8, 8, 8]


def test_metrics_pages_of_several_versions() -> None:
    page = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:gpu_cache_usage_perc{engine="0"} 0.25
vllm:gpu_cache_usage_perc{engine="1"} 0.75
process_cpu_seconds_total 12.5
"""
    assert parse_metrics(page) == EngineSample(waiting=1.0, running=7.0, kv_usage=0.5)
    assert parse_metrics("nothing") == EngineSample(None, None, None)
