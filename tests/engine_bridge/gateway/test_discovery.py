"""Engines that come and go: their places in the router, and a deployment that finds them by name."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from gateway_support import FakeEngine

from servegym.baselines.interface import E_INFLIGHT, E_MAX_NUM_SEQS
from servegym.engine_bridge.gateway.arms import Arms
from servegym.engine_bridge.gateway.config import DeployConfig
from servegym.engine_bridge.gateway.core import Gateway
from servegym.engine_bridge.gateway.decision_log import DecisionLog
from servegym.engine_bridge.gateway.messages import Decision, IncomingRequest, Outcome
from servegym.engine_bridge.gateway.metrics import GatewayMetrics
from servegym.engine_bridge.gateway.serve import deployed
from servegym.engine_bridge.router.discovery import Discovery, resolve
from servegym.engine_bridge.router.table import EngineSample


def gateway(*endpoints: str, policy: str = "least_requests") -> Gateway:
    config = DeployConfig.model_validate({"policy": policy})
    arms = Arms(config.policy, config.baseline, config.mode, config.percent, 1.0)
    return Gateway(config, endpoints, arms, DecisionLog(None, 64), GatewayMetrics())


def decide(one: Gateway, request_id: str, prompt_tokens: int = 3) -> Decision:
    body = b'{"prompt": [' + b", ".join([b"1"] * prompt_tokens) + b"]}"
    request = IncomingRequest(request_id, "/v1/completions", {}, body, time.monotonic(), None)
    return asyncio.run(one.decide(request))


def test_engines_that_are_found_get_the_requests() -> None:
    one = gateway("", "", "")
    assert decide(one, "early").status == 503
    assert one.found({"a:1", "b:1"}) == ()
    assert set(decide(one, "1").endpoints) == {"a:1", "b:1"}
    assert one.healthy_endpoints() == ("a:1", "b:1")
    assert b'engine="a:1"' in one.metrics.page()
    assert b'engine=""' not in one.metrics.page()


def test_an_engine_that_leaves_keeps_its_place_until_its_requests_have_ended() -> None:
    one = gateway("", "")
    one.found({"a:1", "b:1"})
    assert decide(one, "running").endpoints[0] == "a:1"
    assert one.found({"b:1", "c:1"}) == ("c:1",)  # two places, and a request still runs on a
    assert decide(one, "new").endpoints == ("b:1",)
    one.finished(Outcome("running", "a:1", 200, True, ttft_s=0.1, total_s=0.2))
    assert one.found({"b:1", "c:1"}) == ()
    assert one.endpoints == ("c:1", "b:1")
    assert decide(one, "newer").endpoints[0] == "c:1"
    assert one.urls == ["http://c:1", "http://b:1"]


def test_an_engine_that_comes_back_finds_its_own_counters_and_another_finds_none() -> None:
    one = gateway("", "")
    one.found({"a:1", "b:1"})
    decide(one, "running")
    one.found({"b:1"})
    one.found({"a:1", "b:1"})
    assert one.table.data[0, E_INFLIGHT] == 1
    one.table.sampled(0, EngineSample(9.0, 9.0, 0.9), 1.0)
    one.finished(Outcome("running", "a:1", 200, True, ttft_s=0.1, total_s=0.2))
    one.found({"b:1", "c:1"})
    fresh = gateway("x:1").table.data[0]
    assert one.table.data[0, E_MAX_NUM_SEQS] == fresh[E_MAX_NUM_SEQS] > 0
    assert one.table.data[0].tobytes() == fresh.tobytes()


def test_vacant_places_change_no_decision_of_the_learned_policy() -> None:
    few, many = gateway("a:1", "b:1", policy="servegym/dispatch"), gateway(*[""] * 16, policy="servegym/dispatch")
    many.found({"a:1", "b:1"})
    for number, tokens in enumerate((5, 700, 20, 20, 3000, 8, 900, 40)):
        assert decide(few, str(number), tokens).endpoints == decide(many, str(number), tokens).endpoints
    assert not few.arms.policy.policy.fallbacks
    assert not many.arms.policy.policy.fallbacks


def test_a_name_that_nobody_has_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(error: int) -> Callable[..., object]:
        def fail(*arguments: object, **options: object) -> object:
            raise socket.gaierror(error, "")

        return fail

    monkeypatch.setattr(socket, "getaddrinfo", answer(socket.EAI_NONAME))
    assert asyncio.run(resolve("engines", 80)) == frozenset()
    monkeypatch.setattr(socket, "getaddrinfo", answer(socket.EAI_AGAIN))
    with pytest.raises(socket.gaierror, match=r"Errno"):
        asyncio.run(resolve("engines", 80))


def test_a_deployment_finds_its_engines_and_tells_others_no_more_than_metrics(
    fakes: Callable[..., list[FakeEngine]], tmp_path: Path
) -> None:
    engine = fakes({"ttft_s": 0.01})[0]
    config = DeployConfig.model_validate({"policy": "least_requests", "metrics": "127.0.0.1:0"})
    discovery = Discovery(f"http://localhost:{engine.port}", 4)

    def ask(address: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://{address}{path}", body, timeout=5) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, b""

    async def main() -> None:
        async with deployed(config, tmp_path, (), discovery=discovery, with_envoy=False) as deployment:
            deadline = time.monotonic() + 10
            while engine.endpoint not in deployment.gateway.healthy_endpoints():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            state = (tmp_path / "state.json").read_text(encoding="utf-8")
            metrics = state.partition('"metrics": "')[2].partition('"')[0]
            assert await asyncio.to_thread(ask, metrics, "/health") == (200, b"ok")
            assert engine.endpoint.encode() in (await asyncio.to_thread(ask, metrics, "/metrics"))[1]
            assert (await asyncio.to_thread(ask, metrics, "/policy", b'{"policy": "random"}'))[0] == 404

    asyncio.run(main())
