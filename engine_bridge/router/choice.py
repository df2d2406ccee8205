"""A policy's choice of engines for a stream of requests, kept in one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from servegym.baselines.interface import EnginePolicy, RequestView, pick
from servegym.engine_bridge.router.guard import GuardedPolicy
from servegym.engine_bridge.router.table import EngineTable


class PolicyRouter:
    """Sends each request where an engine policy wants it.

    Args:
        policy: the policy.
        table: the engines.
        budget_s: time for a decision; a later one does not count.

    Attributes:
        table: the engines.
        decisions: all decisions.
    """

    def __init__(self, policy: EnginePolicy, table: EngineTable, budget_s: float = 0.05) -> None:
        self.table = table
        self.decisions = 0
        self._policy = GuardedPolicy(policy, budget_s)

    @property
    def fallbacks(self) -> Counter[str]:
        """Decisions that the policy did not make, by reason."""
        return self._policy.fallbacks

    def dispatch(self, request: RequestView, blocks: Sequence[Hashable] = ()) -> int:
        """Choose the engine of a request and note that it goes there; -1 if no engine is available."""
        engines = self.table.view(request, blocks)
        self.decisions += 1
        engine = pick(self._policy.score(request, engines).scores, engines.available)
        if engine >= 0:
            self.table.dispatched(request, engine, blocks)
            self._policy.tell("on_dispatch", request, engine)
        return engine

    def first_token(self, index: int, engine: int, now_s: float) -> None:
        """Note a first token."""
        self.table.first_token(index, now_s)
        self._policy.tell("on_first_token", index, engine, now_s)

    def finished(self, index: int, engine: int, now_s: float, output_tokens: int) -> None:
        """Note the end of a request."""
        self.table.finished(index, now_s, output_tokens)
        self._policy.tell("on_finish", index, engine, now_s, output_tokens)

    def lost(self, index: int) -> None:
        """Note that a request has failed."""
        self.table.lost(index)
