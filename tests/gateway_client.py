"""A deployment before fake engines, and a client of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from gateway_support import FakeEngine

from servegym.engine_bridge.gateway.config import DeployConfig
from servegym.engine_bridge.gateway.serve import Deployment, deployed
from servegym.engine_bridge.gateway.static_key import StaticKey

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
