"""The decisions of a gateway: admission, engine, priority; and what it learns from what became of them."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from servegym.baselines.interface import E_AVAILABLE, E_INFLIGHT, EngineViews, FloatArray, RequestView
from servegym.engine_bridge.gateway.arms import Arm, Arms
from servegym.engine_bridge.gateway.config import PRIORITY, DeployConfig
from servegym.engine_bridge.gateway.decision_log import DecisionLog, DecisionRecord
from servegym.engine_bridge.gateway.incoming import PATHS, BadRequestError, ParsedRequest, parse
from servegym.engine_bridge.gateway.messages import Decision, IncomingRequest, Outcome, Progress
from servegym.engine_bridge.gateway.metrics import GatewayMetrics
from servegym.engine_bridge.gateway.recent import RecentTraffic
from servegym.engine_bridge.gateway.static_key import StaticKey
from servegym.engine_bridge.router.guard import Scored
from servegym.engine_bridge.router.health import Health
from servegym.engine_bridge.router.table import EngineTable

_SESSIONS = 100_000
_FORGET_S = 3600.0
# Priorities of restarted gateways follow each other; a young epoch leaves digits for their fractions.
_EPOCH_S = 1_760_000_000.0
_TEXT_WEIGHT = 0.02


@dataclass(slots=True)
class _Flight:
    """A request that was decided about and has not ended."""

    index: int
    engine: int
    order: tuple[int, ...]
    parsed: ParsedRequest
    arm: Arm
    record: DecisionRecord
    first_token: bool = False


class Gateway:
    """Decides about requests before live engines.

    All methods are for one asyncio loop.

    Args:
        config: settings.
        endpoints: of the engines, ``host:port``; "" is a place for one that may come (:meth:`found`).
        arms: the policies.
        log: of decisions.
        metrics: where they are counted.
        static_key: priority of requests, if the engines take one.
        on_health: called when the set of engines that may be sent to has changed.
    """

    def __init__(
        self,
        config: DeployConfig,
        endpoints: Sequence[str],
        arms: Arms,
        log: DecisionLog,
        metrics: GatewayMetrics,
        static_key: StaticKey | None = None,
        on_health: Callable[[], None] = lambda: None,
    ) -> None:
        self._endpoints = list(endpoints)
        self.urls = [f"http://{endpoint}" for endpoint in endpoints]
        self.arms = arms
        self.table = EngineTable([config.engine] * len(endpoints), config.prefix)
        vacant = [engine for engine, endpoint in enumerate(endpoints) if not endpoint]
        self.health = Health(self.table, lambda engine: on_health(), vacant)
        self.metrics = metrics
        self.recent = RecentTraffic()
        self._config = config
        self._log = log
        self._static_key = static_key
        self._engine_of = {endpoint: engine for engine, endpoint in enumerate(endpoints) if endpoint}
        self._flights: dict[str, _Flight] = {}
        self._turns: OrderedDict[int, int] = OrderedDict()
        self._count = 0
        self._rotation = 0
        self._start_s = time.monotonic()
        self._chars_per_token = config.chars_per_token
        self._one_at_a_time = asyncio.Lock()
        metrics.watch(self.table, self.health, self._endpoints, self.now)

    def now(self) -> float:
        """Return seconds on the gateway's clock."""
        return time.monotonic() - self._start_s

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The engines, in the order of the table; "" where there is none."""
        return tuple(self._endpoints)

    @property
    def in_flight(self) -> int:
        """Requests that were sent on and have not ended."""
        return len(self._flights)

    def healthy_endpoints(self) -> tuple[str, ...]:
        """Return the engines that may be sent to; all of them if none may."""
        open_ = tuple(e for n, e in enumerate(self._endpoints) if self.health.available(n))
        return open_ or tuple(e for n, e in enumerate(self._endpoints) if self.health.present(n))

    def found(self, endpoints: Collection[str]) -> tuple[str, ...]:
        """Take note of which engines there are.

        One that is gone gets nothing new, and keeps its place until its requests have ended; it may come back to it.

        Returns:
            Those for which there is no place.
        """
        for engine, endpoint in enumerate(self._endpoints):
            there = endpoint in endpoints
            if there and not self.health.present(engine):
                self.health.join(engine)
            elif not there and self.health.present(engine):
                self.health.leave(engine)
        return tuple(
            endpoint for endpoint in sorted(set(endpoints) - set(self._endpoints)) if not self._place(endpoint)
        )

    def _place(self, endpoint: str) -> bool:
        """Give an engine a place whose last one is gone and has no requests left; whether there is one."""
        for engine in range(len(self._endpoints)):
            if not self.health.present(engine) and self.table.data[engine, E_INFLIGHT] == 0:
                self._engine_of.pop(self._endpoints[engine], None)
                self._engine_of[endpoint] = engine
                self._endpoints[engine], self.urls[engine] = endpoint, f"http://{endpoint}"
                self.table.renew(engine)
                self.health.join(engine, anew=True)
                return True
        return False

    async def decide(self, request: IncomingRequest) -> Decision:
        """Say where a request goes, or what it is answered; never raises."""
        if not _generates(request.path):
            return self._elsewhere(request)
        begun = time.perf_counter()
        limits = self._config.limits
        if len(request.body) > limits.body_mib * 2**20:
            return self._refuse(413, "too large", f"the body is larger than {limits.body_mib} MiB")
        prefix = self._config.prefix
        try:
            parsed = parse(
                request,
                prefix.block_tokens,
                prefix.max_match_blocks,
                self._chars_per_token,
                round(prefix.block_tokens * self._config.chars_per_token),
            )
        except BadRequestError as error:
            return self._refuse(400, "bad request", str(error))
        most = limits.in_flight * (limits.low_priority_share if parsed.priority > 0 else 1.0)
        if len(self._flights) >= most:
            return self._refuse(429, "in flight", "too many requests in flight", limits.retry_after_s)
        # A policy in a thread leaves the loop; two decisions on the same counters would herd.
        async with self._one_at_a_time:
            return await self._dispatch(request, parsed, begun)

    async def _dispatch(self, request: IncomingRequest, parsed: ParsedRequest, begun: float) -> Decision:
        limits = self._config.limits
        view = self._view(request, parsed)
        engines = self.table.view(view, parsed.blocks)
        if request.subset is not None:
            inside = [endpoint in request.subset for endpoint in self._endpoints]
            engines.data[~np.array(inside), E_AVAILABLE] = 0.0
        if not (engines.available > 0).any():
            return self._refuse(503, "no engine", "no engine is ready", limits.retry_after_s)
        engines.data[engines.data[:, E_INFLIGHT] >= limits.in_flight_per_engine, E_AVAILABLE] = 0.0
        if not (engines.available > 0).any():
            return self._refuse(429, "in flight", "all engines are full", limits.retry_after_s)
        acting, watching = self.arms.acting(parsed.session, request.request_id)
        scored = await self.arms.score(acting, view, engines)
        order, propensity = self._order(scored.scores, engines, view)
        engine = order[0]
        record = self._record(request, parsed, acting, scored, view, engines, engine, propensity)
        agrees = None
        if watching is not None:
            shadow = await self.arms.score(watching, view, engines)
            choice = _ranked(shadow.scores, engines.available)[0]
            record.shadow, record.shadow_engine = watching.name, choice
            agrees = choice == engine
            self.metrics.shadow(watching.name, agrees)
            self.metrics.fallback(watching.name, shadow.fallback)
        self.table.dispatched(view, engine, parsed.blocks)
        for arm in (self.arms.policy, self.arms.baseline):
            arm.policy.tell("on_dispatch", view, engine)
        self._flights[request.request_id] = _Flight(view.index, engine, order, parsed, acting, record)
        self.metrics.decided(acting.name, self._endpoints[engine], time.perf_counter() - begun)
        self.recent.sent(view.now_s, acting.name, engine, agrees)
        self.metrics.fallback(acting.name, scored.fallback)
        headers = {}
        if self._static_key is not None:
            headers[PRIORITY] = str(
                self._static_key.key(
                    time.time() - _EPOCH_S,
                    parsed.prompt_tokens,
                    parsed.priority,
                    parsed.deadline_s,
                    parsed.user,
                    parsed.predicted_tokens,
                )
            )
        return Decision(200, tuple(self._endpoints[one] for one in order), headers)

    def progressed(self, progress: Progress) -> None:
        """Take note of a first token."""
        flight = self._flights.get(progress.request_id)
        if flight is not None and not flight.first_token:
            self._settle(flight, progress.endpoint)
            self._first(flight, progress.ttft_s)

    def finished(self, outcome: Outcome) -> None:
        """Take note of a request's end."""
        flight = self._flights.pop(outcome.request_id, None)
        if flight is None:
            if outcome.endpoint is not None and _generates(outcome.path):
                self.metrics.undecided(outcome.endpoint)
            return
        now, record = self.now(), flight.record
        if outcome.endpoint is not None:
            self._settle(flight, outcome.endpoint)
        endpoint = self._endpoints[flight.engine]
        # Engines that were tried before the one that answered.
        for engine in flight.order[: max(outcome.attempts - 1, 0)]:
            if engine != flight.engine:
                self.health.served(engine, False, now)
                self.metrics.retried(self._endpoints[engine])
        if outcome.ttft_s is not None and not flight.first_token:
            self._first(flight, outcome.ttft_s)
        good = outcome.complete and outcome.status < 500
        if not outcome.client_left:
            self.health.served(flight.engine, good, now)
        output = outcome.output_tokens or 0
        if good:
            self.table.finished(flight.index, now, output)
            for arm in (self.arms.policy, self.arms.baseline):
                arm.policy.tell("on_finish", flight.index, flight.engine, now, output)
        else:
            self.table.lost(flight.index)
        if outcome.prompt_tokens and flight.parsed.characters:
            measured = flight.parsed.characters / outcome.prompt_tokens
            self._chars_per_token += _TEXT_WEIGHT * (measured - self._chars_per_token)
        ended = "client left" if outcome.client_left else "complete" if good else "failed"
        self.metrics.ended(flight.arm.name, endpoint, outcome, ended)
        if ended != "complete":
            self.recent.unserved(now, ended)
        record.end(flight.engine, outcome, ended)
        self._log.write(record)

    def forget(self, older_than_s: float = _FORGET_S) -> None:
        """Drop requests whose end nobody has told: a gateway without an access log tells of none."""
        now = self.now()
        for request_id, flight in list(self._flights.items()):
            if now - flight.record.arrival_s > older_than_s:
                self.table.lost(flight.index)
                del self._flights[request_id]

    def _view(self, request: IncomingRequest, parsed: ParsedRequest) -> RequestView:
        index, now = self._count, self.now()
        self._count += 1
        draws = np.random.default_rng([self._config.seed, index]).random(2)
        turn = self._turns.get(parsed.session, -1) + 1 if parsed.turn is None else parsed.turn
        if parsed.session >= 0:
            self._turns[parsed.session] = turn
            self._turns.move_to_end(parsed.session)
            if len(self._turns) > _SESSIONS:
                self._turns.popitem(last=False)
        return RequestView(
            index=index,
            now_s=now,
            arrival_s=min(request.received_s - self._start_s, now),
            prompt_tokens=parsed.prompt_tokens,
            priority=parsed.priority,
            user=parsed.user,
            session=parsed.session,
            turn=max(turn, 0) if parsed.session >= 0 or parsed.turn is not None else 0,
            deadline_s=parsed.deadline_s,
            last_engine=self.table.last_engine,
            uniforms=(float(draws[0]), float(draws[1])),
            prefix_key=_prefix_key(parsed.blocks) if parsed.blocks else 0,
        )

    def _order(self, scores: FloatArray, engines: EngineViews, view: RequestView) -> tuple[tuple[int, ...], float]:
        """Return the engines in order of preference, and the probability of the first one."""
        ranked = _ranked(scores, engines.available)
        epsilon, count = self._config.epsilon, len(ranked)
        if epsilon == 0.0:
            return ranked, 1.0
        draws = np.random.default_rng([self._config.seed, view.index, 1]).random(2)
        first = ranked[int(draws[1] * count)] if draws[0] < epsilon else ranked[0]
        propensity = epsilon / count + (1.0 - epsilon) * (first == ranked[0])
        return (first, *(one for one in ranked if one != first)), propensity

    def _record(
        self,
        request: IncomingRequest,
        parsed: ParsedRequest,
        arm: Arm,
        scored: Scored,
        view: RequestView,
        engines: EngineViews,
        engine: int,
        propensity: float,
    ) -> DecisionRecord:
        observation = None
        if self._config.log_observations:
            observation = {"request": _finite(view.row()), "engines": [_finite(row) for row in engines.data]}
        return DecisionRecord(
            request_id=request.request_id,
            arrival_s=view.arrival_s,
            prompt_tokens=parsed.prompt_tokens,
            user=parsed.user if parsed.user >= 0 else None,
            session=parsed.session if parsed.session >= 0 else None,
            turn=view.turn,
            priority=parsed.priority,
            deadline_s=None if math.isinf(parsed.deadline_s) else parsed.deadline_s,
            prefix_blocks=[int.from_bytes(block, "big") >> 11 for block in parsed.blocks],
            policy=arm.name,
            version=arm.version,
            chosen=engine,
            scores=[float(f"{score:.6g}") if math.isfinite(score) else None for score in scored.scores],
            propensity=propensity,
            fallback=scored.fallback,
            decision_us=round(scored.seconds * 1e6, 1),
            observation=observation,
        )

    def _first(self, flight: _Flight, ttft_s: float) -> None:
        flight.first_token = True
        now = self.now()
        # The data plane counts from when it has the request, which may reach us much later: not into the future.
        at = min(flight.record.arrival_s + ttft_s, now)
        self.table.first_token(flight.index, at)
        self.recent.first_token(now, flight.arm.name, flight.engine, ttft_s)
        for arm in (self.arms.policy, self.arms.baseline):
            arm.policy.tell("on_first_token", flight.index, flight.engine, at)

    def _settle(self, flight: _Flight, endpoint: str) -> None:
        """Credit the engine that serves a request, if it is not the one that was chosen."""
        engine = self._engine_of.get(endpoint, flight.engine)
        if engine != flight.engine:
            self.table.moved(flight.index, engine)
            flight.engine = engine

    def _elsewhere(self, request: IncomingRequest) -> Decision:
        """Send what generates no tokens to any engine that answers, in turn."""
        open_ = [e for e in self.healthy_endpoints() if request.subset is None or e in request.subset]
        if not open_:
            return self._refuse(503, "no engine", "no engine is ready", self._config.limits.retry_after_s)
        self._rotation += 1
        start = self._rotation % len(open_)
        return Decision(200, tuple(open_[start:] + open_[:start]))

    def _refuse(self, status: int, reason: str, message: str, retry_after_s: float | None = None) -> Decision:
        self.metrics.refused(reason, status)
        self.recent.unserved(self.now(), "refused")
        return Decision(status, message=message, retry_after_s=retry_after_s)


def _generates(path: str) -> bool:
    """Whether a request of this path generates tokens, and so is dispatched by a policy."""
    return path.partition("?")[0] in PATHS


def _ranked(scores: FloatArray, available: FloatArray) -> tuple[int, ...]:
    """Return the available engines, the best one first; those without a finite score last."""
    candidates = np.flatnonzero(available > 0)
    values = np.where(np.isfinite(scores[candidates]), scores[candidates], np.inf)
    return tuple(int(engine) for engine in candidates[np.argsort(values, kind="stable")])


def _prefix_key(blocks: Sequence[bytes]) -> int:
    """Return a number from 1 to 2^52 that prompts of the same beginning share."""
    return int.from_bytes(blocks[min(len(blocks), 4) - 1], "big") % 2**52 + 1


def _finite(row: FloatArray) -> list[float | None]:
    """Return a row as JSON has numbers."""
    return [value if math.isfinite(value) else None for value in row.tolist()]
