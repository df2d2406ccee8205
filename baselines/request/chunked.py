"""Any order, in shorter steps: prefill in chunks of what a smaller token budget leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import RequestHeuristic, compiled_form
from servegym.baselines.interface import FloatArray, QueueView
from servegym.baselines.registry import create, register
from servegym.configuration import Config

_OF_THE_ORDER = ("static", "native", "needs_oracle", "reset")


@register("request", "chunked", source="chunked prefill: Sarathi-Serve, arXiv 2403.02310; the share is ours")
class Chunked(RequestHeuristic):
    """The order of another rule, with a share of the engine's token budget in each step.

    A step gives each running request its next token and the rest of the budget, ``max_num_batched_tokens`` in vLLM, to
    prefill. ``max(share * max_num_batched_tokens, max_num_seqs)`` instead makes shorter steps: TPOT falls, TTFT rises
    where prefill then queues.
    """

    class Params(Config):
        """Parameters."""

        inner: str = Field(default="fcfs", description="request policy that orders, as NAME or NAME,key=value")
        share: float = Field(default=0.5, gt=0, le=1, description="of the engine's token budget")

    params: Params

    def __init__(self, params: Params | None = None) -> None:
        super().__init__(params)
        self._inner: Any = create("request", self.params.inner)
        for name in _OF_THE_ORDER:
            if hasattr(self._inner, name):
                setattr(self, name, getattr(self._inner, name))

    @property
    def compiled(self) -> Callable[..., float]:
        """The compiled form of the order; AttributeError without one."""
        function: Callable[..., float] = self._inner.compiled
        return function

    def compiled_params(self) -> FloatArray:
        """Return what it reads."""
        form = compiled_form(self._inner)
        return np.zeros(0) if form is None else form[1]

    @property
    def budget_share(self) -> float | None:
        """Share of the engine's token budget that a step may use."""
        return self.params.share

    @property
    def served_weights(self) -> tuple[float, float] | None:
        """Weights of the column ``user_served``, as the order needs them."""
        weights: tuple[float, float] | None = getattr(self._inner, "served_weights", None)
        return weights

    def score(self, queue: QueueView) -> FloatArray:
        """Return the scores of the order, shape (waiting,)."""
        scores: FloatArray = self._inner.score(queue)
        return scores
