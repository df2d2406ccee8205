"""One streamed completion, timed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(slots=True)
class Completion:
    """What became of a request. Times are ``time.perf_counter()`` seconds, NaN where it never got that far.

    Attributes:
        sent_s: when it was sent.
        first_s: arrival of the first token.
        last_s: arrival of the last token.
        output_tokens: tokens of the output, as the server counts them.
        hit_tokens: prompt tokens found in the prefix cache, where the server says so.
        error: why it failed; empty for a complete answer.
    """

    sent_s: float
    first_s: float = float("nan")
    last_s: float = float("nan")
    output_tokens: int = 0
    hit_tokens: int = 0
    error: str = ""


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    on_first: Callable[[float], None] = lambda now_s: None,
    on_token: Callable[[float], None] | None = None,
) -> Completion:
    """Send one streamed completion request and read its answer to the end; failures are part of the result.

    Args:
        session: HTTP connections.
        url: server, without path.
        body: of ``/v1/completions``, with ``stream`` and ``stream_options.include_usage``.
        headers: of the request.
        on_first: called when the first token arrives, with that time.
        on_token: called at each event that brings tokens, the first one included, with its time.
    """
    result = Completion(time.perf_counter())
    try:
        async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
            if response.status != 200:
                result.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return result
            done = await _read(response, result, on_first, on_token)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    if not done and not result.error:
        result.error = "the stream ended without [DONE]"
    return result


async def _read(
    response: aiohttp.ClientResponse,
    result: Completion,
    on_first: Callable[[float], None],
    on_token: Callable[[float], None] | None,
) -> bool:
    """Read server-sent events up to the connection's word; True if the stream came to its proper end.

    Who leaves after ``[DONE]`` cuts the last chunk off, and looks to a proxy like a client that gave up.
    """
    done = False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        now = time.perf_counter()
        payload = line[5:].strip()
        if payload == b"[DONE]":
            done = True
            continue
        event = json.loads(payload)
        if "error" in event:
            result.error = str(event["error"])[:200]
            return True
        if event.get("choices"):
            if result.first_s != result.first_s:
                result.first_s = now
                on_first(now)
            result.last_s = now
            if on_token is not None:
                on_token(now)
        usage = event.get("usage")
        if usage:
            result.output_tokens = int(usage.get("completion_tokens", 0))
            result.hit_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    return done
