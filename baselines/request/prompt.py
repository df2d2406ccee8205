"""Orders by prefill work, which is known when a request arrives."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import RequestHeuristic
from servegym.baselines.interface import (
    Q_ARRIVAL_S,
    Q_COMPUTED_TOKENS,
    Q_PROMPT_TOKENS,
    Q_WAIT_S,
    FloatArray,
    QueueView,
)
from servegym.baselines.registry import register
from servegym.configuration import Config

# Makes the older of two equally long prompts the smaller one, below the difference of one token for 115 days.
TOKENS_PER_WAIT_S = 1e-7


@register("request", "sjf_age", source="arXiv 2602.21626 (SJFS); tie-breaking reconstructed")
class SjfAge(RequestHeuristic):
    """Shortest prompt first; whoever waited longer than an age threshold goes first, oldest first.

    Ascending order of ``(0 if wait > theta_age else 1, arrival if promoted else prompt tokens, arrival)``, as one
    number: ``-wait_s`` if promoted, else ``prompt_tokens - 1e-7 * wait_s``. The paper gives the threshold and no
    formula; the key is the plainest one that fits its description.
    """

    class Params(Config):
        """Parameters; the default is the paper's."""

        theta_age_s: float = Field(5.0, gt=0, le=1e6, description="wait beyond which a request is promoted, seconds")

    params: Params

    def score(self, queue: QueueView) -> FloatArray:
        """Return the keys, shape (waiting,)."""
        wait = queue.wait_s
        scores: FloatArray = np.where(
            wait > self.params.theta_age_s, -wait, queue.prompt_tokens - TOKENS_PER_WAIT_S * wait
        )
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        wait = item[Q_WAIT_S]
        if wait > params[0]:
            return -wait  # type: ignore[no-any-return]
        return item[Q_PROMPT_TOKENS] - TOKENS_PER_WAIT_S * wait  # type: ignore[no-any-return]


@register("request", "spf_aging", source="Nexus, arXiv 2507.06608, Algorithm 2; gamma is ours")
class SpfAging(RequestHeuristic):
    """Shortest remaining prefill first, with linear aging.

    Nexus orders by ``remaining - gamma * age``. All waiting requests age alike, so ``remaining + gamma * arrival_s``
    with ``remaining = prompt_tokens - computed_tokens`` is the same order and does not change while a request waits.
    ``gamma = 0`` is plain shortest prefill first, a large one FCFS. Nexus publishes no value.
    """

    class Params(Config):
        """Parameters."""

        gamma: float = Field(100.0, ge=0, le=1e9, description="prefill tokens that one second of waiting is worth")

    static: ClassVar[bool] = True
    params: Params

    def score(self, queue: QueueView) -> FloatArray:
        """Return the keys, shape (waiting,)."""
        scores: FloatArray = queue.prompt_tokens - queue.computed_tokens + self.params.gamma * queue.arrival_s
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        remaining = item[Q_PROMPT_TOKENS] - item[Q_COMPUTED_TOKENS]
        return remaining + params[0] * item[Q_ARRIVAL_S]  # type: ignore[no-any-return]
