"""Gimbal-2: dispatch by a sum of pressure signals, that of the experts included."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import TURN, Heuristic, only_available, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_DISPATCHED_SINCE,
    E_KV_USAGE,
    E_MOE_PRESSURE,
    E_PREFILL_REQUESTS,
    E_PREFILL_TOKENS,
    E_WAITING,
    R_LAST_ENGINE,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register
from servegym.compilation import compiled
from servegym.configuration import Config

# Deviations below this share of the mean are rounding, not pressure.
_NOISE = 1e-9


@compiled
def _signal(engines: FloatArray, i: int, k: int) -> float:
    if k == 0:
        return engines[i, E_PREFILL_TOKENS]  # type: ignore[no-any-return]
    if k == 1:
        queued = engines[i, E_WAITING] + engines[i, E_DISPATCHED_SINCE]
        share = min(queued / max(engines[i, E_PREFILL_REQUESTS], 1.0), 1.0)
        return engines[i, E_PREFILL_TOKENS] * share  # type: ignore[no-any-return]
    return engines[i, E_KV_USAGE] if k == 2 else engines[i, E_MOE_PRESSURE]  # type: ignore[no-any-return]


@register("engine", "gimbal2", source="Gimbal-2, arXiv 2606.15177; sum of z-scores reconstructed")
class Gimbal2(Heuristic):
    """The smallest sum of z-scores of outstanding prefill, queued prefill, KV use and MoE pressure.

    ``score = sum_k w_k * (x_k - mean x_k) / std x_k`` over the available engines, for ``x`` = ``prefill_tokens``;
    ``prefill_tokens * min(1, (waiting + dispatched_since) / prefill_requests)``, the part of them not yet begun;
    ``kv_usage``; ``moe_pressure``. A signal that is equal everywhere counts nothing. Equal engines take turns.
    The paper names the signals and publishes no formula.
    """

    class Params(Config):
        """Parameters: the weights of the signals."""

        prefill: float = Field(1.0, ge=0, le=1e6, description="weight of outstanding prefill tokens")
        queued: float = Field(1.0, ge=0, le=1e6, description="weight of queued prefill tokens")
        kv: float = Field(1.0, ge=0, le=1e6, description="weight of KV use")
        moe: float = Field(1.0, ge=0, le=1e6, description="weight of MoE pressure")

    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the sums of z-scores, shape (engines,)."""
        open_engines = engines.available > 0
        pressure = np.zeros(len(engines))
        queued = engines.waiting + engines.dispatched_since
        share = np.minimum(queued / np.maximum(engines.prefill_requests, 1.0), 1.0)
        signals = (engines.prefill_tokens, engines.prefill_tokens * share, engines.kv_usage, engines.moe_pressure)
        for weight, signal in zip(self.compiled_params(), signals, strict=True):
            if not open_engines.any():
                break
            # Running sums add in the order of the compiled form; numpy's own sum does not.
            count = open_engines.sum()
            mean = np.cumsum(signal[open_engines])[-1] / count
            deviation = math.sqrt(np.cumsum((signal[open_engines] - mean) ** 2)[-1] / count)
            if deviation > _NOISE * (1.0 + abs(mean)):
                pressure += weight * (signal - mean) / deviation
        return only_available(engines, pressure + TURN * turns(len(engines), request.last_engine + 1))

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        present = 0
        for i in range(count):
            out[i] = np.inf
            if engines[i, E_AVAILABLE] > 0.0:
                out[i] = 0.0
                present += 1
        for k in range(4):
            total, squares = 0.0, 0.0
            for i in range(count):
                if engines[i, E_AVAILABLE] > 0.0:
                    total += _signal(engines, i, k)
            mean = total / max(present, 1)
            for i in range(count):
                if engines[i, E_AVAILABLE] > 0.0:
                    squares += (_signal(engines, i, k) - mean) * (_signal(engines, i, k) - mean)
            deviation = math.sqrt(squares / max(present, 1))
            if deviation > _NOISE * (1.0 + abs(mean)):
                for i in range(count):
                    if engines[i, E_AVAILABLE] > 0.0:
                        out[i] += params[k] * (_signal(engines, i, k) - mean) / deviation
        for i in range(count):
            out[i] += TURN * (i - first if i >= first else i - first + count)
