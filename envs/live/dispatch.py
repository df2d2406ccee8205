"""Who a replayed request is sent to: engines in turn, or as an engine policy wants it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Protocol

import aiohttp
import numpy as np
import numpy.typing as npt

import servegym.engine_bridge.bundle  # noqa: F401 - makes bundles available by path
from servegym.baselines.interface import RequestView
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create_live
from servegym.engine_bridge.router.choice import PolicyRouter
from servegym.engine_bridge.router.health import Health
from servegym.engine_bridge.router.table import EngineTable
from servegym.engine_bridge.router.telemetry import watch
from servegym.envs.live.options import LiveOptions
from servegym.envs.workloads.table import RequestTable
from servegym.errors import EngineError


class Dispatcher(Protocol):
    """Chooses engines and hears what becomes of the requests. Times are on the replay's clock."""

    async def dispatch(self, r: int, due_s: float, now_s: float, tokens: npt.NDArray[np.int64]) -> int:
        """Return the engine of request ``r``, which was due and is to be sent now; it may be made to wait."""

    def first_token(self, r: int, engine: int, now_s: float) -> None:
        """Hear of a first token."""

    def finished(self, r: int, engine: int, now_s: float, output_tokens: int, hit_tokens: int) -> None:
        """Hear of a request's end."""

    def lost(self, r: int) -> None:
        """Hear of a request's failure."""

    async def watch(self, session: aiohttp.ClientSession, urls: Sequence[str], start_s: float) -> None:
        """Look at the engines until cancelled."""


class InTurn:
    """Round robin by the order of sending."""

    def __init__(self, engines: int) -> None:
        self._engines = engines
        self._sent = 0

    async def dispatch(self, r: int, due_s: float, now_s: float, tokens: npt.NDArray[np.int64]) -> int:
        """Return the next engine."""
        self._sent += 1
        return (self._sent - 1) % self._engines

    def first_token(self, r: int, engine: int, now_s: float) -> None:
        """Nothing to learn."""

    def finished(self, r: int, engine: int, now_s: float, output_tokens: int, hit_tokens: int) -> None:
        """Nothing to learn."""

    def lost(self, r: int) -> None:
        """Nothing to learn."""

    async def watch(self, session: aiohttp.ClientSession, urls: Sequence[str], start_s: float) -> None:
        """Nothing to see."""


class ByPolicy:
    """The choice of a policy, on the router's counters and the engines' telemetry.

    Args:
        router: policy and engines.
        table: the requests.
        seed: of the draws that randomised policies use.
        period_s: between two readings of an engine's telemetry.
    """

    def __init__(self, router: PolicyRouter, table: RequestTable, seed: int = 0, period_s: float = 0.25) -> None:
        self.router = router
        self._table = table
        self._seed = seed
        self._period_s = period_s

    async def dispatch(self, r: int, due_s: float, now_s: float, tokens: npt.NDArray[np.int64]) -> int:
        """Return the policy's engine.

        Raises:
            EngineError: no engine is available.
        """
        request = request_view(self._table, r, len(tokens), due_s, now_s, self._seed, self.router.table.last_engine)
        engine = self.router.dispatch(request, block_hashes(tokens, self.router.table.prefixes.config.block_tokens))
        if engine < 0:
            raise EngineError("no engine answers")
        return engine

    def first_token(self, r: int, engine: int, now_s: float) -> None:
        """Tell the router."""
        self.router.first_token(r, engine, now_s)

    def finished(self, r: int, engine: int, now_s: float, output_tokens: int, hit_tokens: int) -> None:
        """Tell the router."""
        self.router.finished(r, engine, now_s, output_tokens)

    def lost(self, r: int) -> None:
        """Tell the router."""
        self.router.lost(r)

    async def watch(self, session: aiohttp.ClientSession, urls: Sequence[str], start_s: float) -> None:
        """Read the engines' telemetry."""
        table = self.router.table
        await watch(
            session, urls, table, Health(table), period_s=self._period_s, clock=lambda: time.perf_counter() - start_s
        )


def by_policy(spec: PolicySpec, table: RequestTable, options: LiveOptions, engines: int, seed: int = 0) -> ByPolicy:
    """Return the choice of a policy that begins to route now.

    Raises:
        InputError: no such policy, or one that needs what live engines do not know.
    """
    router = PolicyRouter(create_live("engine", spec, seed), EngineTable([options.limits] * engines))
    return ByPolicy(router, table, seed, options.telemetry_period_s)


def request_view(
    table: RequestTable, r: int, prompt_tokens: int, due_s: float, now_s: float, seed: int, last_engine: int
) -> RequestView:
    """Return what a router knows of a request."""
    draws = np.random.default_rng([seed, r]).random(2)
    return RequestView(
        index=r,
        now_s=now_s,
        arrival_s=due_s,
        prompt_tokens=prompt_tokens,
        priority=int(table.priority[r]),
        user=int(table.user[r]),
        session=int(table.session[r]),
        turn=int(table.turn[r]),
        deadline_s=float(table.deadline_s[r]),
        last_engine=last_engine,
        uniforms=(float(draws[0]), float(draws[1])),
    )


def block_hashes(tokens: npt.NDArray[np.int64], block_tokens: int, most: int = 256) -> list[bytes]:
    """Return a hash per full block of a prompt, of the block and all before it; of the first ``most`` blocks.

    >>> one, two = (block_hashes(np.array(row), 2) for row in ([1, 2, 3, 4, 5], [1, 2, 9, 4]))
    >>> len(one), one[0] == two[0], one[1] == two[1]
    (2, True, False)
    """
    hashes, so_far = [], hashlib.blake2b(digest_size=8)
    for block in range(min(len(tokens) // block_tokens, most)):
        so_far.update(tokens[block * block_tokens : (block + 1) * block_tokens].tobytes())
        hashes.append(so_far.copy().digest())
    return hashes
