"""A request policy as a fixed integer priority, for engines that run vLLM's own priority scheduling.

A score that grows older by the same amount for every request, ``score = base - slope * wait``, orders a queue as
``base + slope * arrival`` does, which is known when the request arrives: ``slope * now`` is common to all. Whether a
policy is of that kind is found out by trying it.
"""

from __future__ import annotations

import math

import numpy as np

from servegym.baselines import interface as i
from servegym.baselines.interface import QueueView, RequestPolicy
from servegym.errors import InputError

_WAITS = np.array([0.0, 0.01, 0.5, 3.0, 20.0, 200.0, 3000.0])
_RESOLUTION = 1000.0
"""Priorities per unit of the score: a thousandth of a token, or a millisecond."""
_LIMIT = 2**62


class StaticKey:
    """Gives each request its integer priority, smaller first.

    Args:
        policy: request policy.
        name: of the policy, for messages.
        prefill_tokens_per_s: of the engines.

    Raises:
        InputError: the policy's order changes while requests wait, it reads what only an engine knows, or it sets more
            than an order.
    """

    def __init__(self, policy: RequestPolicy, name: str, prefill_tokens_per_s: float) -> None:
        if getattr(policy, "budget_share", None) is not None:
            raise InputError(
                "request_policy", name, "sets a token budget, which no priority can; allowed with our scheduler only"
            )
        self._policy = policy
        self._rate = prefill_tokens_per_s
        if getattr(policy, "needs_oracle", False) or getattr(policy, "served_weights", None) is not None:
            raise self._refusal(name)
        slopes = []
        for prompt, deadline, priority, predicted in ((1, 0.5, 0, 10), (300, math.inf, 0, 900), (9000, 5.0, 3, 50)):
            wait_scores = np.array([self._score(w, 0.0, prompt, priority, deadline, -1, predicted) for w in _WAITS])
            # The same request a hundred seconds later, on an engine that is full.
            later = self._score(0.0, 100.0, prompt, priority, deadline, -1, predicted, running=16, free_blocks=1)
            slope = (wait_scores[0] - wait_scores[-1]) / _WAITS[-1]
            line = wait_scores[0] - slope * _WAITS
            scale = max(float(np.abs(line).max()), 1.0)
            if not np.isfinite(wait_scores).all() or np.abs(wait_scores - line).max() > 1e-6 * scale:
                raise self._refusal(name)
            # A score that reads the arrival instead of the wait carries the slope in there.
            slopes.append(slope + (later - wait_scores[0]) / 100.0)
        if max(slopes) - min(slopes) > 1e-9 * max(1.0, abs(slopes[0])):
            raise self._refusal(name)
        self._slope = slopes[0]

    def key(
        self,
        arrival_s: float,
        prompt_tokens: int,
        priority: int = 0,
        deadline_s: float = math.inf,
        user: int = -1,
        predicted_tokens: float = math.nan,
    ) -> int:
        """Return the priority of a request that arrives at a time, the same clock for all.

        Without a finite score, for instance a prediction that is missing, the request goes last.
        """
        base = self._score(0.0, 0.0, prompt_tokens, priority, deadline_s, user, predicted_tokens)
        value = (base + self._slope * arrival_s) * _RESOLUTION
        return max(-_LIMIT, min(_LIMIT, round(value))) if math.isfinite(value) else _LIMIT

    def _score(
        self,
        wait: float,
        arrival: float,
        prompt: int,
        priority: int,
        deadline: float,
        user: int,
        predicted: float,
        running: int = 0,
        free_blocks: int = 1000,
    ) -> float:
        row = np.zeros((1, i.QUEUE_COLUMNS))
        row[0, [i.Q_WAIT_S, i.Q_PROMPT_TOKENS, i.Q_PRIORITY, i.Q_DEADLINE_S]] = wait, prompt, priority, deadline
        row[0, [i.Q_USER, i.Q_SESSION, i.Q_ARRIVAL_S, i.Q_PREDICTED_TOKENS]] = user, -1, arrival, predicted
        row[0, [i.Q_OUTPUT_TOKENS, i.Q_USER_SERVED]] = np.nan
        view = QueueView(row, arrival + wait, running, 16, free_blocks, 1000, 16, self._rate)
        return float(self._policy.score(view)[0])

    @staticmethod
    def _refusal(name: str) -> InputError:
        return InputError(
            "request_policy",
            name,
            "has no static key: its order changes while requests wait; allowed on engines without our scheduler:"
            " fcfs, priority, spf_aging, edf, sjf_predicted",
        )
