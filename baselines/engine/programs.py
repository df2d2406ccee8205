"""Rules that weigh the reuse of a prefix or a session against load: Preble, SMetric, Autellix."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import TURN, Heuristic, only_available, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_HIT_TOKENS,
    E_INFLIGHT,
    E_INFLIGHT_PROMPT_TOKENS,
    E_KV_TOKENS,
    E_KV_USAGE,
    E_PREFILL_TOKENS,
    E_PREFILL_TOKENS_PER_S,
    E_SESSION_HOME,
    R_DEADLINE_S,
    R_LAST_ENGINE,
    R_PROMPT_TOKENS,
    R_TURN,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register
from servegym.configuration import Config

# Weight of the requests in flight between engines of equal match: below one token for fewer than 16,384 of them.
_TIE = 2.0**-14


@register("engine", "preble", source="Preble, arXiv 2407.00023 (E2); load in flight in place of its 3-minute window")
class Preble(Heuristic):
    """Exploit a match longer than the rest of the prompt, else explore by load, missed prefill and eviction.

    With ``missed = prompt_tokens - hit_tokens``: if the best ``hit_tokens`` exceeds what is missed there, ``score =
    -hit_tokens``. Else ``score = inflight_prompt_tokens + missed + max(0, missed - (1 - kv_usage) * kv_tokens)``: the
    work in flight, the prefill of this request, and what must be evicted for it. Equal engines take turns.
    """

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the deciding quantity in tokens, shape (engines,)."""
        missed = request.prompt_tokens - engines.hit_tokens
        best = np.where(engines.available > 0, engines.hit_tokens, 0.0).max(initial=0.0)
        if best > request.prompt_tokens - best:
            scores = _TIE * engines.inflight - engines.hit_tokens
        else:
            evicted = np.maximum(missed - (1.0 - engines.kv_usage) * engines.kv_tokens, 0.0)
            scores = engines.inflight_prompt_tokens + missed + evicted
        return only_available(engines, scores + TURN * turns(len(engines), request.last_engine + 1))

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        best = 0.0
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0:
                best = max(best, engines[i, E_HIT_TOKENS])
        for i in range(count):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                if best > request[R_PROMPT_TOKENS] - best:
                    score = _TIE * engines[i, E_INFLIGHT] - engines[i, E_HIT_TOKENS]
                else:
                    missed = request[R_PROMPT_TOKENS] - engines[i, E_HIT_TOKENS]
                    evicted = max(missed - (1.0 - engines[i, E_KV_USAGE]) * engines[i, E_KV_TOKENS], 0.0)
                    score = engines[i, E_INFLIGHT_PROMPT_TOKENS] + missed + evicted
                out[i] = score + TURN * (i - first if i >= first else i - first + count)


@register("engine", "smetric", source="SMetric, arXiv 2607.08565; formula of the first turn is LMetric's")
class SMetric(Heuristic):
    """First turns go by load, later ones to the best match while its predicted TTFT keeps the objective.

    With ``n = max(prompt_tokens - hit_tokens, 1)``: the predicted TTFT is ``(prefill_tokens + n) / prefill_tokens_per_s
    + c2 * n * (prompt_tokens - n / 2)``. A later turn goes to the engine with the most ``hit_tokens`` (``score = -1``)
    if that is at most ``slack`` times the objective: the request's deadline, or ``slo_base_s + slo_s_per_1k *
    prompt_tokens / 1000``. All others: ``score = (prefill_tokens + n) * (inflight + 1)``.
    """

    class Params(Config):
        """Parameters; the objective is the paper's."""

        slack: float = Field(1.0, gt=0, le=1e6, description="share of the objective that a stay may use")
        slo_base_s: float = Field(1.0, ge=0, le=1e6, description="TTFT objective of an empty prompt, seconds")
        slo_s_per_1k: float = Field(0.0625, ge=0, le=1e6, description="seconds more per 1,000 prompt tokens")
        c2: float = Field(0.0, ge=0, le=1, description="seconds of attention per pair of tokens")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the products, -1 at the engine to stay with, shape (engines,)."""
        computed = np.maximum(request.prompt_tokens - engines.hit_tokens, 1.0)
        work = engines.prefill_tokens + computed
        scores = work * (engines.inflight + 1.0) + TURN * turns(len(engines), request.last_engine + 1)
        hits = np.where(engines.available > 0, engines.hit_tokens, 0.0)
        if request.turn > 0 and hits.max(initial=0.0) > 0:
            best = int(hits.argmax())
            attention = self.params.c2 * computed[best] * (request.prompt_tokens - computed[best] / 2.0)
            objective = self.params.slo_base_s + self.params.slo_s_per_1k * request.prompt_tokens / 1000.0
            objective = request.deadline_s if np.isfinite(request.deadline_s) else objective
            if work[best] / engines.prefill_tokens_per_s[best] + attention <= self.params.slack * objective:
                scores[best] = -1.0
        return only_available(engines, scores)

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        prompt = request[R_PROMPT_TOKENS]
        best, hits = -1, 0.0
        for i in range(count):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                work = engines[i, E_PREFILL_TOKENS] + max(prompt - engines[i, E_HIT_TOKENS], 1.0)
                turn = TURN * (i - first if i >= first else i - first + count)
                out[i] = work * (engines[i, E_INFLIGHT] + 1.0) + turn
                if engines[i, E_HIT_TOKENS] > hits:
                    best, hits = i, engines[i, E_HIT_TOKENS]
        if request[R_TURN] > 0.0 and best >= 0:
            computed = max(prompt - hits, 1.0)
            attention = params[3] * computed * (prompt - computed / 2.0)
            objective = params[1] + params[2] * prompt / 1000.0
            if np.isfinite(request[R_DEADLINE_S]):
                objective = request[R_DEADLINE_S]
            work = engines[best, E_PREFILL_TOKENS] + computed
            if work / engines[best, E_PREFILL_TOKENS_PER_S] + attention <= params[0] * objective:
                out[best] = -1.0


@register("engine", "autellix", source="Autellix, arXiv 2502.13965 (load balancer)")
class Autellix(Heuristic):
    """Short prompts to the least used engine, long ones to the engine of their program (session).

    ``score = inflight``, equal engines in turn; -1 at the session's last engine if ``prompt_tokens`` is above
    ``long_tokens``.
    """

    class Params(Config):
        """Parameters; the default is the paper's."""

        long_tokens: float = Field(2048.0, ge=0, description="prompt length above which locality decides, tokens")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the requests in flight, -1 at home, shape (engines,)."""
        scores = engines.inflight + TURN * turns(len(engines), request.last_engine + 1)
        if request.prompt_tokens > self.params.long_tokens:
            scores[engines.session_home > 0] = -1.0
        return only_available(engines, scores)

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        for i in range(count):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                out[i] = engines[i, E_INFLIGHT] + TURN * (i - first if i >= first else i - first + count)
                if request[R_PROMPT_TOKENS] > params[0] and engines[i, E_SESSION_HOME] > 0.0:
                    out[i] = -1.0
