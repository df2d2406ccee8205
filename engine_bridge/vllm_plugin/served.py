"""What an engine has served its users, for fair orders of its queue (VTC, arXiv 2401.00588).

The rules are those of the simulator (:mod:`servegym.envs.simulator.kernel.served`): a user's counter grows by a weight
per prompt token at admission and by another per output token, and is lifted when the user comes back after a pause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from servegym.baselines.interface import Q_INDEX, Q_PROMPT_TOKENS, Q_USER, Q_USER_SERVED, FloatArray


class ServedCounters:
    """Counters of one engine's users; requests are vLLM's own.

    Args:
        weights: per prompt token and per output token.
        user_of: the user of a request.
    """

    def __init__(self, weights: tuple[float, float], user_of: Callable[[Any], float]) -> None:
        self.weights = weights
        self._user_of = user_of
        self._served: dict[float, float] = {}
        self._queued: Counter[float] = Counter()
        self._waiting: dict[str, float] = {}
        self._admitted: dict[str, tuple[Any, float, int]] = {}
        self._last = np.nan  # the user who was admitted last

    def wait(self, request: Any) -> None:
        """Note that a request waits; a user without any other is lifted to the least of those who have some."""
        if request.request_id in self._waiting or request.request_id in self._admitted:
            return
        user = self._waiting[request.request_id] = self._user_of(request)
        if self._queued[user] == 0:
            others = [self._served[other] for other, count in self._queued.items() if count > 0]
            lowest = min(others) if others else self._served.get(self._last, 0.0)
            self._served[user] = max(self._served.get(user, 0.0), lowest)
        self._queued[user] += 1

    def gone(self, request: Any) -> None:
        """Note that a request was taken back while it waited."""
        user = self._waiting.pop(request.request_id, None)
        if user is not None:
            self._queued[user] -= 1

    def update(self, running: Iterable[Any]) -> None:
        """Charge what has been admitted and generated since the last call; call it before and after each schedule."""
        prompt_weight, output_weight = self.weights
        now_running = set()
        for request in running:
            now_running.add(request.request_id)
            if request.request_id not in self._admitted:
                self.wait(request)
                user = self._waiting.pop(request.request_id)
                self._queued[user] -= 1
                self._served[user] += prompt_weight * request.num_prompt_tokens
                self._admitted[request.request_id] = (request, user, 0)
                self._last = user
        for name, (request, user, charged) in list(self._admitted.items()):
            generated = int(request.num_output_tokens)
            self._served[user] += output_weight * (generated - charged)
            self._admitted[name] = (request, user, generated)
            if name not in now_running and request.is_finished():
                del self._admitted[name]

    def fill(self, rows: FloatArray) -> None:
        """Write the counters as they will stand when a user's earlier waiting requests have been admitted.

        Args:
            rows: of ``Q_*`` entries, in any order, shape (waiting, QUEUE_COLUMNS).
        """
        standing = dict(self._served)
        for place in np.argsort(rows[:, Q_INDEX]):
            row = rows[place]
            user = float(row[Q_USER])
            row[Q_USER_SERVED] = standing.setdefault(user, 0.0)
            standing[user] += self.weights[0] * row[Q_PROMPT_TOKENS]
