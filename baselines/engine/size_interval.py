"""SITA: each engine serves the prompts of one interval of sizes, so that short ones do not wait behind long ones."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import TURN, Heuristic
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_HIT_TOKENS,
    E_INFLIGHT,
    E_INFLIGHT_PROMPT_TOKENS,
    E_PREFILL_TOKENS,
    E_PREFILL_TOKENS_PER_S,
    R_LAST_ENGINE,
    R_PROMPT_TOKENS,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register
from servegym.configuration import Config

# Keeps what is outside of an engine's interval behind whatever backlog there is inside.
_OUTSIDE = 2.0**40


@register("engine", "sita", source="SITA: Harchol-Balter, Crovella, Murta, JPDC 59(2), 1999; relative cutoffs ours")
class Sita(Heuristic):
    """Size intervals while requests queue, LMetric while they do not.

    With ``z = (ln(prompt / mean prompt in flight) - shift) / sigma`` and ``n`` available engines, a request's place is
    ``n / (1 + exp(-1.702 z))``, about ``n`` times the normal distribution's value: the first engine takes the shortest
    prompts, the last the longest. Engines whose interval is at most ``spread`` engines from that place compete by
    outstanding prefill tokens. While the engines' mean backlog of prefill is below ``queue_s`` seconds, the score
    is LMetric's. The paper draws its cutoffs from a known distribution of sizes.
    """

    class Params(Config):
        """Parameters."""

        shift: float = Field(0.0, ge=-5, le=5, description="where the middle cutoff lies, ln of the mean prompt")
        sigma: float = Field(1.0, gt=0, le=10, description="how far cutoffs lie apart, ln tokens")
        spread: float = Field(0.0, ge=0, le=64, description="engines beyond the interval that may serve it")
        queue_s: float = Field(0.1, ge=0, le=100, description="backlog from which on sizes decide, seconds")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the scores, shape (engines,)."""
        scores = np.empty(len(engines))
        self.compiled(request.row(), engines.data, self.compiled_params(), scores)
        return scores

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        shift, sigma, spread, queue_s = params[0], params[1], params[2], params[3]
        count, prompt, first = engines.shape[0], request[R_PROMPT_TOKENS], int(request[R_LAST_ENGINE]) + 1
        present, backlog_s, prompts, inflight = 0, 0.0, prompt, 1.0
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0:
                present += 1
                backlog_s += engines[i, E_PREFILL_TOKENS] / engines[i, E_PREFILL_TOKENS_PER_S]
                prompts += engines[i, E_INFLIGHT_PROMPT_TOKENS]
                inflight += engines[i, E_INFLIGHT]
        z = (math.log(prompt * inflight / prompts) - shift) / sigma
        place = present / (1.0 + math.exp(-1.702 * max(min(z, 20.0), -20.0)))
        j = 0
        for i in range(count):
            if engines[i, E_AVAILABLE] <= 0.0:
                out[i] = np.inf
                continue
            turn = TURN * (i - first if i >= first else i - first + count)
            if backlog_s < queue_s * present:
                work = engines[i, E_PREFILL_TOKENS] + prompt - min(engines[i, E_HIT_TOKENS], prompt - 1.0)
                out[i] = work * (engines[i, E_INFLIGHT] + 1.0) + turn
            else:
                beyond = max(abs(j + 0.5 - place) - 0.5 - spread, 0.0)
                out[i] = _OUTSIDE * beyond + engines[i, E_PREFILL_TOKENS] + turn
            j += 1
