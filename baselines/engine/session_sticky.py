"""Dispatch to the engine that holds the session's, or the user's, KV cache."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import TURN, Heuristic, only_available, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_INFLIGHT,
    E_SESSION_HOME,
    E_USER_HOME,
    R_LAST_ENGINE,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register
from servegym.configuration import Config


@register("engine", "session_sticky", source="session affinity (llm-d, SGLang routers); SMetric, arXiv 2607.08565")
class SessionSticky(Heuristic):
    """The session's last engine, else the user's last engine, else the one with the fewest requests in flight.

    A home scores -2 (session) or -1 (user), any other engine ``inflight``, with turns between equal ones. A home that
    is unavailable, or has more than ``max_gap`` requests in flight above the least loaded engine, is no home.
    """

    class Params(Config):
        """Parameters."""

        max_gap: int | None = Field(None, ge=0, description="requests above the least loaded; none: stick always")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the scores, shape (engines,)."""
        inflight = only_available(engines, engines.inflight)
        limit = np.inf if self.params.max_gap is None else inflight.min(initial=np.inf) + self.params.max_gap
        fits = inflight <= limit
        scores = inflight + TURN * turns(len(engines), request.last_engine + 1)
        scores[fits & (engines.user_home > 0)] = -1.0
        scores[fits & (engines.session_home > 0)] = -2.0
        return only_available(engines, scores)

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        lowest = np.inf
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0:
                lowest = min(lowest, engines[i, E_INFLIGHT])
        for i in range(count):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                fits = engines[i, E_INFLIGHT] <= lowest + params[0]
                if fits and engines[i, E_SESSION_HOME] > 0.0:
                    out[i] = -2.0
                elif fits and engines[i, E_USER_HOME] > 0.0:
                    out[i] = -1.0
                else:
                    out[i] = engines[i, E_INFLIGHT] + TURN * (i - first if i >= first else i - first + count)
