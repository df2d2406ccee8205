"""Dispatch by a cascade of thresholds with user stickiness (arXiv 2602.21626)."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import TURN, Heuristic, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_INFLIGHT_PROMPT_TOKENS,
    E_KV_USAGE,
    E_USER_HOME,
    R_LAST_ENGINE,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register
from servegym.configuration import Config


@register("engine", "load_aware", source="arXiv 2602.21626 (DPLB); order of the cascade reconstructed")
class LoadAware(Heuristic):
    """KV-cache use, running load and user stickiness behind thresholds, as in the DPLB of arXiv 2602.21626.

    Candidates are the available engines with ``kv_usage < theta_k``, or all available ones if none is. The load is
    ``inflight_prompt_tokens``. Gaps are taken over the candidates; the first rule that applies decides:

    1. the user's last engine, if it is a candidate at most ``theta_diff`` in KV use and ``theta_load_tokens`` in load
       above the smallest;
    2. KV use differs by more than ``theta_diff``: the smallest KV use;
    3. the load differs by more than ``theta_load_tokens``: the smallest load;
    4. round robin after the previous request's engine, which also settles ties in 2 and 3.

    The score is the deciding quantity (the user's engine in rule 1 scores -1), infinity for engines that are no
    candidates. The paper publishes the thresholds and no formula; the cascade is reconstructed from its descriptions.
    """

    class Params(Config):
        """Parameters; the defaults are the paper's."""

        theta_k: float = Field(0.9, gt=0, le=1, description="KV use from which an engine counts as saturated, 0..1")
        theta_diff: float = Field(0.1, ge=0, le=1, description="tolerated gap of KV use, 0..1")
        theta_load_tokens: float = Field(3000.0, ge=0, description="tolerated gap of running load, prompt tokens")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the deciding quantity, shape (engines,)."""
        kv, load = engines.kv_usage, engines.inflight_prompt_tokens
        rotation = turns(len(engines), request.last_engine + 1)
        candidates = (engines.available > 0) & (kv < self.params.theta_k)
        if not candidates.any():
            candidates = engines.available > 0
        if not candidates.any():
            return np.full(len(engines), np.inf)
        kv_above = kv - kv[candidates].min()
        load_above = load - load[candidates].min()
        near_kv, near_load = kv_above <= self.params.theta_diff, load_above <= self.params.theta_load_tokens
        home = candidates & (engines.user_home > 0) & near_kv & near_load
        if home.any():
            scores = np.where(home, -1.0, rotation)
        elif not near_kv[candidates].all():
            scores = kv + TURN * rotation
        elif not near_load[candidates].all():
            scores = load + TURN * rotation
        else:
            scores = rotation
        return np.where(candidates, scores, np.inf)

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        theta_k = np.inf  # stays so if every available engine is saturated
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0 and engines[i, E_KV_USAGE] < params[0]:
                theta_k = params[0]
        min_kv, max_kv, min_load, max_load = np.inf, -np.inf, np.inf, -np.inf
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0 and engines[i, E_KV_USAGE] < theta_k:
                min_kv = min(min_kv, engines[i, E_KV_USAGE])
                max_kv = max(max_kv, engines[i, E_KV_USAGE])
                min_load = min(min_load, engines[i, E_INFLIGHT_PROMPT_TOKENS])
                max_load = max(max_load, engines[i, E_INFLIGHT_PROMPT_TOKENS])
        at_home = False
        for i in range(count):
            kv, load = engines[i, E_KV_USAGE], engines[i, E_INFLIGHT_PROMPT_TOKENS]
            near = kv - min_kv <= params[1] and load - min_load <= params[2]
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0 and kv < theta_k and near and engines[i, E_USER_HOME] > 0.0:
                at_home = True
                out[i] = -1.0
        for i in range(count):
            kv, load = engines[i, E_KV_USAGE], engines[i, E_INFLIGHT_PROMPT_TOKENS]
            if engines[i, E_AVAILABLE] > 0.0 and kv < theta_k and out[i] > 0.0:
                out[i] = i - first if i >= first else i - first + count
                if not at_home and max_kv - min_kv > params[1]:
                    out[i] = kv + TURN * out[i]
                elif not at_home and max_load - min_load > params[2]:
                    out[i] = load + TURN * out[i]
