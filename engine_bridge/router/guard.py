"""A policy whose failures harm nobody.

A decision that raises, is not finite anywhere, has another shape or comes too late is replaced by that of
``least_requests`` and counted by its reason; the request goes on as if nothing had been.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from servegym.baselines.engine.least_requests import LeastRequests
from servegym.baselines.interface import EnginePolicy, EngineViews, FloatArray, RequestView
from servegym.baselines.user_code import blame

_FALLBACK = LeastRequests()
_logger = logging.getLogger("servegym.gateway")
_HOOKS = ("on_dispatch", "on_first_token", "on_finish")


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of engines.

    Attributes:
        scores: shape (engines,), the lowest is best.
        fallback: why they are not the policy's, empty if they are.
        seconds: that the policy took.
    """

    scores: FloatArray
    fallback: str
    seconds: float


class GuardedPolicy:
    """An engine policy with a heuristic behind it.

    Args:
        policy: the policy.
        budget_s: time for a decision; a later one does not count.

    Attributes:
        fallbacks: decisions and events that the policy did not cope with, by reason.
        causes: the first error behind a reason, with file and line where it is in the user's code.
    """

    def __init__(self, policy: EnginePolicy, budget_s: float) -> None:
        self.fallbacks: Counter[str] = Counter()
        self.causes: dict[str, str] = {}
        self._policy = policy
        self._budget_s = budget_s
        self._hooks = {name: getattr(policy, name) for name in _HOOKS if callable(getattr(policy, name, None))}

    def score(self, request: RequestView, engines: EngineViews) -> Scored:
        """Score engines for a request; never raises."""
        start = time.perf_counter()
        reason = ""
        try:
            scores = np.asarray(self._policy.score(request, engines), dtype=np.float64)
        except Exception as error:
            reason, scores = type(error).__name__, np.zeros(0)
            self._note(reason, error)
        seconds = time.perf_counter() - start
        open_ = engines.available > 0
        if not reason and scores.shape != (len(engines),):
            reason = "shape"
        if not reason and not np.isfinite(scores[open_]).any() and open_.any():
            reason = "not finite"
        if not reason and seconds > self._budget_s:
            reason = "late"
        return self.fall_back(request, engines, reason, seconds) if reason else Scored(scores, "", seconds)

    def fall_back(self, request: RequestView, engines: EngineViews, reason: str, seconds: float = 0.0) -> Scored:
        """Score by the heuristic, and count the reason."""
        self.fallbacks[reason] += 1
        return Scored(_FALLBACK.score(request, engines), reason, seconds)

    def tell(self, event: str, *arguments: object) -> None:
        """Call one of the policy's optional hooks."""
        if event in self._hooks:
            try:
                self._hooks[event](*arguments)
            except Exception as error:
                reason = f"{event}: {type(error).__name__}"
                self.fallbacks[reason] += 1
                self._note(reason, error)

    def _note(self, reason: str, error: Exception) -> None:
        if reason not in self.causes:
            self.causes[reason] = blame(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"
            _logger.warning("the policy fails, least_requests stands in: %s", self.causes[reason])
