"""Request policies inside a real vLLM engine, under load from a real HTTP client."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.agents.evaluation import EvaluationConfig, evaluate
from servegym.baselines.policy_spec import PolicySpec
from servegym.engine_bridge.cluster.launcher import LiveCluster
from servegym.envs.live.replay import ReplayConfig, ReplayResult, replay
from servegym.envs.workloads.table import RequestTable

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
CONFIG = ReplayConfig.model_validate({"workload": {"name": "fixed", "rate_rps": 1}})


def use(cluster: LiveCluster, policy: str) -> None:
    """Put a policy in force."""
    cluster.follow(PolicySpec.parse(policy))


def _complete(cluster: LiveCluster, prompt: str, tokens: int = 1) -> Any:
    body = {"model": cluster.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{cluster.engines[0].url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]


def load(cluster: LiveCluster, seed: int, count: int = 80, rate_rps: float = 60.0) -> tuple[RequestTable, ReplayResult]:
    """Poisson arrivals faster than four slots serve; one prompt in five is long."""
    rng = np.random.default_rng(seed)
    long = rng.random(count) < 0.2
    prompts = np.where(long, rng.integers(1000, 2500, count), rng.integers(16, 128, count))
    table = RequestTable.build(np.cumsum(rng.exponential(1 / rate_rps, count)), prompts, np.full(count, 16))
    return table, replay(table, (cluster.engines[0].url,), cluster.model, CONFIG)


def test_our_scheduler_is_in_the_engine(one_engine: LiveCluster) -> None:
    state = one_engine.engines[0].shim_state()
    assert state is not None
    assert (state["tier"], state["failures"]) == ("policy", 0)


def test_shortest_first_with_aging_cuts_ttft_against_fcfs(one_engine: LiveCluster) -> None:
    """An evaluation, whose policies take turns, as machines drift; the promise is 30 % of the mean."""
    content = {
        "live": {"cluster": str(one_engine.folder), "output_scale": 0.05, "max_tokens": 2500},
        "workloads": [{"name": "azure-conv", "requests": 50}],
        "rates_rps": [60.0],
        "seeds": 3,
        "baseline": "fcfs",
        "policies": {"fcfs": {}, "shortest": {"request": {"name": "spf_aging", "params": {"gamma": 200}}}},
    }
    before = one_engine.request_policy
    found = evaluate(EvaluationConfig.model_validate(content))
    assert one_engine.request_policy == before
    assert sum(row["failed"] + row["fallbacks"] for row in found.rows) == 0
    fcfs, shortest = (np.mean(found.values("ttft_s", name, "azure-conv", 60.0)) for name in ("fcfs", "shortest"))
    print(f"mean TTFT {fcfs:.3f} s FCFS, {shortest:.3f} s shortest first with aging: {shortest / fcfs - 1:+.0%}")
    assert shortest < 0.7 * fcfs


def test_the_order_of_first_tokens_is_the_policys(one_engine: LiveCluster) -> None:
    """A burst, all of it there before the first token: after those that found a free slot, strictly by length."""
    use(one_engine, "spf_aging,gamma=0")
    rng = np.random.default_rng(3)
    prompts = rng.permutation(np.arange(40, 40 + 30 * 60, 60))
    table = RequestTable.build(np.arange(30) * 1e-4, prompts, np.full(30, 8))
    result = replay(table, (one_engine.engines[0].url,), one_engine.model, CONFIG)
    assert not result.errors
    first = np.argsort(result.outcome.ttft_s + result.outcome.arrival_s)
    later = prompts[first][8:]
    ranks = np.argsort(np.argsort(later))
    assert np.corrcoef(ranks, np.arange(len(later)))[0, 1] > 0.98


def test_a_policy_that_fails_costs_nobody_an_answer(one_engine: LiveCluster, tmp_path: Path) -> None:
    module = tmp_path / "mine.py"
    module.write_text("class Mine:\n    def score(self, queue):\n        raise ZeroDivisionError('mine')\n")
    use(one_engine, f"{module}:Mine")
    _, result = load(one_engine, 5, count=40)
    assert not result.errors
    use(one_engine, "fcfs")
    state = one_engine.engines[0].shim_state()
    assert state is not None
    assert state["failures"] > 0


def test_a_greedy_user_does_not_starve_a_modest_one(one_engine: LiveCluster) -> None:
    """VTC inside the engine, by counters of what each user was served there."""
    users = np.array([1] * 40 + [2] * 5)
    arrival = np.r_[np.arange(40) * 1e-3, 0.1 + np.arange(5) * 1e-3]
    table = RequestTable.build(arrival, np.full(45, 400), np.full(45, 16), user=users)
    modest, failures = {}, []
    for policy in ("fcfs", "vtc"):
        use(one_engine, policy)
        failures.append(one_engine.engines[0].shim_state()["failures"])  # type: ignore[index]
        result = replay(table, (one_engine.engines[0].url,), one_engine.model, CONFIG)
        assert not result.errors
        modest[policy] = float(result.outcome.ttft_s[40:].mean())
    assert modest["vtc"] < 0.5 * modest["fcfs"]
    assert one_engine.engines[0].shim_state()["failures"] == failures[0]  # type: ignore[index]


def test_the_order_changes_no_answer(one_engine: LiveCluster) -> None:
    prompts = [f"prompt number {i} " * (1 + i) for i in range(4)]
    answers = []
    for policy in ("fcfs", "spf_aging"):
        use(one_engine, policy)
        answers.append([_complete(one_engine, prompt, 12)["text"] for prompt in prompts])
    assert answers[0] == answers[1]
