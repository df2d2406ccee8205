"""Join the shortest work: the lower bound that knows every output length."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from servegym.baselines.heuristic import TURN, Heuristic, only_available, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_PREFILL_TOKENS_PER_S,
    E_TRUE_OUTPUT_TOKENS,
    E_TRUE_PREFILL_TOKENS,
    R_LAST_ENGINE,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.registry import register
from servegym.configuration import Config


@register("engine", "jsw_oracle", source="join the shortest work (textbook; survey arXiv 1806.05444); weight ours")
class JswOracle(Heuristic):
    """The least unfinished work, with true output lengths: an oracle.

    ``score = (true_prefill_tokens + decode_weight * true_output_tokens) / prefill_tokens_per_s``, the work of all
    requests in flight there, in seconds. Equal engines take turns after the previous request's engine.
    """

    class Params(Config):
        """Parameters."""

        decode_weight: float = Field(20.0, ge=0, le=1e6, description="prefill tokens that one output token costs")

    needs_oracle: ClassVar[bool] = True
    params: Params

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the work in seconds, shape (engines,)."""
        tokens = engines.true_prefill_tokens + self.params.decode_weight * engines.true_output_tokens
        work = tokens / engines.prefill_tokens_per_s
        return only_available(engines, work + TURN * turns(len(engines), request.last_engine + 1))

    @staticmethod
    def compiled(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
        """Fill ``out`` with the scores."""
        count = engines.shape[0]
        first = int(request[R_LAST_ENGINE]) + 1
        for i in range(count):
            out[i] = float("inf")
            if engines[i, E_AVAILABLE] > 0.0:
                tokens = engines[i, E_TRUE_PREFILL_TOKENS] + params[0] * engines[i, E_TRUE_OUTPUT_TOKENS]
                work = tokens / engines[i, E_PREFILL_TOKENS_PER_S]
                out[i] = work + TURN * (i - first if i >= first else i - first + count)
