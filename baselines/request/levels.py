"""Multi-level feedback queues."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import RequestHeuristic
from servegym.baselines.interface import (
    C_PREFILL_TOKENS_PER_S,
    Q_ARRIVAL_S,
    Q_COMPUTED_TOKENS,
    Q_PREEMPTIONS,
    Q_PROMPT_TOKENS,
    Q_WAIT_S,
    FloatArray,
    QueueView,
)
from servegym.baselines.registry import register
from servegym.baselines.request.arrival import CLASS_WIDTH_S
from servegym.configuration import Config

_LEVELS = 24  # the last one has no end


@register("request", "mlfq", source="FastServe, arXiv 2305.05920 (skip-join); values of vllm-ltr, mlfq_scheduler.py")
class Mlfq(RequestHeuristic):
    """Lowest level first: the level whose quantum covers the prefill time; who starves rises to the top.

    Level ``k`` has the quantum ``quantum_s * factor^k``; a request joins the first one that covers
    ``(prompt_tokens - computed_tokens) / prefill_tokens_per_s`` and stands one lower for each preemption. Whoever
    waited longer than ``starvation_s`` stands at level 0. ``score = level * 1e7 s + arrival_s``.

    FastServe also stops a running request at the end of its quantum. vLLM cannot without computing it anew, so here the
    levels order the waiting queue only.
    """

    class Params(Config):
        """Parameters; the defaults are vllm-ltr's."""

        quantum_s: float = Field(0.01, gt=0, description="quantum of the first level, seconds")
        factor: float = Field(2.0, gt=1, le=100, description="quantum of a level over that of the one before")
        starvation_s: float = Field(3.0, gt=0, description="wait beyond which a request rises to the top, seconds")

    params: Params

    def score(self, queue: QueueView) -> FloatArray:
        """Return the keys, shape (waiting,)."""
        prefill_s = (queue.prompt_tokens - queue.computed_tokens) / queue.prefill_tokens_per_s
        level, quantum = queue.preemptions.copy(), self.params.quantum_s
        for _ in range(_LEVELS):
            level += prefill_s > quantum
            quantum *= self.params.factor
        level = np.where(queue.wait_s > self.params.starvation_s, 0.0, level)
        scores: FloatArray = level * CLASS_WIDTH_S + queue.arrival_s
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        if item[Q_WAIT_S] > params[2]:
            return item[Q_ARRIVAL_S]  # type: ignore[no-any-return]
        prefill_s = (item[Q_PROMPT_TOKENS] - item[Q_COMPUTED_TOKENS]) / context[C_PREFILL_TOKENS_PER_S]
        level, quantum = item[Q_PREEMPTIONS], params[0]
        for _ in range(_LEVELS):
            if prefill_s > quantum:
                level += 1.0
            quantum *= params[1]
        return level * CLASS_WIDTH_S + item[Q_ARRIVAL_S]  # type: ignore[no-any-return]
