"""The cluster: conservation, exact integrals, costs, closed loops, lockstep, determinism."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support import random_table, session_table

from servegym.baselines.interface import E_INFLIGHT, EngineViews, FloatArray, QueueView, RequestView
from servegym.baselines.registry import create
from servegym.envs.profiles.profile import load_profile
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.kernel import single
from servegym.envs.simulator.kernel.state import DECODE, FINISHED, STEP_STEADY
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError


def run(
    table: RequestTable, profile: str, order: str = "fcfs", dispatch: str = "round_robin", seed: int = 0, **config: Any
) -> SimulatedCluster:
    cluster = ClusterConfig.model_validate({"profile": profile, "engines": 3} | config)
    simulated = SimulatedCluster(cluster, table, create("request", order), create("engine", dispatch), seed=seed)
    simulated.run()
    return simulated


VARIANTS = [
    {},
    {"mode": "lockstep"},
    {"engine": {"enable_prefix_caching": False}},
    {"engine": {"num_blocks": 160}},
    {"engine": {"num_blocks": 160, "scheduling_policy": "priority"}},
    {"telemetry": {"period_s": 0.0}},
    {"engine": {"max_num_batched_tokens": 40, "long_prefill_token_threshold": 16}},
]


@pytest.mark.parametrize("config", VARIANTS)
@pytest.mark.parametrize("request_policy", ["fcfs", "priority", "sjf_age", "spf_aging"])
def test_every_request_is_served_once_and_memory_is_given_back(
    toy_profile: str, request_policy: str, config: dict[str, Any]
) -> None:
    table = random_table(1, priority=np.arange(400) % 3)
    simulated = run(table, toy_profile, order=request_policy, **config)
    requests, engines = simulated.memory.requests, simulated.memory.engines
    assert (requests["status"] == FINISHED).all()
    assert engines["finished"].sum() == len(table)
    assert (engines["free_blocks"] == engines["num_blocks"] - 1).all()
    assert (engines["inflight"] == 0).all()
    assert (engines["prefill_tokens"] == 0).all()
    assert (requests["first_s"] > requests["arrival_s"]).all()
    assert (requests["finish_s"] >= requests["first_s"]).all()
    assert (engines["peak_blocks"] <= engines["num_blocks"] - 1).all()


@pytest.mark.parametrize("config", VARIANTS)
def test_integrals_equal_the_sums_over_requests(toy_profile: str, config: dict[str, Any]) -> None:
    simulated = run(random_table(2), toy_profile, dispatch="lmetric", **config)
    requests = simulated.memory.requests
    several = requests["output"] > 1
    sums = [
        (requests["first_s"] - requests["arrival_s"]).sum(),
        (requests["finish_s"] - requests["arrival_s"]).sum(),
        ((requests["finish_s"] - requests["first_s"])[several] / (requests["output"][several] - 1)).sum(),
    ]
    np.testing.assert_allclose(simulated.totals, sums, rtol=1e-12)


def test_step_durations_follow_the_profile(toy_profile: str) -> None:
    """Each step of one engine costs what ``StepCost.step_s`` says for the batch that was scheduled."""
    cost = load_profile(toy_profile).compile()
    config = ClusterConfig(engines=1, profile=toy_profile, engine={"num_blocks": 120})
    simulated = SimulatedCluster(config, random_table(3, count=60), create("request", "fcfs"))
    memory = simulated.memory
    requests, engine = memory.requests, memory.engines[0]
    running, scheduled, _ = memory.lists(0)
    for r in range(60):
        single.enqueue(memory.cluster, r, 0.0)
    now, preemptions = 0.0, 0
    while memory.cluster["finished"][0] < 60:
        duration = single.begin(memory.cluster, now)
        count = int(engine["running"])
        members = running[:count]
        tokens = scheduled[:count].copy()
        if engine["activity"] == STEP_STEADY:
            tokens[: int(engine["decoding"])] = 1
        prefill, contexts = [], []
        for r, chunk in zip(members, tokens, strict=True):
            if requests["status"][r] == DECODE and chunk:
                contexts.append(int(requests["prompt"][r] + engine["tick"] - requests["tick0"][r]))
            elif chunk:
                prefill.append((int(requests["computed"][r]), int(chunk)))
        assert duration == pytest.approx(cost.step_s(prefill, contexts), rel=1e-12)
        preemptions += int(engine["preempted_count"])
        now += duration
        single.finish(memory.cluster, now)
    assert preemptions > 0


@pytest.mark.parametrize(("share", "tokens"), [(0.5, 32), (0.001, 16), (1.0, 64)])
def test_a_share_of_the_token_budget_is_a_smaller_budget(toy_profile: str, share: float, tokens: int) -> None:
    """The same run as on engines with that budget; and it is never so small that a running request misses a step."""
    engine = {"max_num_batched_tokens": 64, "max_num_seqs": 16}
    mine = run(random_table(6), toy_profile, order=f"chunked,inner=sjf_age,share={share}", engine=engine)
    other = run(random_table(6), toy_profile, order="sjf_age", engine=engine | {"max_num_batched_tokens": tokens})
    assert (mine.memory.engines["max_num_batched_tokens"] == tokens).all()
    np.testing.assert_array_equal(mine.memory.requests["finish_s"], other.memory.requests["finish_s"])


def test_lockstep_steps_last_as_long_as_the_slowest_rank(toy_profile: str) -> None:
    table = RequestTable.build([0.0, 0.0], [400, 10], [5, 5])
    simulated = run(table, toy_profile, engines=2, mode="lockstep")
    first = simulated.memory.requests["first_s"]
    cost = load_profile(toy_profile).compile(1024)
    long_rank = cost.step_s([(0, 400)], []) - cost.moe_table_s[400]
    assert first == pytest.approx([long_rank + cost.moe_table_s[410]] * 2)


def test_closed_loops_are_independent_of_the_lookahead(toy_profile: str) -> None:
    """Engines run ahead of each other only as far as no follow-up can come back from the past."""
    outcomes = []
    for shortest in (None, 0.0):
        config = ClusterConfig(engines=3, profile=toy_profile)
        simulated = SimulatedCluster(
            config, session_table(4), create("request", "fcfs"), create("engine", "least_requests")
        )
        if shortest is not None:
            simulated.memory.cluster["shortest_think_s"] = shortest
        simulated.run()
        outcomes.append(simulated.memory.requests)
    assert _bytes(outcomes[0]) == _bytes(outcomes[1])
    requests, table = outcomes[0], session_table(4)
    later = table.parent >= 0
    gap = requests["arrival_s"][later] - requests["finish_s"][table.parent[later]]
    np.testing.assert_allclose(gap, table.think_s[later], atol=1e-9)


def test_sessions_hit_the_prefix_cache_where_they_stay(toy_profile: str) -> None:
    sticky = run(session_table(5), toy_profile, dispatch="session_sticky").memory
    scattered = run(session_table(5), toy_profile, dispatch="random").memory
    follow_up = sticky.requests["turn"] > 0
    assert sticky.requests["hit_tokens"][follow_up].sum() > 1.5 * scattered.requests["hit_tokens"][follow_up].sum()
    assert (sticky.requests["hit_tokens"][~follow_up] == 0).all()


def test_block_hashes_of_a_trace_are_shared_at_their_own_granularity(toy_profile: str) -> None:
    """Ids of 64 tokens over blocks of 16: what follows the last common id is never found."""
    table = RequestTable.build(
        [0.0, 5.0, 10.0],
        [200, 200, 200],
        [5, 5, 5],
        prefix_start=[0, 3, 6, 9],
        prefix_ids=[1, 2, 3, 1, 2, 9, 8, 2, 3],
        prefix_block_tokens=64,
    )
    hits = run(table, toy_profile, engines=1).memory.requests["hit_tokens"]
    assert hits.tolist() == [0, 128, 0]


def test_templates_are_found_on_engines_that_have_seen_them(toy_profile: str) -> None:
    table = RequestTable.build(
        [0.0, 5.0, 10.0], [300, 300, 300], [5, 5, 5], template=[4, 4, 7], template_tokens=[250, 250, 250]
    )
    hits = run(table, toy_profile, engines=1).memory.requests["hit_tokens"]
    assert hits.tolist() == [0, 240, 0]


def test_caching_off_never_hits(toy_profile: str) -> None:
    off = ClusterConfig(engines=2, profile=toy_profile, engine={"enable_prefix_caching": False})
    simulated = SimulatedCluster(off, session_table(5), create("request", "fcfs"), create("engine", "session_sticky"))
    simulated.run()
    assert (simulated.memory.requests["hit_tokens"] == 0).all()


class PythonLeastRequests:
    """The compiled policy of that name, without its compiled form."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.inner = create("engine", "least_requests")

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        return self.inner.score(request, engines)

    def on_first_token(self, request_index: int, engine: int, now_s: float) -> None:
        self.events.append(("first", request_index))

    def on_finish(self, request_index: int, engine: int, now_s: float, output_tokens: int) -> None:
        self.events.append(("finish", request_index))


class PythonShortest:
    """SPF with aging, without its compiled form."""

    def __init__(self) -> None:
        self.inner = create("request", "spf_aging")

    def score(self, queue: QueueView) -> FloatArray:
        assert np.isnan(queue.output_tokens).all()
        return self.inner.score(queue)


def test_policies_in_python_and_compiled_give_the_same_run(toy_profile: str) -> None:
    table = random_table(6, rate_rps=80.0)
    compiled = run(table, toy_profile, order="spf_aging", dispatch="least_requests")
    engine_policy = PythonLeastRequests()
    config = ClusterConfig(engines=3, profile=toy_profile)
    simulated = SimulatedCluster(config, table, PythonShortest(), engine_policy)
    simulated.run()
    for name in ("engine", "first_s", "finish_s"):
        np.testing.assert_array_equal(simulated.memory.requests[name], compiled.memory.requests[name])
    # All events but those after the last decision are delivered, each once, first tokens before ends.
    assert len(set(engine_policy.events)) == len(engine_policy.events)
    assert len(engine_policy.events) > 1.5 * len(table)


def test_an_oracle_sees_output_lengths_and_nobody_else(toy_profile: str) -> None:
    table = random_table(7, rate_rps=500.0)
    mean = {
        name: run(table, toy_profile, order=name).memory.requests["finish_s"].mean() for name in ("fcfs", "sjf_oracle")
    }
    assert mean["sjf_oracle"] < mean["fcfs"]


def test_the_router_counts_exactly_what_is_in_flight(toy_profile: str) -> None:
    config = ClusterConfig(engines=2, profile=toy_profile)
    simulated = SimulatedCluster(config, random_table(8), create("request", "fcfs"))
    sent: list[int] = []
    alive = simulated.next_decision()
    while alive:
        view, requests = simulated.engine_views(), simulated.memory.requests
        now = simulated.now_s
        for engine in range(2):
            mine = [r for r in sent if requests["engine"][r] == engine]
            open_ = [r for r in mine if not requests["finish_s"][r] <= now]
            assert view.data[engine, E_INFLIGHT] == len(open_)
            waiting = [r for r in open_ if not requests["first_s"][r] <= now]
            assert view.prefill_tokens[engine] == requests["prompt"][waiting].sum()
        request = simulated.request_view()
        sent.append(request.index)
        alive = simulated.dispatch(request.index % 2)


def _bytes(records: npt.NDArray[Any]) -> bytes:
    """All fields, without the padding between them."""
    assert records.dtype.names is not None
    return b"".join(records[name].tobytes() for name in records.dtype.names)


def _digest(arguments: tuple[str, int]) -> bytes:
    profile, seed = arguments
    return _bytes(run(random_table(9), profile, dispatch="power_of_two", seed=seed).memory.requests)


def test_same_seed_same_bytes_in_one_process_and_in_another(toy_profile: str) -> None:
    here = _digest((toy_profile, 1))
    assert here == _digest((toy_profile, 1))
    assert here != _digest((toy_profile, 2))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(_digest, [(toy_profile, 1)]) == [here]


def test_a_request_that_can_never_fit_is_refused(toy_profile: str) -> None:
    table = RequestTable.build([0.0, 1.0], [10, 4000], [10, 200])
    with pytest.raises(InputError, match=r"requests\[1\]: got 4000 prompt \+ 200 output tokens, which can never fit"):
        run(table, toy_profile)
