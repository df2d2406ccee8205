"""Orders by the deadline of the first token."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import RequestHeuristic
from servegym.baselines.interface import (
    C_PREFILL_TOKENS_PER_S,
    Q_ARRIVAL_S,
    Q_COMPUTED_TOKENS,
    Q_DEADLINE_S,
    Q_PROMPT_TOKENS,
    FloatArray,
    QueueView,
)
from servegym.baselines.registry import register
from servegym.configuration import Config


class Objective(Config):
    """The deadline of requests that bring none; the defaults are SMetric's (arXiv 2607.08565)."""

    slo_base_s: float = Field(1.0, ge=0, le=1e6, description="TTFT objective of an empty prompt, seconds")
    slo_s_per_1k: float = Field(0.0625, ge=0, le=1e6, description="seconds more per 1,000 prompt tokens")


def _due_s(queue: QueueView, params: Objective) -> FloatArray:
    """Return when the first token is due, shape (waiting,)."""
    objective = params.slo_base_s + params.slo_s_per_1k * queue.prompt_tokens / 1000.0
    due: FloatArray = queue.arrival_s + np.where(np.isfinite(queue.deadline_s), queue.deadline_s, objective)
    return due


@register("request", "edf", source="earliest deadline first, Liu and Layland 1973; as in SCORPIO, arXiv 2505.23022")
class Edf(RequestHeuristic):
    """Earliest deadline of the first token first.

    ``score = arrival_s + deadline_s``; without a deadline, ``slo_base_s + slo_s_per_1k * prompt_tokens / 1000`` in its
    place.
    """

    Params = Objective
    static: ClassVar[bool] = True
    params: Objective

    def score(self, queue: QueueView) -> FloatArray:
        """Return the deadlines, shape (waiting,)."""
        return _due_s(queue, self.params)

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        objective = params[0] + params[1] * item[Q_PROMPT_TOKENS] / 1000.0
        return item[Q_ARRIVAL_S] + (item[Q_DEADLINE_S] if np.isfinite(item[Q_DEADLINE_S]) else objective)  # type: ignore[no-any-return]


@register("request", "llf", source="least laxity first (textbook); as MFS, arXiv 2603.17456, approximates it")
class Llf(RequestHeuristic):
    """Least slack first: time to the deadline less the estimated remaining prefill.

    The slack is ``deadline - now - (prompt_tokens - computed_tokens) / prefill_tokens_per_s``, with the deadline of
    ``edf``. ``now`` is the same for all waiting requests and is left out, so that the score of a request never changes.
    """

    Params = Objective
    static: ClassVar[bool] = True
    params: Objective

    def score(self, queue: QueueView) -> FloatArray:
        """Return the slack at time 0, shape (waiting,)."""
        remaining = (queue.prompt_tokens - queue.computed_tokens) / queue.prefill_tokens_per_s
        scores: FloatArray = _due_s(queue, self.params) - remaining
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        objective = params[0] + params[1] * item[Q_PROMPT_TOKENS] / 1000.0
        due = item[Q_ARRIVAL_S] + (item[Q_DEADLINE_S] if np.isfinite(item[Q_DEADLINE_S]) else objective)
        remaining = (item[Q_PROMPT_TOKENS] - item[Q_COMPUTED_TOKENS]) / context[C_PREFILL_TOKENS_PER_S]
        return due - remaining  # type: ignore[no-any-return]
