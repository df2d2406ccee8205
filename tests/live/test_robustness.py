"""Requests under preemption, and clients that leave, with our scheduler in the engine."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import Iterator

import aiohttp
import numpy as np
import pytest

from servegym.baselines.policy_spec import PolicySpec
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.launcher import LiveCluster, running_cluster
from servegym.envs.live.replay import ReplayConfig, replay
from servegym.envs.workloads.table import RequestTable

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
CONFIG = ReplayConfig.model_validate({"workload": {"name": "fixed", "rate_rps": 1}})


@pytest.fixture(scope="module")
def tight_engine(local_cluster: ClusterFile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    """An engine with room for one full context, or a few short ones: requests that grow preempt each other."""
    arguments = {"max-num-seqs": 8, "max-model-len": 2048, "num-gpu-blocks-override": 18}
    changes = {
        "engines": 1,
        "request_policy": PolicySpec(name="spf_aging"),
        "arguments": local_cluster.arguments | arguments,
    }
    with running_cluster(local_cluster.model_copy(update=changes), tmp_path_factory.mktemp("tight")) as cluster:
        yield cluster


def metric(cluster: LiveCluster, name: str) -> float:
    with urllib.request.urlopen(f"{cluster.engines[0].url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def test_preempted_requests_come_to_their_end(tight_engine: LiveCluster) -> None:
    rng = np.random.default_rng(1)
    table = RequestTable.build(np.arange(40) * 0.005, rng.integers(50, 500, 40), rng.integers(100, 300, 40))
    result = replay(table, (tight_engine.engines[0].url,), tight_engine.model, CONFIG)
    assert not result.errors
    np.testing.assert_array_equal(result.outcome.output_tokens, table.output_tokens)
    assert metric(tight_engine, "num_preemptions_total") > 0
    state = tight_engine.engines[0].shim_state()
    assert state is not None
    assert state["failures"] == 0


def test_clients_that_leave_while_waiting_cost_nobody_else(tight_engine: LiveCluster) -> None:
    url, model = tight_engine.engines[0].url, tight_engine.model

    async def leave(session: aiohttp.ClientSession, after_s: float) -> None:
        body = {"model": model, "prompt": [7] * 300, "max_tokens": 200, "ignore_eos": True, "stream": True}
        try:
            async with session.post(
                f"{url}/v1/completions", json=body, timeout=aiohttp.ClientTimeout(total=after_s)
            ) as response:
                await response.read()
        except TimeoutError:
            return

    async def leavers() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(leave(session, 0.1 + 0.02 * i) for i in range(30)))

    rng = np.random.default_rng(2)
    table = RequestTable.build(np.arange(20) * 0.02, rng.integers(50, 300, 20), np.full(20, 30))

    async def both() -> bool:
        staying = asyncio.get_running_loop().run_in_executor(None, lambda: replay(table, (url,), model, CONFIG))
        await leavers()
        return not (await staying).errors

    assert asyncio.run(both())
    deadline = time.monotonic() + 20
    while metric(tight_engine, "num_requests_running") + metric(tight_engine, "num_requests_waiting") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)
