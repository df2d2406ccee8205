"""Fake engines for tests of the gateway."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from servegym.engine_bridge.cluster.engine import stop_groups
from servegym.engine_bridge.gateway.config import DeployConfig
from servegym.engine_bridge.gateway.serve import Deployment, deployed
from servegym.engine_bridge.gateway.static_key import StaticKey

SERVEGYM = (sys.executable, "-c", "from servegym.agents.cli import main; main()")
FAKE = Path(__file__).with_name("fake_vllm.py")


class FakeEngine:
    """A fake engine in a process group of its own."""

    def __init__(self, options: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.endpoint = f"127.0.0.1:{self.port}"
        self._options = options
        self.start()

    def start(self) -> None:
        arguments = [sys.executable, str(FAKE), "--port", str(self.port), "--served-model-name", "m"]
        environment = dict(os.environ) | {"FAKE_VLLM": json.dumps(self._options)}
        self.process = subprocess.Popen(arguments, env=environment, start_new_session=True)
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the fake engine does not answer")

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@contextmanager
def gateway_before(
    urls: Sequence[str], folder: Path, static_key: StaticKey | None = None, **settings: Any
) -> Iterator[Deployment]:
    """A deployment whose loop runs in a thread, for clients that have a loop of their own.

    Its deadline is long: clients and engines share the cores, and what comes too late is sent on without a decision.
    """
    config = DeployConfig.model_validate({"listen": "127.0.0.1:0", "deadline_ms": 10_000} | settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    serving = deployed(config, folder, urls, static_key=static_key)
    try:
        yield asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result(60)
    finally:
        asyncio.run_coroutine_threadsafe(serving.__aexit__(None, None, None), loop).result(90)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/health", timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def served(command: Sequence[str | Path], port: int, folder: Path | None = None) -> Iterator[str]:
    """A server in a process of its own: a client in the same interpreter would measure itself."""
    url = f"http://127.0.0.1:{port}"
    output = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not answers(url):
            assert time.monotonic() < deadline, f"{command[0]} does not start"
            time.sleep(0.1)
        yield url
    finally:
        stop_groups([process.pid], timeout_s=10.0)
