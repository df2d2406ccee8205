"""Engines that are killed and started again at random under load: who loses what.

Two real engines behind a gateway, one of them down at a time; streamed and plain requests from plain HTTP clients. Run
with ``SERVEGYM_VLLM_PYTHON=... pytest tests/benchmarks/test_kills.py -s``; KILL_SECONDS is the length of the load,
300 by default.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest
from gateway_support import gateway_before

from servegym.configuration import find_config, load_mapping
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.engine import free_port
from servegym.engine_bridge.cluster.launcher import start_cluster

SECONDS = float(os.environ.get("KILL_SECONDS", "300"))
CLIENTS, TOKENS = 12, 48


async def one(session: aiohttp.ClientSession, url: str, rng: random.Random) -> str:
    """Send a request and say what became of it."""
    stream = rng.random() < 0.7
    body = {"model": "tiny-moe", "prompt": [rng.randrange(10, 250) for _ in range(200)], "max_tokens": TOKENS}
    body |= {"ignore_eos": True, "stream": stream}
    kind, heard, events = "stream" if stream else "plain", "no byte", 0
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            heard = "headers"
            if response.status != 200:
                return f"{kind}: HTTP {response.status}"
            if not stream:
                tokens = (await response.json())["usage"]["completion_tokens"]
                return f"{kind}: whole" if tokens == TOKENS else f"{kind}: {tokens} tokens"
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    return f"{kind}: whole"
                events += line.startswith(b"data:")
                heard = "tokens" if events else heard
    except aiohttp.ClientError:
        return f"{kind}: error after {heard}"
    return f"{kind}: cut short without an error after {heard}"


async def load(url: str, until: float) -> Counter[str]:
    """Send requests in closed loops."""
    found: Counter[str] = Counter()

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            found[await one(session, url, rng)] += 1

    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(number, session) for number in range(CLIENTS)))
    return found


def test_engines_die_at_random(tmp_path: Path) -> None:
    if not os.environ.get("SERVEGYM_VLLM_PYTHON"):
        pytest.skip("SERVEGYM_VLLM_PYTHON does not name the interpreter of an environment with vLLM")
    local = load_mapping(find_config("local", "clusters")) | {"engines": 1}
    files = [
        ClusterFile.model_validate(local | {"name": name, "ports": [free_port("127.0.0.1")]}) for name in ("a", "b")
    ]
    rng, kills, over = random.Random(0), 0, threading.Event()
    with ExitStack() as stack:
        clusters = [start_cluster(file, tmp_path / file.name) for file in files]
        stack.callback(lambda: [cluster.stop() for cluster in clusters])
        urls = [cluster.engines[0].url for cluster in clusters]
        deployment = stack.enter_context(gateway_before(urls, tmp_path / "gateway", policy="least_requests"))

        def chaos() -> None:
            nonlocal kills
            while not over.wait(rng.uniform(2.0, 10.0)):
                victim = rng.randrange(2)
                pid = clusters[victim].engines[0].pid
                assert pid is not None
                os.killpg(pid, signal.SIGKILL)
                kills += 1
                time.sleep(rng.uniform(0.0, 5.0))
                clusters[victim] = start_cluster(files[victim], tmp_path / files[victim].name)
                # Until the gateway sends to it again: a survivor that dies too leaves nobody to retry on.
                time.sleep(3.0)

        killer = threading.Thread(target=chaos)
        killer.start()
        found = asyncio.run(load(f"http://{deployment.listen}", time.monotonic() + SECONDS))
        over.set()
        killer.join()
    print(f"\n{sum(found.values())} requests in {SECONDS:g} s, {kills} kills")
    for what, count in sorted(found.items()):
        print(f"  {what}: {count}")
    assert kills >= 2
    assert not [what for what in found if what.endswith("no byte") or "HTTP" in what]
    assert not [what for what in found if "without an error" in what]
    assert {what for what in found if what.startswith("plain")} == {"plain: whole"}
