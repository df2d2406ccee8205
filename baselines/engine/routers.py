"""Prefix- and load-aware rules of production routers: Dynamo, llm-d, SGLang, Ray Serve.

``hit_tokens`` and ``index_tokens`` come from the router's approximate prefix index. Where a rule takes the best match,
equal ones go by requests in flight, then in turn.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import TURN, Heuristic, only_available, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_HIT_TOKENS,
    E_INDEX_TOKENS,
    E_INFLIGHT,
    E_INFLIGHT_PROMPT_TOKENS,
    E_KV_TOKENS,
    E_KV_USAGE,
    E_PREFILL_TOKENS,
    E_WAITING,
    R_LAST_ENGINE,
    R_PROMPT_TOKENS,
    R_UNIFORM_0,
    R_UNIFORM_1,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register
from servegym.configuration import Config

# Weight of the requests in flight between engines of equal match: below one token for fewer than 16,384 of them.
_TIE = 2.0**-14


@register("engine", "dynamo", source="NVIDIA Dynamo, docs/design-docs/router-design.md (KV router)")
class Dynamo(Heuristic):
    """Smallest sum of blocks to prefill, less those cached, and blocks that decoding requests hold.

    ``cost = prefill_scale * max(p - credit * h, 0) + d`` in blocks: ``p = (prefill_tokens + prompt_tokens) / block``
    and ``h = hit_tokens / block``; ``d = max(kv_usage * kv_tokens, inflight_prompt_tokens) / block``. At temperature 0
    the least cost wins, equal ones in turn; above, the engine is drawn by the request's first uniform draw with
    probability proportional to ``exp(-cost / (temperature * (max cost - min cost)))`` and scores -1.
    """

    class Params(Config):
        """Parameters; the defaults are Dynamo's."""

        credit: float = Field(1.0, ge=0, le=1e3, description="credit of a cached block")
        prefill_scale: float = Field(1.0, ge=0, le=1e6, description="cost of a block to prefill over one held")
        temperature: float = Field(0.0, ge=0, le=1e6, description="0: least cost; larger: more evenly drawn")
        block_tokens: float = Field(16.0, gt=0, description="tokens per block")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the costs in blocks, shape (engines,)."""
        block = self.params.block_tokens
        prefill = (engines.prefill_tokens + request.prompt_tokens - self.params.credit * engines.hit_tokens) / block
        held = np.maximum(engines.kv_usage * engines.kv_tokens, engines.inflight_prompt_tokens) / block
        costs = self.params.prefill_scale * np.maximum(prefill, 0.0) + held
        open_engines = np.flatnonzero(engines.available > 0)
        scores = only_available(engines, costs + TURN * turns(len(engines), request.last_engine + 1))
        if self.params.temperature > 0 and len(open_engines):
            open_costs = costs[open_engines].tolist()
            span = self.params.temperature * (max(open_costs) - min(open_costs))
            weights = [math.exp((min(open_costs) - cost) / span) if span > 0 else 1.0 for cost in open_costs]
            reached = np.cumsum(weights)
            drawn = min(int((reached <= request.uniforms[0] * reached[-1]).sum()), len(weights) - 1)
            scores[open_engines[drawn]] = -1.0
        return scores

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        lowest, highest = np.inf, -np.inf
        for i in range(count):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                tokens = engines[i, E_PREFILL_TOKENS] + request[R_PROMPT_TOKENS] - params[0] * engines[i, E_HIT_TOKENS]
                held = max(engines[i, E_KV_USAGE] * engines[i, E_KV_TOKENS], engines[i, E_INFLIGHT_PROMPT_TOKENS])
                out[i] = params[1] * max(tokens / params[3], 0.0) + held / params[3]
                lowest, highest = min(lowest, out[i]), max(highest, out[i])
        drawn = -1
        if params[2] > 0.0 and lowest < np.inf:
            span = params[2] * (highest - lowest)
            total = 0.0
            for i in range(count):
                if out[i] < np.inf:
                    total += math.exp((lowest - out[i]) / span) if span > 0.0 else 1.0
            reached = 0.0
            for i in range(count):
                if out[i] < np.inf and (drawn < 0 or reached <= request[R_UNIFORM_0] * total):
                    reached += math.exp((lowest - out[i]) / span) if span > 0.0 else 1.0
                    drawn = i
        for i in range(count):
            out[i] += TURN * (i - first if i >= first else i - first + count)
        if drawn >= 0:
            out[drawn] = -1.0


@register("engine", "llm_d", source="llm-d inference scheduler, epplib _config.yaml at commit 520af478")
class LlmD(Heuristic):
    """Weighted sum of scores: short queue, free KV cache and cached prefix.

    ``score = -(queue * (max W - W) / (max W - min W) + kv * (1 - kv_usage) + prefix * hit_tokens / prompt_tokens)``
    with ``W = waiting``; the queue's part is ``queue`` where all queues are equally long. Equal engines take turns.
    All of its load signals are telemetry, as in llm-d.
    """

    class Params(Config):
        """Parameters; the defaults are llm-d's."""

        queue: float = Field(2.0, ge=0, le=1e6, description="weight of the queue")
        kv: float = Field(2.0, ge=0, le=1e6, description="weight of the free KV cache")
        prefix: float = Field(3.0, ge=0, le=1e6, description="weight of the cached prefix")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the negated sums, shape (engines,)."""
        open_engines = engines.available > 0
        longest = np.where(open_engines, engines.waiting, -np.inf).max(initial=-np.inf)
        span = longest - np.where(open_engines, engines.waiting, np.inf).min(initial=np.inf)
        queue = (longest - engines.waiting) / span if span > 0 else np.ones(len(engines))
        total = self.params.queue * queue + self.params.kv * (1.0 - engines.kv_usage)
        total = total + self.params.prefix * engines.hit_tokens / request.prompt_tokens
        return only_available(engines, TURN * turns(len(engines), request.last_engine + 1) - total)

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        shortest, longest = np.inf, -np.inf
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0:
                shortest = min(shortest, engines[i, E_WAITING])
                longest = max(longest, engines[i, E_WAITING])
        for i in range(count):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                queue = (longest - engines[i, E_WAITING]) / (longest - shortest) if longest > shortest else 1.0
                total = params[0] * queue + params[1] * (1.0 - engines[i, E_KV_USAGE])
                total += params[2] * engines[i, E_HIT_TOKENS] / request[R_PROMPT_TOKENS]
                out[i] = TURN * (i - first if i >= first else i - first + count) - total


@register("engine", "sglang", source="SGLang router, sgl-router/src/policies (cache-aware)")
class SgLang(Heuristic):
    """The best prefix match, or the smallest cache without a good one; the shortest queue while loads are uneven.

    With the smallest and largest ``inflight`` of the available engines: if ``max - min > abs_gap`` and ``max >
    rel_gap * min``, ``score = inflight``; else, if the best ``hit_tokens / prompt_tokens`` is above ``match``,
    ``score = -hit_tokens``; else ``score = index_tokens``, the size of the engine's part of the prefix index.
    """

    class Params(Config):
        """Parameters; the defaults are those of SGLang's library."""

        match: float = Field(0.5, ge=0, le=1, description="share of the prompt from which a match decides")
        abs_gap: float = Field(32.0, ge=0, description="tolerated difference of requests in flight")
        rel_gap: float = Field(1.1, ge=0, description="tolerated ratio of requests in flight")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the deciding quantity, shape (engines,)."""
        open_engines = engines.available > 0
        most = np.where(open_engines, engines.inflight, -np.inf).max(initial=-np.inf)
        least = np.where(open_engines, engines.inflight, np.inf).min(initial=np.inf)
        best = np.where(open_engines, engines.hit_tokens, 0.0).max(initial=0.0)
        if most - least > self.params.abs_gap and most > self.params.rel_gap * least:
            scores = engines.inflight
        elif best > self.params.match * request.prompt_tokens:
            scores = _TIE * engines.inflight - engines.hit_tokens
        else:
            scores = engines.index_tokens + _TIE * engines.inflight
        return only_available(engines, scores + TURN * turns(len(engines), request.last_engine + 1))

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        least, most, best = np.inf, -np.inf, 0.0
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0:
                least, most = min(least, engines[i, E_INFLIGHT]), max(most, engines[i, E_INFLIGHT])
                best = max(best, engines[i, E_HIT_TOKENS])
        uneven = most - least > params[1] and most > params[2] * least
        for i in range(count):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                if uneven:
                    score = engines[i, E_INFLIGHT]
                elif best > params[0] * request[R_PROMPT_TOKENS]:
                    score = _TIE * engines[i, E_INFLIGHT] - engines[i, E_HIT_TOKENS]
                else:
                    score = engines[i, E_INDEX_TOKENS] + _TIE * engines[i, E_INFLIGHT]
                out[i] = score + TURN * (i - first if i >= first else i - first + count)


@register("engine", "ray_prefix", source="Ray Serve, prefix-aware request router")
class RayPrefix(Heuristic):
    """The best prefix match, or the smallest cache without a good one; two random choices while loads are uneven.

    If ``max inflight - min inflight`` is below ``gap``: ``score = -hit_tokens`` where the best ``hit_tokens /
    prompt_tokens`` is at least ``match``, else ``score = index_tokens``. Otherwise the rule of ``power_of_two``.
    """

    class Params(Config):
        """Parameters; the defaults are those of Ray's first version."""

        gap: float | None = Field(10.0, ge=0, description="tolerated difference of requests in flight; none: any")
        match: float = Field(0.1, ge=0, le=1, description="share of the prompt from which a match decides")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the deciding quantity, shape (engines,)."""
        open_engines = np.flatnonzero(engines.available > 0)
        count = len(open_engines)
        if count == 0:
            return np.full(len(engines), np.inf)
        inflight = engines.inflight[open_engines]
        best = engines.hit_tokens[open_engines].max()
        if self.params.gap is not None and inflight.max() - inflight.min() >= self.params.gap:
            scores = np.full(len(engines), np.inf)
            first = int(request.uniforms[0] * count)
            if count > 1:
                second = (first + 1 + int(request.uniforms[1] * (count - 1))) % count
                scores[open_engines[second]] = inflight[second] + TURN
            scores[open_engines[first]] = inflight[first]
            return scores
        if best >= self.params.match * request.prompt_tokens:
            scores = _TIE * engines.inflight - engines.hit_tokens
        else:
            scores = engines.index_tokens + _TIE * engines.inflight
        return only_available(engines, scores + TURN * turns(len(engines), request.last_engine + 1))

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        rotation = int(request[R_LAST_ENGINE]) + 1
        least, most, best, present = np.inf, -np.inf, 0.0, 0
        for i in range(count):
            if engines[i, E_AVAILABLE] > 0.0:
                least, most = min(least, engines[i, E_INFLIGHT]), max(most, engines[i, E_INFLIGHT])
                best = max(best, engines[i, E_HIT_TOKENS])
                present += 1
        first = int(request[R_UNIFORM_0] * present)
        second = (first + 1 + int(request[R_UNIFORM_1] * (present - 1))) % max(present, 1)
        place = 0
        for i in range(count):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                turn = TURN * (i - rotation if i >= rotation else i - rotation + count)
                if most - least >= params[0]:
                    if place == first:
                        out[i] = engines[i, E_INFLIGHT]
                    elif place == second:
                        out[i] = engines[i, E_INFLIGHT] + TURN
                elif best >= params[1] * request[R_PROMPT_TOKENS]:
                    out[i] = _TIE * engines[i, E_INFLIGHT] - engines[i, E_HIT_TOKENS] + turn
                else:
                    out[i] = engines[i, E_INDEX_TOKENS] + _TIE * engines[i, E_INFLIGHT] + turn
                place += 1
