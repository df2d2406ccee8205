"""A policy's choice of an engine, and what stands behind it when the policy fails.

A decision that raises, is not finite anywhere, has another shape or comes too late is replaced by that of
``least_requests`` and counted by its reason; the request goes on as if nothing had been.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from servegym.baselines.engine.least_requests import LeastRequests
from servegym.baselines.interface import EnginePolicy, EngineViews, RequestView, pick
from servegym.engine_bridge.router.table import EngineTable


class PolicyRouter:
    """Sends each request where an engine policy wants it.

    Args:
        policy: the policy.
        table: the engines.
        budget_s: time for a decision; a later one does not count.

    Attributes:
        table: the engines.
        fallbacks: decisions that the policy did not make, by reason.
        decisions: all decisions.
    """

    def __init__(self, policy: EnginePolicy, table: EngineTable, budget_s: float = 0.05) -> None:
        self.table = table
        self.fallbacks: Counter[str] = Counter()
        self.decisions = 0
        self._policy = policy
        self._fallback = LeastRequests()
        self._budget_s = budget_s
        self._hooks = {
            name: getattr(policy, name)
            for name in ("on_dispatch", "on_first_token", "on_finish")
            if callable(getattr(policy, name, None))
        }

    def dispatch(self, request: RequestView, blocks: Sequence[Hashable] = ()) -> int:
        """Choose the engine of a request and note that it goes there; -1 if no engine is available."""
        engines = self.table.view(request, blocks)
        self.decisions += 1
        engine = self._choose(request, engines)
        if engine >= 0:
            self.table.dispatched(request, engine, blocks)
            self._hook("on_dispatch", request, engine)
        return engine

    def first_token(self, index: int, engine: int, now_s: float) -> None:
        """Note a first token."""
        self.table.first_token(index, now_s)
        self._hook("on_first_token", index, engine, now_s)

    def finished(self, index: int, engine: int, now_s: float, output_tokens: int) -> None:
        """Note the end of a request."""
        self.table.finished(index, now_s, output_tokens)
        self._hook("on_finish", index, engine, now_s, output_tokens)

    def lost(self, index: int) -> None:
        """Note that a request has failed."""
        self.table.lost(index)

    def _choose(self, request: RequestView, engines: EngineViews) -> int:
        start = time.perf_counter()
        reason = ""
        try:
            scores = np.asarray(self._policy.score(request, engines), dtype=np.float64)
        except Exception as error:
            reason, scores = type(error).__name__, np.zeros(0)
        if not reason and scores.shape != (len(engines),):
            reason = "shape"
        if not reason and not np.isfinite(scores[engines.available > 0]).any() and (engines.available > 0).any():
            reason = "not finite"
        if not reason and time.perf_counter() - start > self._budget_s:
            reason = "late"
        if reason:
            self.fallbacks[reason] += 1
            scores = self._fallback.score(request, engines)
        return pick(scores, engines.available)

    def _hook(self, name: str, *arguments: object) -> None:
        if name in self._hooks:
            try:
                self._hooks[name](*arguments)
            except Exception as error:
                self.fallbacks[f"{name}: {type(error).__name__}"] += 1
