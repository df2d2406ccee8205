"""What vLLM engines say of themselves: their Prometheus page, read now and then.

``/metrics`` costs the engine's server some milliseconds in the loop that streams tokens; a few times a second is
enough, since the router counts what it sends between two readings.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence

import aiohttp

from servegym.engine_bridge.router.health import Health
from servegym.engine_bridge.router.table import EngineSample, EngineTable

# vLLM's names, newest first.
_WAITING = ("vllm:num_requests_waiting",)
_RUNNING = ("vllm:num_requests_running",)
_KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:{[^}]*})?\s+(?P<value>\S+)")


def parse_metrics(text: str) -> EngineSample:
    r"""Read an engine's Prometheus page; ranks of one server add up, their KV use is averaged.

    >>> parse_metrics('vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 1.0')
    EngineSample(waiting=None, running=4.0, kv_usage=None)
    """
    values: dict[str, list[float]] = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is not None and found["name"].startswith("vllm:"):
            values.setdefault(found["name"], []).append(float(found["value"]))

    def first(names: Sequence[str]) -> list[float] | None:
        return next((values[name] for name in names if name in values), None)

    waiting, running, usage = first(_WAITING), first(_RUNNING), first(_KV_USAGE)
    return EngineSample(
        None if waiting is None else sum(waiting),
        None if running is None else sum(running),
        None if usage is None else sum(usage) / len(usage),
    )


async def watch(
    session: aiohttp.ClientSession,
    urls: Sequence[str],
    table: EngineTable,
    health: Health,
    *,
    period_s: float = 0.25,
    timeout_s: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Keep a table's telemetry fresh, and tell whether the engines answer, until cancelled.

    Args:
        session: HTTP connections.
        urls: of the engines, in the order of the table; read anew each time, for engines may come and go.
        table: the engines.
        health: hears of each reading, good or not.
        period_s: between two readings of an engine; the engines take their turns within it.
        timeout_s: of a reading.
        clock: the table's.
    """

    async def one(engine: int) -> None:
        await asyncio.sleep(period_s * engine / len(urls))
        while True:
            begun = clock()
            if not health.present(engine):
                await asyncio.sleep(period_s)
                continue
            url = urls[engine]
            try:
                timeout = aiohttp.ClientTimeout(total=timeout_s)
                async with session.get(f"{url}/metrics", timeout=timeout) as response:
                    response.raise_for_status()
                    sample = parse_metrics(await response.text())
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
                if url == urls[engine]:
                    health.probed(engine, False, clock())
            else:
                if url != urls[engine]:
                    continue
                table.sampled(engine, sample, begun)
                health.probed(engine, True, clock())
            await asyncio.sleep(max(period_s - (clock() - begun), 0.0))

    async with asyncio.TaskGroup() as tasks:
        for engine in range(len(urls)):
            tasks.create_task(one(engine))
