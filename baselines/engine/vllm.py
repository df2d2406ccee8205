"""vLLM's own load balancer over data-parallel engines, in three versions of ``v1/engine/core_client.py``.

vLLM's front end keeps the counts of the last snapshot (every 100 ms) and corrects them after each choice until the
next one arrives. ``dispatched_since`` is what those corrections add up to, so the rules need no state of their own. One
front end (``client_count = 1``) is assumed. None of them looks at prompt lengths or prefix caches.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.heuristic import TURN, Heuristic, only_available, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_DISPATCHED,
    E_DISPATCHED_SINCE,
    E_INFLIGHT,
    E_KV_USAGE,
    E_RUNNING,
    E_WAITING,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register

# Makes (waiting, running) one number; no engine runs that many requests.
LEXICOGRAPHIC = 1e6


@register("engine", "vllm", source="vLLM 0.32, v1/engine/core_client.py, DPLBAsyncMPClient")
class Vllm(Heuristic):
    """vLLM 0.32: unfinished requests, with waiting ones weighted by the pressure on the KV cache.

    With ``W = waiting + dispatched_since``: ``score = max(inflight, W + running) + 6 * W * max(0, kv_usage - 0.5)``.
    The scan begins one engine later each time, so of equal engines the first from ``sum(dispatched) mod engines`` on
    wins.
    """

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the loads, shape (engines,)."""
        waiting = engines.waiting + engines.dispatched_since
        load = np.maximum(engines.inflight, waiting + engines.running)
        load = load + waiting * 6.0 * np.maximum(0.0, engines.kv_usage - 0.5)
        return only_available(engines, load + TURN * turns(len(engines), int(engines.dispatched.sum())))

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        dispatched = 0
        for i in range(count):
            dispatched += int(engines[i, E_DISPATCHED])
        first = dispatched % max(count, 1)
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0:
                waiting = engines[i, E_WAITING] + engines[i, E_DISPATCHED_SINCE]
                load = max(engines[i, E_INFLIGHT], waiting + engines[i, E_RUNNING])
                load += waiting * 6.0 * max(0.0, engines[i, E_KV_USAGE] - 0.5)
                out[i] = load + TURN * (i - first if i >= first else i - first + count)
            else:
                out[i] = np.inf


@register("engine", "vllm_2025_11", source="vLLM, v1/engine/core_client.py at commit 2c0c7c39")
class Vllm2025p11(Heuristic):
    """vLLM of late 2025: waiting requests count four times as much as running ones.

    ``score = 4 * (waiting + dispatched_since) + running``; the first of equal engines wins.
    """

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the weighted counts, shape (engines,)."""
        return only_available(engines, 4.0 * (engines.waiting + engines.dispatched_since) + engines.running)

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        for i in range(engines.shape[0]):
            if engines[i, E_AVAILABLE] > 0.0:
                waiting = engines[i, E_WAITING] + engines[i, E_DISPATCHED_SINCE]
                out[i] = 4.0 * waiting + engines[i, E_RUNNING]
            else:
                out[i] = np.inf


@register("engine", "vllm_0_9", source="vLLM 0.9.0, v1/engine/core_client.py, DPAsyncMPClient")
class Vllm0p9(Heuristic):
    """vLLM 0.9: fewest waiting requests, then fewest running ones.

    Lexicographic minimum of ``(waiting, running)``. A request sent since the snapshot counts as waiting where the
    snapshot had waiting requests, else as running. ``score = 1e6 * waiting + running``; the first of equal engines
    wins.
    """

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the keys, shape (engines,)."""
        queued = engines.waiting > 0
        waiting = engines.waiting + np.where(queued, engines.dispatched_since, 0.0)
        running = engines.running + np.where(queued, 0.0, engines.dispatched_since)
        return only_available(engines, LEXICOGRAPHIC * waiting + running)

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        for i in range(engines.shape[0]):
            if engines[i, E_AVAILABLE] > 0.0:
                waiting = engines[i, E_WAITING]
                running = engines[i, E_RUNNING]
                if waiting > 0.0:
                    waiting += engines[i, E_DISPATCHED_SINCE]
                else:
                    running += engines[i, E_DISPATCHED_SINCE]
                out[i] = LEXICOGRAPHIC * waiting + running
            else:
                out[i] = np.inf
