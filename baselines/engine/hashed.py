"""Dispatch by a hash of what requests share, bounded by load.

The key is the request's prefix key, else its session, else its user, else the request itself. Engines are ranked per
key by a hash of both (rendezvous hashing): as with a ring, an engine that comes or goes moves only its own keys.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from servegym.baselines.hashing import affinity_key, keyed_uniform
from servegym.baselines.heuristic import Heuristic, only_available
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_HIT_TOKENS,
    E_INFLIGHT,
    E_PREFILL_TOKENS,
    E_PREFILL_TOKENS_PER_S,
    R_DEADLINE_S,
    R_PROMPT_TOKENS,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register
from servegym.configuration import Config


def _places(request: RequestView, count: int) -> FloatArray:
    key = affinity_key(request.row())
    return np.array([keyed_uniform(key, i) for i in range(count)])


@register("engine", "chwbl", source="consistent hashing with bounded loads, arXiv 1608.01350; rendezvous, no ring")
class Chwbl(Heuristic):
    """The first engine in the key's order that is not overloaded.

    An engine is overloaded with ``ceil(bound * (sum inflight + 1) / engines)`` requests in flight or more. ``score`` is
    the engine's hash under the key, in (0, 1), and 1 more if it is overloaded.
    """

    class Params(Config):
        """Parameters; the default is the usual one."""

        bound: float = Field(1.25, ge=1, le=1e6, description="largest load over the mean")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the places, shape (engines,)."""
        open_engines = engines.available > 0
        total = np.where(open_engines, engines.inflight, 0.0).sum() + 1.0
        limit = math.ceil(self.params.bound * total / max(open_engines.sum(), 1))
        return only_available(engines, _places(request, len(engines)) + (engines.inflight >= limit))

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        total, present = 1.0, 0
        for i in range(engines.shape[0]):
            if engines[i, E_AVAILABLE] > 0.0:
                total += engines[i, E_INFLIGHT]
                present += 1
        limit = math.ceil(params[0] * total / max(present, 1))
        key = affinity_key(request)
        for i in range(engines.shape[0]):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                out[i] = keyed_uniform(key, i) + (1.0 if engines[i, E_INFLIGHT] >= limit else 0.0)


@register("engine", "dualmap", source="DualMap, arXiv 2602.06502; without its longer keys for hot prefixes")
class DualMap(Heuristic):
    """Two hashed candidates: the one that has more cached while its prefill keeps the TTFT objective, else the lighter.

    The candidates are the first two available engines in the key's order. With ``P = prefill_tokens +
    max(prompt_tokens - hit_tokens, 1)``, the one with more ``hit_tokens`` (the first, if equal) is chosen if ``P <=
    slo * prefill_tokens_per_s``, else the one with the smaller ``P / prefill_tokens_per_s``. ``slo`` is the request's
    deadline or ``slo_base_s + slo_s_per_1k * prompt_tokens / 1000``. ``score = P / prefill_tokens_per_s``, -1 for the
    affine candidate, infinity for others.
    """

    class Params(Config):
        """Parameters; the objective is that of SMetric's evaluation (arXiv 2607.08565)."""

        slo_base_s: float = Field(1.0, ge=0, le=1e6, description="TTFT objective of an empty prompt, seconds")
        slo_s_per_1k: float = Field(0.0625, ge=0, le=1e6, description="seconds more per 1,000 prompt tokens")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the prefill times of the two candidates, shape (engines,)."""
        scores = np.full(len(engines), np.inf)
        order = np.argsort(only_available(engines, _places(request, len(engines))), kind="stable")
        candidates = order[: min(2, int((engines.available > 0).sum()))]
        if len(candidates) == 0:
            return scores
        work = engines.prefill_tokens + np.maximum(request.prompt_tokens - engines.hit_tokens, 1.0)
        scores[candidates] = (work / engines.prefill_tokens_per_s)[candidates]
        affine = candidates[engines.hit_tokens[candidates].argmax()]
        objective = self.params.slo_base_s + self.params.slo_s_per_1k * request.prompt_tokens / 1000.0
        if scores[affine] <= (request.deadline_s if np.isfinite(request.deadline_s) else objective):
            scores[affine] = -1.0
        return scores

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        key = affinity_key(request)
        first, second = -1, -1
        lowest, next_lowest = np.inf, np.inf
        for i in range(engines.shape[0]):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                place = keyed_uniform(key, i)
                if place < lowest:
                    second, next_lowest = first, lowest
                    first, lowest = i, place
                elif place < next_lowest:
                    second, next_lowest = i, place
        affine = first
        if second >= 0 and engines[second, E_HIT_TOKENS] > engines[first, E_HIT_TOKENS]:
            affine = second
        for i in (first, second):
            if i >= 0:
                work = engines[i, E_PREFILL_TOKENS] + max(request[R_PROMPT_TOKENS] - engines[i, E_HIT_TOKENS], 1.0)
                out[i] = work / engines[i, E_PREFILL_TOKENS_PER_S]
        objective = params[0] + params[1] * request[R_PROMPT_TOKENS] / 1000.0
        if np.isfinite(request[R_DEADLINE_S]):
            objective = request[R_DEADLINE_S]
        if affine >= 0 and out[affine] <= objective:
            out[affine] = -1.0
