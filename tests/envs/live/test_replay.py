"""Replaying against engines that answer as vLLM does, and at known times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import random_table, session_table

from servegym.baselines.interface import RequestView
from servegym.baselines.registry import create
from servegym.configuration import validate
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.engine import stop_groups
from servegym.engine_bridge.cluster.launcher import running_cluster
from servegym.engine_bridge.router.choice import PolicyRouter
from servegym.engine_bridge.router.table import EngineLimits, EngineTable
from servegym.envs.live.dispatch import ByPolicy
from servegym.envs.live.replay import ReplayConfig, replay
from servegym.envs.live.tokens import prompt_tokens
from servegym.envs.workloads.table import RequestTable
from servegym.errors import EngineError, InputError

Make = Callable[..., ClusterFile]
CONFIG = ReplayConfig.model_validate({"workload": {"name": "fixed", "rate_rps": 50, "requests": 60}})


def urls(cluster: object) -> tuple[str, ...]:
    return tuple(engine.url for engine in cluster.engines)  # type: ignore[attr-defined]


def test_requests_go_out_in_time_and_come_back_timed(fake_cluster: Make, tmp_path: Path) -> None:
    table = random_table(1, 60, rate_rps=60.0)
    with running_cluster(fake_cluster({"ttft_s": 0.05, "itl_s": 0.002}), tmp_path) as cluster:
        shares: list[float] = []
        result = replay(table, urls(cluster), cluster.model, CONFIG, progress=shares.append)
    outcome, metrics = result.outcome, result.metrics(CONFIG.slo, CONFIG.warmup_share)
    assert result.errors == {}
    np.testing.assert_allclose(outcome.arrival_s, table.arrival_s)
    np.testing.assert_array_equal(outcome.output_tokens, table.output_tokens)
    assert (outcome.ttft_s > 0.05).all()
    assert 0.05 < np.median(outcome.ttft_s) < 0.15
    assert 0.002 < np.nanmedian(outcome.tpot_s) < 0.01
    assert (outcome.hit_tokens == 3).all()
    assert np.bincount(outcome.engine).tolist() == [30, 30]
    assert metrics["failed"] == 0
    assert 0 <= metrics["slip_s"]["p50"] < 0.02
    assert shares[-1] == 1.0


def test_a_session_waits_for_its_own_answers(fake_cluster: Make, tmp_path: Path) -> None:
    table = session_table(3, sessions=12, turns=3, think_s=0.05)
    table = replace(table, arrival_s=table.arrival_s * 0.2)
    with running_cluster(fake_cluster({"ttft_s": 0.03}), tmp_path) as cluster:
        outcome = replay(table, urls(cluster), cluster.model, CONFIG).outcome
    followers = np.flatnonzero(table.parent >= 0)
    assert len(followers) > 3
    due = outcome.finish_s[table.parent[followers]] + table.think_s[followers]
    np.testing.assert_allclose(outcome.arrival_s[followers], due, atol=1e-6)


def test_what_fails_is_told_and_left_out(fake_cluster: Make, tmp_path: Path) -> None:
    table = random_table(2, 40, rate_rps=200.0)
    with running_cluster(fake_cluster({"fail_every": 4}, engines=1), tmp_path / "a") as cluster:
        result = replay(table, urls(cluster), cluster.model, CONFIG)
    assert len(result.errors) == 10
    assert set(result.errors.values()) == {'HTTP 503: {"error": "busy"}'}
    assert np.isnan(result.outcome.ttft_s).sum() == 10
    assert result.metrics(CONFIG.slo, CONFIG.warmup_share)["failed"] == 10
    with running_cluster(fake_cluster({"cut": True}, engines=1), tmp_path / "b") as cluster:
        result = replay(table, urls(cluster), cluster.model, CONFIG)
    cut = table.output_tokens >= 3
    assert sorted(result.errors) == np.flatnonzero(cut).tolist()


def test_nobody_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no request was answered; the first: ClientConnectorError"):
        replay(random_table(1, 5, rate_rps=500.0), ("http://127.0.0.1:9",), "m", CONFIG)


def test_equal_identities_give_equal_tokens() -> None:
    table = RequestTable.build(
        [0, 0, 0, 0],
        [100, 80, 60, 60],
        [1, 1, 1, 1],
        stream=[1, 1, 2, 3],
        template=[5, 5, 5, -1],
        template_tokens=[30, 30, 40, 0],
    )
    rows = [prompt_tokens(table, r, 256) for r in range(4)]
    assert [len(row) for row in rows] == [100, 80, 60, 60]
    assert all(((row >= 0) & (row < 256)).all() for row in rows)
    np.testing.assert_array_equal(rows[0][:80], rows[1])  # one stream
    np.testing.assert_array_equal(rows[0][:30], rows[2][:30])  # one template
    assert (rows[0][40:60] != rows[2][40:]).mean() > 0.9
    assert (rows[2][:40] != rows[3][:40]).mean() > 0.9
    assert (prompt_tokens(table, 0, 256, salt=1) != rows[0]).mean() > 0.9
    assert len(np.unique(np.concatenate(rows))) > 100


def test_block_ids_of_a_trace_give_equal_tokens() -> None:
    table = RequestTable.build(
        [0, 0], [48, 40], [1, 1], prefix_start=[0, 2, 4], prefix_ids=[7, 8, 7, 9], prefix_block_tokens=16
    )
    one, two = (prompt_tokens(table, r, 256) for r in range(2))
    np.testing.assert_array_equal(one[:16], two[:16])
    assert (one[16:32] != two[16:32]).mean() > 0.9


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"workload": {"name": "fixed", "load": 0.5}}, "workload.rate_rps in place of workload.load"),
        ({"workload": {"name": "fixed", "rate_rps": -1}}, "workload.rate_rps: got -1"),
        ({"workload": {"name": "fixed", "rate_rps": 1}, "vocabulary": 1}, "vocabulary: got 1"),
    ],
)
def test_bad_configs_are_one_line(content: dict[str, object], line: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]+$") as caught:
        validate(ReplayConfig, content, "replay.yaml")
    assert line in str(caught.value)


def test_a_policy_chooses_by_what_the_router_saw(fake_cluster: Make, tmp_path: Path) -> None:
    table = random_table(5, 80, rate_rps=80.0, user=np.arange(80) % 4, session=np.arange(80) % 4)
    with running_cluster(fake_cluster({"ttft_s": 0.02}), tmp_path) as cluster:
        results = {}
        for spec in ("session_sticky", "least_requests"):
            router = PolicyRouter(create("engine", spec), EngineTable([EngineLimits()] * 2))
            results[spec] = replay(table, urls(cluster), cluster.model, CONFIG, dispatcher=ByPolicy(router, table))
            assert not router.fallbacks
            assert router.decisions == 80
            view = router.table.view(RequestView(999, 0.0, 0.0, 10))
            assert not view.inflight.any()
            assert (view.ttft_ewma_s > 0.02).all()
    sticky = results["session_sticky"].outcome.engine
    assert all(len(set(sticky[table.session == session])) == 1 for session in range(4))
    assert 25 < np.bincount(results["least_requests"].outcome.engine)[0] < 55


def test_an_engine_that_dies_is_left_out_after_two_readings(fake_cluster: Make, tmp_path: Path) -> None:
    table = random_table(6, 120, rate_rps=40.0)
    config = CONFIG.model_copy(update={"telemetry_period_s": 0.1})
    with running_cluster(fake_cluster({"ttft_s": 0.02}), tmp_path) as cluster:
        router = PolicyRouter(create("engine", "round_robin"), EngineTable([EngineLimits()] * 2))

        def kill(share: float) -> None:
            if share > 0.3 and cluster.engines[0].pid is not None:
                stop_groups([cluster.engines[0].pid], timeout_s=0.0)

        result = replay(
            table,
            urls(cluster),
            cluster.model,
            config,
            dispatcher=ByPolicy(router, table, period_s=0.1),
            progress=kill,
        )
    assert 0 < len(result.errors) < 40
    assert (result.outcome.engine[-40:] == 1).all()
