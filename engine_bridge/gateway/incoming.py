"""What a policy may know of a request, read from its headers and its OpenAI-compatible body."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from servegym.engine_bridge.gateway.messages import IncomingRequest

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
"""What generates tokens; anything else only needs an engine that answers."""
SESSION_HEADER = "x-session-id"
USER_HEADER = "x-user-id"
SLO_HEADER = "x-slo-ttft-ms"
OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
_ID_BITS = 48


class BadRequestError(ValueError):
    """A body that no engine could serve; the message is for the client."""


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request that generates tokens.

    Attributes:
        prompt_tokens: exact where the client sent tokens, else estimated from the text.
        characters: of the prompt's text; 0 where the client sent tokens.
        blocks: hashes of the prompt's blocks, each of the block and all before it.
        user: number of the user, -1 if unknown; a hash where the client's name is no number.
        session: number of the session, likewise.
        turn: as the client counts; None if it does not say.
        priority: smaller runs first.
        deadline_s: seconds until the first token is due, inf without one.
        predicted_tokens: predicted output length, NaN without a prediction.
        stream: whether the client asked for a stream.
    """

    prompt_tokens: int
    characters: int
    blocks: tuple[bytes, ...]
    user: int
    session: int
    turn: int | None
    priority: int
    deadline_s: float
    predicted_tokens: float
    stream: bool


def parse(
    request: IncomingRequest, block_tokens: int, most_blocks: int, chars_per_token: float, block_chars: int
) -> ParsedRequest:
    """Read a request.

    Args:
        request: it.
        block_tokens: tokens per block of the prefix index.
        most_blocks: leading blocks that are looked at.
        chars_per_token: of text, for the estimate of its length.
        block_chars: characters per block, where the prompt is text; the same for all requests, or nothing matches.

    Raises:
        BadRequestError: the body is no JSON object, or has no prompt.
    """
    try:
        body = json.loads(request.body)
    except ValueError:
        raise BadRequestError("the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise BadRequestError("the body is not a JSON object")
    kind, content, tokens = _prompt(body)
    characters = 0
    seed = hashlib.blake2b(str(body.get("model", "")).encode(), digest_size=8)
    if kind == "text":
        characters = len(content)
        tokens = max(round(characters / chars_per_token), 1)
        blocks = _blocks(content[: block_chars * most_blocks].encode(errors="replace"), block_chars, seed)
    else:
        ids = np.asarray(content[: block_tokens * most_blocks], dtype=np.int64)
        blocks = _blocks(ids.tobytes(), block_tokens * ids.itemsize, seed)
    extra = body.get("vllm_xargs")
    extra = extra if isinstance(extra, dict) else {}
    headers = request.headers
    slo_ms = _number(headers.get(SLO_HEADER))
    deadline = _number(extra.get("deadline_s")) if slo_ms is None else slo_ms / 1000
    predicted = _number(extra.get("predicted_tokens"))
    turn = _number(extra.get("turn"))
    return ParsedRequest(
        prompt_tokens=tokens,
        characters=characters,
        blocks=blocks,
        user=_identity(headers.get(USER_HEADER) or extra.get("user", body.get("user"))),
        session=_identity(headers.get(SESSION_HEADER) or extra.get("session")),
        turn=None if turn is None else int(turn),
        priority=_priority(headers, body),
        deadline_s=math.inf if deadline is None else deadline,
        predicted_tokens=math.nan if predicted is None else predicted,
        stream=bool(body.get("stream")),
    )


def _priority(headers: Mapping[str, str], body: Mapping[str, Any]) -> int:
    """Return vLLM's priority, smaller first; the objective of the Gateway API counts the other way round."""
    for name in OBJECTIVE_HEADERS:
        objective = _number(headers.get(name))
        if objective is not None:
            return -int(objective)
    value = _number(body.get("priority"))
    return 0 if value is None else int(value)


def _prompt(body: Mapping[str, Any]) -> tuple[str, Any, int]:
    """Return "text" or "tokens", the prompt, and its number of tokens if it has been counted."""
    if "messages" in body:
        # Ends in a bracket that a longer conversation lacks; only the last block differs by it.
        return "text", json.dumps(body["messages"], ensure_ascii=False), 0
    prompt = body.get("prompt", body.get("input"))
    if isinstance(prompt, list) and prompt:
        if all(isinstance(token, int) for token in prompt):
            return "tokens", prompt, len(prompt)
        if all(isinstance(one, list) for one in prompt):
            ids = [token for one in prompt for token in one if isinstance(token, int)]
            return "tokens", ids, max(len(ids), 1)
        return "text", json.dumps(prompt, ensure_ascii=False), 0
    if isinstance(prompt, str):
        return "text", prompt, 0
    raise BadRequestError("the body has no prompt, messages or input")


def _blocks(data: bytes, size: int, chained: Any) -> tuple[bytes, ...]:
    hashes = []
    for start in range(0, len(data) - size + 1, size):
        chained.update(data[start : start + size])
        hashes.append(chained.copy().digest())
    return tuple(hashes)


def _identity(value: Any) -> int:
    """Return a number for a name: itself if it is a small one, else a hash; -1 for nobody."""
    if value is None or value == "":
        return -1
    if isinstance(value, int | float) and 0 <= value < 2**_ID_BITS:
        return int(value)
    digest = hashlib.blake2b(str(value).encode(errors="replace"), digest_size=_ID_BITS // 8).digest()
    return int.from_bytes(digest, "big")


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
