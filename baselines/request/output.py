"""Orders by output length: true (an oracle that only a simulator can grant) or predicted."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from pydantic import Field

from servegym.baselines.hashing import keyed_normal
from servegym.baselines.heuristic import RequestHeuristic
from servegym.baselines.interface import (
    Q_COMPUTED_TOKENS,
    Q_INDEX,
    Q_OUTPUT_TOKENS,
    Q_PREDICTED_TOKENS,
    Q_PROMPT_TOKENS,
    FloatArray,
    QueueView,
)
from servegym.baselines.registry import register
from servegym.configuration import Config


@register("request", "sjf_oracle", source="SSJF with perfect predictions, arXiv 2404.08509")
class SjfOracle(RequestHeuristic):
    """Shortest output first, by the true output length: what a perfect length predictor would give.

    ``score = output_tokens``; equal ones keep the order of the queue.
    """

    static: ClassVar[bool] = True
    needs_oracle: ClassVar[bool] = True

    def score(self, queue: QueueView) -> FloatArray:
        """Return the true output lengths, shape (waiting,)."""
        scores: FloatArray = queue.output_tokens.copy()
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        return item[Q_OUTPUT_TOKENS]  # type: ignore[no-any-return]


@register("request", "srpt_oracle", source="shortest remaining processing time (textbook); the weight is ours")
class SrptOracle(RequestHeuristic):
    """Least total work first: remaining prefill plus the true output, in prefill tokens.

    ``score = prompt_tokens - computed_tokens + decode_weight * output_tokens``.
    """

    class Params(Config):
        """Parameters."""

        decode_weight: float = Field(20.0, ge=0, le=1e6, description="prefill tokens that one output token costs")

    static: ClassVar[bool] = True
    needs_oracle: ClassVar[bool] = True
    params: Params

    def score(self, queue: QueueView) -> FloatArray:
        """Return the work of each request in prefill tokens, shape (waiting,)."""
        remaining = queue.prompt_tokens - queue.computed_tokens
        scores: FloatArray = remaining + self.params.decode_weight * queue.output_tokens
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        remaining = item[Q_PROMPT_TOKENS] - item[Q_COMPUTED_TOKENS]
        return remaining + params[0] * item[Q_OUTPUT_TOKENS]  # type: ignore[no-any-return]


@register("request", "sjf_predicted", source="SSJF, arXiv 2404.08509")
class SjfPredicted(RequestHeuristic):
    """Shortest predicted output first.

    ``score = predicted_tokens``, or ``unknown_tokens`` where the workload carries no prediction.
    """

    class Params(Config):
        """Parameters."""

        unknown_tokens: float = Field(256.0, ge=0, description="output length assumed without a prediction, tokens")

    static: ClassVar[bool] = True
    params: Params

    def score(self, queue: QueueView) -> FloatArray:
        """Return the predicted output lengths, shape (waiting,)."""
        predicted = queue.predicted_tokens
        scores: FloatArray = np.where(np.isnan(predicted), self.params.unknown_tokens, predicted)
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        predicted = item[Q_PREDICTED_TOKENS]
        return params[0] if np.isnan(predicted) else predicted  # type: ignore[no-any-return]


@register("request", "sjf_noisy", source="SJF under prediction error: bounds what a learned predictor can give; ours")
class SjfNoisy(RequestHeuristic):
    """Shortest output first, by the true output length times a log-normal error.

    ``score = output_tokens * exp(sigma * z)`` with a standard normal ``z`` that is keyed by the request, so that it is
    the same at each look, on each engine and under each policy.
    """

    class Params(Config):
        """Parameters."""

        sigma: float = Field(0.5, ge=0, le=10, description="standard deviation of the logarithm of the error")
        seed: int = Field(0, ge=0, lt=2**31, description="another seed, other errors")

    static: ClassVar[bool] = True
    needs_oracle: ClassVar[bool] = True
    params: Params

    def score(self, queue: QueueView) -> FloatArray:
        """Return the noisy output lengths, shape (waiting,)."""
        sigma, seed = self.params.sigma, self.params.seed
        errors = [math.exp(sigma * keyed_normal(int(index), seed)) for index in queue.index.tolist()]
        scores: FloatArray = queue.output_tokens * np.array(errors)
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        error = math.exp(params[0] * keyed_normal(int(item[Q_INDEX]), int(params[1])))
        return item[Q_OUTPUT_TOKENS] * error  # type: ignore[no-any-return]


@register("request", "svf", source="smallest volume first, arXiv 2606.22327; formula reconstructed")
class Svf(RequestHeuristic):
    """Smallest memory-time volume first: the KV cache that a request will hold, summed over its steps.

    ``score = o * prompt_tokens + o * (o + 1) / 2`` with ``o = predicted_tokens``, or ``unknown_tokens`` where the
    workload carries no prediction.
    """

    class Params(Config):
        """Parameters."""

        unknown_tokens: float = Field(256.0, ge=0, description="output length assumed without a prediction, tokens")

    static: ClassVar[bool] = True
    params: Params

    def score(self, queue: QueueView) -> FloatArray:
        """Return the volumes in token steps, shape (waiting,)."""
        output = np.where(np.isnan(queue.predicted_tokens), self.params.unknown_tokens, queue.predicted_tokens)
        scores: FloatArray = output * queue.prompt_tokens + output * (output + 1.0) / 2.0
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        output = params[0] if np.isnan(item[Q_PREDICTED_TOKENS]) else item[Q_PREDICTED_TOKENS]
        return output * item[Q_PROMPT_TOKENS] + output * (output + 1.0) / 2.0  # type: ignore[no-any-return]
