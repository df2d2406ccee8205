"""Orders that weigh the wait against the size of a request, so that nobody starves."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import RequestHeuristic
from servegym.baselines.interface import (
    C_PREFILL_TOKENS_PER_S,
    Q_COMPUTED_TOKENS,
    Q_PREDICTED_TOKENS,
    Q_PROMPT_TOKENS,
    Q_WAIT_S,
    FloatArray,
    QueueView,
)
from servegym.baselines.registry import register
from servegym.configuration import Config


@register("request", "hrrn", source="highest response ratio next, Brinch Hansen 1971 (textbook); the weight is ours")
class Hrrn(RequestHeuristic):
    """Highest response ratio first: (wait + service) / service, free of starvation.

    ``score = -(wait_s + s) / s`` with the predicted service time
    ``s = (prompt_tokens - computed_tokens + decode_weight * predicted_tokens) / prefill_tokens_per_s``, in which
    ``unknown_tokens`` stands for a missing prediction.
    """

    class Params(Config):
        """Parameters."""

        decode_weight: float = Field(20.0, ge=0, le=1e6, description="prefill tokens that one output token costs")
        unknown_tokens: float = Field(256.0, ge=1, description="output length assumed without a prediction, tokens")

    static: ClassVar[bool] = False
    params: Params

    def score(self, queue: QueueView) -> FloatArray:
        """Return the negated response ratios, shape (waiting,)."""
        predicted = np.where(np.isnan(queue.predicted_tokens), self.params.unknown_tokens, queue.predicted_tokens)
        work = np.maximum(queue.prompt_tokens - queue.computed_tokens, 1.0) + self.params.decode_weight * predicted
        service = work / queue.prefill_tokens_per_s
        scores: FloatArray = -(queue.wait_s + service) / service
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        predicted = params[1] if np.isnan(item[Q_PREDICTED_TOKENS]) else item[Q_PREDICTED_TOKENS]
        work = max(item[Q_PROMPT_TOKENS] - item[Q_COMPUTED_TOKENS], 1.0) + params[0] * predicted
        service = work / context[C_PREFILL_TOKENS_PER_S]
        return -(item[Q_WAIT_S] + service) / service  # type: ignore[no-any-return]


@register("request", "ewsjf", source="EWSJF, arXiv 2601.21758; score of its vLLM change; bucket width is ours")
class Ewsjf(RequestHeuristic):
    """Longest wait first, per bucket of the prompt length and with a bonus for long prompts.

    ``score = -wait_s * (1 + weight * ln(prompt_tokens + 1)) * step / (prompt_tokens // step + 1)``. The paper finds its
    buckets online; here all are ``step_tokens`` wide.
    """

    class Params(Config):
        """Parameters; the weight is the authors'."""

        weight: float = Field(0.5, ge=0, le=1e3, description="weight of the logarithm of the prompt length")
        step_tokens: float = Field(512.0, gt=0, description="width of a bucket of prompt lengths, tokens")

    params: Params

    def score(self, queue: QueueView) -> FloatArray:
        """Return the negated scores of the paper, shape (waiting,)."""
        step = self.params.step_tokens
        logarithm = np.array([math.log(tokens + 1.0) for tokens in queue.prompt_tokens.tolist()])
        bonus = 1.0 + self.params.weight * logarithm
        scores: FloatArray = -queue.wait_s * bonus * step / (np.floor(queue.prompt_tokens / step) + 1.0)
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        bonus = 1.0 + params[0] * math.log(item[Q_PROMPT_TOKENS] + 1.0)
        bucket = math.floor(item[Q_PROMPT_TOKENS] / params[1]) + 1.0
        return -item[Q_WAIT_S] * bonus * params[1] / bucket  # type: ignore[no-any-return]
