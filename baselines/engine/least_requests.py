"""Dispatch by the number of unfinished requests, which the router counts itself."""

from __future__ import annotations

import numpy as np

from servegym.baselines.heuristic import TURN, Heuristic, only_available, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_INFLIGHT,
    R_LAST_ENGINE,
    R_UNIFORM_0,
    R_UNIFORM_1,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register


@register("engine", "least_requests", source="join the shortest queue (textbook); ties as in nginx least_conn")
class LeastRequests(Heuristic):
    """The engine with the fewest requests in flight.

    ``score = inflight``. Equal engines take turns, beginning after the previous request's engine, so that an idle
    cluster is used evenly.
    """

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the requests in flight, shape (engines,)."""
        return only_available(engines, engines.inflight + TURN * turns(len(engines), request.last_engine + 1))

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0:
                out[i] = engines[i, E_INFLIGHT] + TURN * (i - first if i >= first else i - first + count)
            else:
                out[i] = np.inf


@register("engine", "power_of_two", source="Mitzenmacher 2001; survey arXiv 1806.05444")
class PowerOfTwo(Heuristic):
    """Of two different engines drawn at random, the one with fewer requests in flight.

    ``score = inflight`` for the two drawn by the request's uniform draws, infinity elsewhere; the first one drawn
    wins a tie.
    """

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the requests in flight at the two drawn engines, shape (engines,)."""
        scores = np.full(len(engines), np.inf)
        open_engines = np.flatnonzero(engines.available > 0)
        count = len(open_engines)
        if count == 0:
            return scores
        first = int(request.uniforms[0] * count)
        if count > 1:
            second = open_engines[(first + 1 + int(request.uniforms[1] * (count - 1))) % count]
            scores[second] = engines.inflight[second] + TURN
        scores[open_engines[first]] = engines.inflight[open_engines[first]]
        return scores

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = 0
        for i in range(engines.shape[0]):
            if engines[i, E_AVAILABLE] > 0.0:
                count += 1
        first = int(request[R_UNIFORM_0] * count)
        second = (first + 1 + int(request[R_UNIFORM_1] * (count - 1))) % max(count, 1)
        place = 0
        for i in range(engines.shape[0]):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                if place == first:
                    out[i] = engines[i, E_INFLIGHT]
                elif place == second:
                    out[i] = engines[i, E_INFLIGHT] + TURN
                place += 1
