"""Dispatch that looks at nothing but which engines are there."""

from __future__ import annotations

import numpy as np

from servegym.baselines.heuristic import Heuristic, only_available, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    R_LAST_ENGINE,
    R_UNIFORM_0,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register


@register("engine", "random", source="textbook")
class Random(Heuristic):
    """An available engine chosen uniformly at random.

    With ``k = floor(u * m)`` for the request's first uniform draw ``u`` and ``m`` available engines, the k-th of them
    scores 0 and those after it, cyclically, 1, 2, ...
    """

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return each engine's place after the drawn one, shape (engines,)."""
        scores = np.full(len(engines), np.inf)
        open_engines = np.flatnonzero(engines.available > 0)
        scores[open_engines] = turns(len(open_engines), int(request.uniforms[0] * len(open_engines)))
        return scores

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = 0
        for i in range(engines.shape[0]):
            if engines[i, E_AVAILABLE] > 0.0:
                count += 1
        drawn = int(request[R_UNIFORM_0] * count)
        place = 0
        for i in range(engines.shape[0]):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                out[i] = (place - drawn) % count
                place += 1


@register("engine", "round_robin", source="textbook")
class RoundRobin(Heuristic):
    """The available engines in turn.

    ``score = (i - last_engine - 1) mod engines``: the first available engine after the previous request's.
    """

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return each engine's place in the rotation, shape (engines,)."""
        return only_available(engines, turns(len(engines), request.last_engine + 1))

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        for i in range(count):
            place = i - first if i >= first else i - first + count
            out[i] = place if engines[i, E_AVAILABLE] > 0.0 else np.inf
