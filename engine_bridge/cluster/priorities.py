"""Whether an engine heeds priorities. One with vLLM's default order takes them without a word, and ignores them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from servegym.engine_bridge.cluster.engine import ask_json

_REQUESTS, _APART_S = 16, 0.004
_PROMPT_TOKENS = 2048
_TIMEOUT_S = 60.0


def heeds_priorities(url: str, model: str) -> bool | None:
    """Find out whether an engine admits by priority; None if it cannot be told.

    Asks ``/server_info``, which an engine in development mode answers. Otherwise sends a burst of requests, each more
    urgent than the one before, and looks whether the later ones overtake: some seconds of work for an engine.
    """
    policy = _declared(url)
    if policy is not None:
        return policy == "priority"
    order = _finish_order(url, model)
    if order is None:
        return None
    ranks = np.argsort(order)
    correlation = float(np.corrcoef(np.arange(len(ranks)), ranks)[0, 1])
    return True if correlation < 0.5 else False if correlation > 0.9 else None


def _declared(url: str) -> str | None:
    answer = ask_json(f"{url}/server_info?config_format=json")
    try:
        return str(answer["vllm_config"]["scheduler_config"]["policy"])
    except (KeyError, TypeError):
        return None


def _finish_order(url: str, model: str) -> list[int] | None:
    """Send requests with falling priority numbers; return them in the order in which they ended."""
    models = ask_json(f"{url}/v1/models")
    try:
        longest = int(models["data"][0]["max_model_len"])
    except (KeyError, TypeError, IndexError, ValueError):
        longest = _PROMPT_TOKENS
    rng = np.random.default_rng()
    tokens = max(min(_PROMPT_TOKENS, longest - 8), 1)
    bodies = [
        {"model": model, "prompt": rng.integers(10, 200, tokens).tolist(), "max_tokens": 1, "priority": -number}
        for number in range(_REQUESTS)
    ]

    def one(number: int) -> float:
        time.sleep(number * _APART_S)
        answered = ask_json(f"{url}/v1/completions", bodies[number], _TIMEOUT_S) is not None
        return time.perf_counter() if answered else np.inf

    with ThreadPoolExecutor(_REQUESTS) as pool:
        ends = np.array(list(pool.map(one, range(_REQUESTS))))
    return np.argsort(ends).tolist() if np.isfinite(ends).all() else None
