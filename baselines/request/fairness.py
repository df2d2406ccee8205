"""Fair orders among users."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import RequestHeuristic
from servegym.baselines.interface import Q_USER_SERVED, FloatArray, QueueView
from servegym.baselines.registry import register
from servegym.configuration import Config


@register("request", "vtc", source="VTC, arXiv 2401.00588")
class Vtc(RequestHeuristic):
    """The user who was served least goes first, by weighted prompt and output tokens.

    ``score = user_served``: the user's virtual counter on this engine, which grows by ``prompt_weight`` per prompt
    token at admission and by ``output_weight`` per generated token, plus the charge for the user's earlier waiting
    requests, so that ordering once a step admits as the paper does one by one. A user who comes back after a pause is
    lifted to the least counter of the users who wait (kept by the simulator or the engine). Equal ones, and all where
    nobody keeps counters, go in order of arrival.
    """

    class Params(Config):
        """Parameters; the defaults are the paper's."""

        prompt_weight: float = Field(1.0, ge=0, le=1e6, description="cost of a prompt token")
        output_weight: float = Field(2.0, ge=0, le=1e6, description="cost of an output token")

    params: Params

    @property
    def served_weights(self) -> tuple[float, float]:
        """Weights (prompt token, output token) of the column ``user_served``."""
        return self.params.prompt_weight, self.params.output_weight

    def score(self, queue: QueueView) -> FloatArray:
        """Return the virtual counters, shape (waiting,)."""
        scores: FloatArray = np.where(np.isnan(queue.user_served), 0.0, queue.user_served)
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        served = item[Q_USER_SERVED]
        return 0.0 if np.isnan(served) else served
