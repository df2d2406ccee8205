"""The policies of a deployment: which one decides about a request, which one only watches."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import servegym.engine_bridge.bundle  # noqa: F401 - makes bundles available by path
from servegym.baselines import interface as i
from servegym.baselines.interface import EngineViews, RequestView
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create_live
from servegym.engine_bridge.gateway.config import Mode
from servegym.engine_bridge.golden import draw_dispatch
from servegym.engine_bridge.router.guard import GuardedPolicy, Scored
from servegym.errors import InputError

_REMEMBERED = 64


@dataclass(slots=True)
class Arm:
    """A policy in service.

    Attributes:
        spec: what it is.
        version: counts the policies of a deployment.
        policy: it, with a heuristic behind it.
        trusted: its code is ours; other code runs in a thread, where it may hang.
    """

    spec: PolicySpec
    version: int
    policy: GuardedPolicy
    trusted: bool

    @property
    def name(self) -> str:
        """Name in logs and metrics."""
        return str(self.spec)


def make_arm(spec: PolicySpec, version: int, deadline_s: float, seed: int) -> Arm:
    """Make a policy ready for service.

    Raises:
        InputError: no such policy, a damaged bundle, or one that needs what only a simulator knows.
    """
    policy = create_live("engine", spec, seed)
    trusted = type(policy).__module__.startswith("servegym.")
    return Arm(spec, version, GuardedPolicy(policy, deadline_s), trusted)


def rehearse(arm: Arm, views: Sequence[tuple[RequestView, EngineViews]]) -> str:
    """Let a policy answer what was asked before; say why it cannot, empty if it can."""
    for number, (request, engines) in enumerate([views[0], *views]):
        reason = arm.policy.score(request, engines).fallback
        # The very first call may load or compile something, and be late for once.
        if reason and not (number == 0 and reason == "late"):
            return arm.policy.causes.get(reason, reason)
    arm.policy.fallbacks.clear()
    return ""


def check_policy(spec: PolicySpec, deadline_s: float) -> None:
    """Make sure that a policy can be loaded and answers a made-up request.

    Raises:
        InputError: it does not.
    """
    arm = make_arm(spec, 0, deadline_s, 0)
    reason = rehearse(arm, [_first_view()])
    if reason:
        raise InputError("policy", arm.name, f"fails on a made-up request ({reason})")


class Arms:
    """A policy and its baseline, and who of them decides.

    Args:
        policy: the one that is deployed.
        baseline: the one that acts where the other does not.
        mode: shadow, canary or full.
        percent: of sessions that a canary serves.
        deadline_s: for a decision.
        seed: for policies that draw.
    """

    def __init__(
        self, policy: PolicySpec, baseline: PolicySpec, mode: Mode, percent: float, deadline_s: float, seed: int = 0
    ) -> None:
        self.mode: Mode = mode
        self.percent = percent
        self._deadline_s = deadline_s
        self._seed = seed
        self._recent: deque[tuple[RequestView, EngineViews]] = deque(maxlen=_REMEMBERED)
        self._lane = _Lane()
        self.policy = make_arm(policy, 1, deadline_s, seed)
        self.baseline = make_arm(baseline, 0, deadline_s, seed)

    def recent(self) -> list[tuple[RequestView, EngineViews]]:
        """Return the last decisions' views; a made-up one before the first request."""
        return list(self._recent) or [_first_view()]

    def prepare(self, spec: PolicySpec, views: Sequence[tuple[RequestView, EngineViews]]) -> Arm:
        """Load a policy and let it answer what was asked before; may take its time, in any thread.

        Raises:
            InputError: it cannot be loaded, or fails on one of the views.
        """
        arm = make_arm(spec, self.policy.version + 1, self._deadline_s, self._seed)
        reason = rehearse(arm, views)
        if reason:
            raise InputError("policy", arm.name, f"fails on recorded requests ({reason}); the old one stays")
        return arm

    def install(self, arm: Arm, mode: Mode | None = None, percent: float | None = None) -> None:
        """Let a prepared policy take the place of the deployed one, from the next request on."""
        self.policy = arm
        self.mode = self.mode if mode is None else mode
        self.percent = self.percent if percent is None else percent

    def acting(self, session: int, request_id: str) -> tuple[Arm, Arm | None]:
        """Return who decides about a request and who watches; a session stays with the one that it met first."""
        if self.mode == "full":
            return self.policy, None
        if self.mode == "shadow":
            return self.baseline, self.policy
        key = str(session) if session >= 0 else request_id
        share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") / 2**32
        return (self.policy, None) if share * 100 < self.percent else (self.baseline, None)

    async def score(self, arm: Arm, request: RequestView, engines: EngineViews) -> Scored:
        """Return a policy's scores, or the fallback's once its time is over."""
        self._recent.append((request, engines))
        if arm.trusted:
            return arm.policy.score(request, engines)
        scored = await self._lane.run(arm.policy, request, engines, self._deadline_s)
        if isinstance(scored, Scored):
            return scored
        return arm.policy.fall_back(request, engines, scored, self._deadline_s)


class _Lane:
    """One thread for code that may hang: the loop waits for it until a deadline, and then goes on without it."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[
            tuple[GuardedPolicy, RequestView, EngineViews, asyncio.AbstractEventLoop, asyncio.Future[Scored]]
        ] = queue.SimpleQueue()
        self._busy: asyncio.Future[Scored] | None = None
        self._thread: threading.Thread | None = None

    async def run(
        self, policy: GuardedPolicy, request: RequestView, engines: EngineViews, deadline_s: float
    ) -> Scored | str:
        """Return the policy's scores, or why there are none."""
        if self._busy is not None and not self._busy.done():
            return "busy"
        if self._thread is None:
            # A daemon: a policy that never returns must not keep the process.
            self._thread = threading.Thread(target=self._work, name="policy", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        self._busy = loop.create_future()
        self._jobs.put((policy, request, engines, loop, self._busy))
        done, _ = await asyncio.wait({self._busy}, timeout=deadline_s)
        return self._busy.result() if done else "late"

    def _work(self) -> None:
        while True:
            policy, request, engines, loop, future = self._jobs.get()
            scored = policy.score(request, engines)
            if loop.is_closed():
                return
            loop.call_soon_threadsafe(future.set_result, scored)


def _first_view() -> tuple[RequestView, EngineViews]:
    """A decision for the rehearsal of a policy that comes before the first request."""
    row, matrix = draw_dispatch(np.random.default_rng(0))
    request = RequestView(
        index=0,
        now_s=float(row[i.R_NOW_S]),
        arrival_s=float(row[i.R_ARRIVAL_S]),
        prompt_tokens=int(row[i.R_PROMPT_TOKENS]),
        last_engine=int(row[i.R_LAST_ENGINE]),
    )
    return request, EngineViews(matrix)
