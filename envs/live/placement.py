"""The expert level of a live run: counts are read and experts moved while the engines serve."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from servegym.baselines.interface import ExpertPolicy
from servegym.engine_bridge.experts import LiveExperts


class LivePlacement:
    """Places the experts of engines anew, again and again, each engine's by a policy of its own.

    Args:
        urls: servers of the engines, which were started with ``experts: true``.
        policies: one per engine.
        period_s: between two looks at the counts.

    Attributes:
        replacements: placements that were changed.
        moved: experts that ranks received.
    """

    def __init__(self, urls: Sequence[str], policies: Sequence[ExpertPolicy], period_s: float) -> None:
        self.replacements = self.moved = 0
        self._engines = list(zip(map(LiveExperts, urls), policies, strict=True))
        self._period_s = period_s

    async def run(self) -> None:
        """Go on until cancelled.

        Raises:
            EngineError: an engine does not count, or refuses a placement.
            InputError: a policy wants replicas, which only vLLM's own EPLB can serve.
        """
        await asyncio.gather(*(asyncio.to_thread(experts.start) for experts, _ in self._engines))
        while True:
            await asyncio.sleep(self._period_s)
            for experts, policy in self._engines:
                await asyncio.to_thread(self._look, experts, policy)

    def _look(self, experts: LiveExperts, policy: ExpertPolicy) -> None:
        load = experts.load()
        if not load.tokens.any():
            return
        experts.start()
        wanted = policy.place(load, experts.placement())
        if wanted is not None:
            self.moved += sum(experts.place(wanted))
            self.replacements += 1
