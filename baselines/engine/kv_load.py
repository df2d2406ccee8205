"""Dispatch by the tokens in the KV caches: BalanceRoute and Llumnix.

Both take the load ``L = max(kv_usage * kv_tokens, inflight_prompt_tokens)``: telemetry knows the generated tokens, the
router's own counter the prompts that were sent since.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.heuristic import TURN, Heuristic, only_available, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_INFLIGHT,
    E_INFLIGHT_PROMPT_TOKENS,
    E_KV_TOKENS,
    E_KV_USAGE,
    R_LAST_ENGINE,
    R_PROMPT_TOKENS,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register


def _load(engines: EngineViews) -> FloatArray:
    load: FloatArray = np.maximum(engines.kv_usage * engines.kv_tokens, engines.inflight_prompt_tokens)
    return load


@register("engine", "br0", source="BalanceRoute BR-0, arXiv 2605.06113; ties are ours")
class Br0(Heuristic):
    """The engine where the request adds least to the barrier of all engines.

    In lockstep every step waits for the heaviest engine. ``score = G * max(s - m, 0) - s`` with ``s = prompt_tokens``,
    ``m = max L - L_i`` the room below the heaviest of the ``G`` available engines. The paper leaves open which of the
    engines with enough room is chosen; here the one with the most, equal ones in turn.
    """

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the growth of the barrier's waste in tokens, shape (engines,)."""
        load = _load(engines)
        open_engines = engines.available > 0
        room = np.where(open_engines, load, 0.0).max(initial=0.0) - load
        growth = open_engines.sum() * np.maximum(request.prompt_tokens - room, 0.0) - request.prompt_tokens
        rotation = turns(len(engines), request.last_engine + 1)
        return only_available(engines, growth + 2.0**-24 * load + TURN * rotation)

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        prompt = request[R_PROMPT_TOKENS]
        heaviest, present = 0.0, 0
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0:
                load = max(engines[i, E_KV_USAGE] * engines[i, E_KV_TOKENS], engines[i, E_INFLIGHT_PROMPT_TOKENS])
                heaviest = max(heaviest, load)
                present += 1
        for i in range(count):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                load = max(engines[i, E_KV_USAGE] * engines[i, E_KV_TOKENS], engines[i, E_INFLIGHT_PROMPT_TOKENS])
                growth = present * max(prompt - (heaviest - load), 0.0) - prompt
                out[i] = growth + 2.0**-24 * load + TURN * (i - first if i >= first else i - first + count)


@register("engine", "llumnix", source="Llumnix (OSDI 2024), arXiv 2406.03243; without its live migration")
class Llumnix(Heuristic):
    """The greatest freeness: free KV tokens per request of the batch, queued prompts taken as used.

    ``score = -(kv_tokens - L) / max(inflight, 1)``. Equal engines take turns. Llumnix also moves running requests
    between engines, which vLLM cannot.
    """

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the negated freeness in tokens per request, shape (engines,)."""
        freeness = (engines.kv_tokens - _load(engines)) / np.maximum(engines.inflight, 1.0)
        return only_available(engines, TURN * turns(len(engines), request.last_engine + 1) - freeness)

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        for i in range(count):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                load = max(engines[i, E_KV_USAGE] * engines[i, E_KV_TOKENS], engines[i, E_INFLIGHT_PROMPT_TOKENS])
                freeness = (engines[i, E_KV_TOKENS] - load) / max(engines[i, E_INFLIGHT], 1.0)
                out[i] = TURN * (i - first if i >= first else i - first + count) - freeness
