"""LMetric: the product of prefill work and batch size."""

from __future__ import annotations

import numpy as np

from servegym.baselines.heuristic import TURN, Heuristic, only_available, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_HIT_TOKENS,
    E_INFLIGHT,
    E_PREFILL_TOKENS,
    R_LAST_ENGINE,
    R_PROMPT_TOKENS,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register


@register("engine", "lmetric", source="LMetric, arXiv 2603.15202")
class LMetric(Heuristic):
    """The smallest product of prefill work and batch size, both with this request included.

    ``score = P * B`` with ``P = prefill_tokens + max(prompt_tokens - hit_tokens, 1)``, the uncomputed prompt tokens
    there, and ``B = inflight + 1``. Both come from the router's own counters, which are exact: a request in flight is
    either waiting or running, so ``inflight`` is the paper's batch size W + R without the telemetry's lag;
    ``prefill_tokens`` counts a prompt in full until its first token. The paper counts the new request in P only; with
    ``B = inflight`` all idle engines would tie at zero whatever they have cached, so B counts it too, and at least one
    token is always computed, as in vLLM. Equal engines take turns after the previous request's engine.
    """

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the products, shape (engines,)."""
        prefill = engines.prefill_tokens + np.maximum(request.prompt_tokens - engines.hit_tokens, 1.0)
        product = prefill * (engines.inflight + 1.0)
        return only_available(engines, product + TURN * turns(len(engines), request.last_engine + 1))

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0:
                prefill = engines[i, E_PREFILL_TOKENS] + max(request[R_PROMPT_TOKENS] - engines[i, E_HIT_TOKENS], 1.0)
                product = prefill * (engines[i, E_INFLIGHT] + 1.0)
                out[i] = product + TURN * (i - first if i >= first else i - first + count)
            else:
                out[i] = np.inf
