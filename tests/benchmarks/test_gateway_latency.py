"""What the gateway adds to TTFT, beside direct access and vllm-router, in one run; and how long a decision takes.

Run with ``pytest tests/benchmarks/test_gateway_latency.py -s``. The environment variable VLLM_ROUTER names the program
vllm-router (pip install vllm-router, in an environment of its own); without it that column is absent.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from gateway_support import SERVEGYM, served

from servegym.engine_bridge.cluster.engine import free_port
from servegym.engine_bridge.gateway.arms import Arms
from servegym.engine_bridge.gateway.config import DeployConfig
from servegym.engine_bridge.gateway.core import Gateway
from servegym.engine_bridge.gateway.decision_log import DecisionLog
from servegym.engine_bridge.gateway.messages import IncomingRequest, Outcome
from servegym.engine_bridge.gateway.metrics import GatewayMetrics

TTFT_S, ITL_S, TOKENS = 0.005, 0.02, 10
STREAMS, ROUNDS = (1, 16, 64), 3


@pytest.fixture
def engines() -> Iterator[list[str]]:
    program = Path(__file__).with_name("mock_engine.py")
    with ExitStack() as stack:
        yield [
            stack.enter_context(served([sys.executable, program, str(port), str(TTFT_S), str(ITL_S)], port))
            for port in (free_port("127.0.0.1"), free_port("127.0.0.1"))
        ]


@pytest.fixture
def router(engines: list[str]) -> Iterator[str | None]:
    program = os.environ.get("VLLM_ROUTER")
    if program is None:
        yield None
        return
    port, metrics = free_port("127.0.0.1"), free_port("127.0.0.1")
    ports = ["--port", str(port), "--prometheus-port", str(metrics)]
    with served(
        [program, "--host", "127.0.0.1", *ports, "--policy", "round_robin", "--worker-urls", *engines], port
    ) as url:
        yield url


@pytest.fixture
def gateway(engines: list[str], tmp_path: Path) -> Iterator[str]:
    (tmp_path / "cluster.yaml").write_text(f"name: mocks\nattach: [{', '.join(engines)}]\n")
    port = free_port("127.0.0.1")
    arguments = ["deploy", "round_robin", "--cluster", "cluster.yaml", "--listen", f"127.0.0.1:{port}"]
    with served([*SERVEGYM, *arguments], port, tmp_path) as url:
        yield url


async def measure(url: str, streams: int, seconds: float) -> list[float]:
    """TTFT of closed loops of streams, at the client."""
    body = {"model": "m", "prompt": "a" * 2000, "max_tokens": TOKENS, "stream": True}
    found: list[float] = []
    until = time.perf_counter() + seconds

    async def loop(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < until:
            start = time.perf_counter()
            async with session.post(f"{url}/v1/completions", json=body) as response:
                assert response.status == 200
                await response.content.readline()
                found.append(time.perf_counter() - start)
                await response.read()
            await asyncio.sleep(0.01)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(loop(session) for _ in range(streams)))
    return found


def test_added_ttft(engines: list[str], gateway: str, router: str | None) -> None:
    ways = {"direct": engines[0], "gateway": gateway}
    if router is not None:
        ways["vllm-router"] = router
    print(f"\nTTFT ms at the client, p50 / p99 (mock engine {TTFT_S * 1e3:g} ms); in brackets: added")
    for streams in STREAMS:
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, url in ways.items():
                found[name] += asyncio.run(measure(url, streams, 4.0))
        quantiles = {name: np.quantile(values, (0.5, 0.99)) * 1e3 for name, values in found.items()}
        cells = []
        for name, (p50, p99) in quantiles.items():
            added = f" (+{p50 - quantiles['direct'][0]:.2f} / +{p99 - quantiles['direct'][1]:.2f})"
            cells.append(f"{name} {p50:.2f} / {p99:.2f}{'' if name == 'direct' else added}")
        print(f"{streams:3} streams: " + "; ".join(cells))
        assert quantiles["gateway"][0] - quantiles["direct"][0] < 20.0


@pytest.mark.parametrize("policy", ["lmetric", "bundle"])
def test_decision_time(policy: str) -> None:
    """From a parsed body's arrival at the core to its decision, prompts of 2 kB."""
    name = policy
    if policy == "bundle":
        folder = os.environ.get("SERVEGYM_BUNDLE")
        if folder is None:
            pytest.skip("SERVEGYM_BUNDLE names a run or bundle folder")
        name = folder
    config = DeployConfig.model_validate({"policy": name})
    body = b'{"model": "m", "prompt": "' + b"a" * 2000 + b'", "max_tokens": 10}'
    for count in (4, 16, 64):
        endpoints = [f"10.0.0.{n}:80" for n in range(count)]
        arms = Arms(config.policy, config.baseline, "full", 5.0, 0.2)
        gateway = Gateway(config, endpoints, arms, DecisionLog(None, 64), GatewayMetrics())

        async def run(gateway: Gateway) -> list[float]:
            taken = []
            for n in range(3000):
                request = IncomingRequest(str(n), "/v1/completions", {}, body, time.monotonic())
                start = time.perf_counter()
                decision = await gateway.decide(request)
                taken.append(time.perf_counter() - start)
                if n >= 200:
                    gateway.finished(Outcome(str(n - 200), decision.endpoints[0], 200, True, ttft_s=0.1, total_s=1.0))
            return taken[200:]

        p50, p99 = np.quantile(asyncio.run(run(gateway)), (0.5, 0.99)) * 1e3
        print(f"{policy}: {count} engines: decision p50 {p50:.3f} ms, p99 {p99:.3f} ms")
        assert p99 < 5.0
