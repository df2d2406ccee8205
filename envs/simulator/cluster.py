"""A simulated cluster: SimPy for what happens to the cluster, the compiled kernel for what happens in its engines.

The kernel runs from one SimPy event to the next. Faults, given or random, are SimPy processes; users add their own
(autoscaling, say) to ``SimulatedCluster.environment`` and act through ``kill``, ``leave`` and the other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import simpy

from servegym.baselines.heuristic import compiled_form
from servegym.baselines.interface import (
    CONTEXT_COLUMNS,
    QUEUE_COLUMNS,
    EnginePolicy,
    EngineViews,
    FloatArray,
    QueueView,
    RequestPolicy,
    RequestView,
    pick,
)
from servegym.envs.simulator.build import Memory
from servegym.envs.simulator.compile import announce_compilation, engine_score, request_key
from servegym.envs.simulator.config import ClusterConfig, Fault
from servegym.envs.simulator.kernel import faults
from servegym.envs.simulator.kernel.cluster import DISPATCH, DONE, HORIZON, advance_to_decision
from servegym.envs.simulator.kernel.queues import read_queue_of
from servegym.envs.simulator.kernel.state import (
    NONE,
    ORDER_DYNAMIC,
    ORDER_EXTERNAL,
    ORDER_FCFS,
    ORDER_PRIORITY,
    ORDER_STATIC,
)
from servegym.envs.simulator.random_faults import RandomFaults
from servegym.envs.workloads.table import RequestTable


class SimulatedCluster:
    """One run of a table of requests on a cluster, under a request policy and an engine policy.

    Without an engine policy the caller decides: :meth:`next_decision` and :meth:`dispatch` alternate. With one,
    :meth:`run` goes to the end; policies with a compiled form never leave the kernel.

    Args:
        config: the cluster.
        table: the requests.
        request_policy: order of the waiting queues.
        engine_policy: choice of engines, or None if the caller dispatches.
        seed: seed of the run's own randomness, that of randomised policies.
        record_totals: keep the reward integrals at each arrival (open-loop tables only).
        source: where the table comes from, for error messages.

    Raises:
        InputError: a request that can never fit, an unknown profile.
    """

    def __init__(
        self,
        config: ClusterConfig,
        table: RequestTable,
        request_policy: RequestPolicy,
        engine_policy: EnginePolicy | None = None,
        *,
        seed: int = 0,
        record_totals: bool = False,
        source: str = "workload",
    ) -> None:
        self.config = config
        self.table = table
        self.specs = config.expand()
        self.environment = simpy.Environment()
        self.totals = np.zeros(3)
        self._request_policy = request_policy
        self._engine_policy = engine_policy
        order, key, key_params = _order(request_policy)
        form = compiled_form(engine_policy) if engine_policy is not None else None
        announce_compilation()
        self._hooks = _hooks(engine_policy)
        self.memory = Memory(
            table,
            self.specs,
            order=order,
            telemetry=config.telemetry,
            router=config.router,
            lockstep=config.mode == "lockstep",
            external_dispatch=form is None,
            log_events=bool(self._hooks.keys() & {"on_first_token", "on_finish"}),
            oracle=getattr(request_policy, "needs_oracle", False),
            dispatch_oracle=getattr(engine_policy, "needs_oracle", False),
            served_weights=getattr(request_policy, "served_weights", None),
            record_totals=record_totals,
            engine_params=form[1] if form else (),
            request_params=key_params,
            engine_score=engine_score(form[0] if form else None),
            request_key=request_key(key),
            seed=seed,
            source=source,
        )
        self._events_seen = 0
        for policy in (request_policy, engine_policy):
            reset = getattr(policy, "reset", None)
            if reset is not None:
                reset(seed)
        for fault in config.faults:
            self.environment.process(self._fault(fault))
        self.random_faults = RandomFaults(
            self.environment, config.random_faults, self.memory.engines, self._apply, seed
        )

    # ------------------------------------------------------------------------------------------------ running
    @property
    def now_s(self) -> float:
        """Time reached, in seconds from the start of the run."""
        return float(self.memory.cluster["now_s"][0])

    @property
    def finished(self) -> int:
        """Requests that have finished."""
        return int(self.memory.cluster["finished"][0])

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        """Run to the end: all requests finished, or waiting for an engine that never returns.

        Args:
            progress: called now and then with the share of requests that have finished.
        """
        if progress is not None:
            self.environment.process(self._report(progress))
        while self.next_decision():
            if self._engine_policy is None:
                raise RuntimeError("the cluster has no engine policy; use next_decision() and dispatch()")
            self._decide(self._engine_policy)

    def warm_up(self) -> None:
        """Compile or load the kernel now, so that what follows is simulation only."""
        advance_to_decision(self.memory.cluster, -1.0, NONE, self.totals)

    def next_decision(self) -> bool:
        """Advance to the next request that needs a dispatch decision; False at the end of the run."""
        return self._advance(NONE)

    def dispatch(self, engine: int) -> bool:
        """Send the pending request to ``engine`` and advance to the next decision; False at the end of the run."""
        return self._advance(engine)

    def request_view(self) -> RequestView:
        """The pending request."""
        row = self.memory.request_row
        now, arrival, prompt, priority, deadline, user, session, turn, index, last, *uniforms, key = row.tolist()
        return RequestView(
            index=int(index),
            now_s=now,
            arrival_s=arrival,
            prompt_tokens=int(prompt),
            priority=int(priority),
            user=int(user),
            session=int(session),
            turn=int(turn),
            deadline_s=deadline,
            last_engine=int(last),
            uniforms=(uniforms[0], uniforms[1]),
            prefix_key=int(key),
        )

    def engine_views(self) -> EngineViews:
        """The engines at the pending decision."""
        return EngineViews(self.memory.engine_view.copy(order="C"))

    def _advance(self, action: int) -> bool:
        cluster = self.memory.cluster
        while True:
            horizon = self.environment.peek()
            reason = advance_to_decision(cluster, horizon, action, self.totals)
            action = NONE
            if reason == DISPATCH:
                return True
            if reason == HORIZON:
                self.environment.step()
            elif reason == DONE:
                # Later events, a recovery for instance, matter only to requests that wait for an engine.
                if horizon == float("inf") or self.finished == len(self.table) or self._given_up():
                    return False
                cluster["now_s"] = horizon
                self.environment.step()
            else:
                self._order_queue(int(cluster["order_engine"][0]))

    # ------------------------------------------------------------------------------------------------ policies in
    # Python
    def _decide(self, policy: EnginePolicy) -> None:
        """Let a policy without compiled form dispatch until the end."""
        while True:
            self._deliver_events()
            request, engines = self.request_view(), self.engine_views()
            choice = pick(policy.score(request, engines), engines.available)
            if "on_dispatch" in self._hooks:
                self._hooks["on_dispatch"](request, choice)
            if not self.dispatch(choice):
                return

    def _deliver_events(self) -> None:
        count = int(self.memory.cluster["event_count"][0])
        fresh = self.memory.events[self._events_seen : count]
        self._events_seen = count
        requests = self.memory.requests
        times = np.where(fresh % 2 == 0, requests["first_s"][fresh // 2], requests["finish_s"][fresh // 2])
        for position in np.argsort(times, kind="stable"):
            r, ended = divmod(int(fresh[position]), 2)
            engine, time = int(requests["engine"][r]), float(times[position])
            if ended and "on_finish" in self._hooks:
                self._hooks["on_finish"](r, engine, time, int(requests["output"][r]))
            elif not ended and "on_first_token" in self._hooks:
                self._hooks["on_first_token"](r, engine, time)

    def _order_queue(self, engine: int) -> None:
        """Score a waiting queue with a policy without compiled form."""
        record = self.memory.engines[engine]
        rows = np.empty((int(record["waiting"]), QUEUE_COLUMNS))
        members = np.empty(len(rows), dtype=np.int32)
        context = np.empty(CONTEXT_COLUMNS)
        count = read_queue_of(self.memory.cluster, engine, rows, members, context)
        now, running, max_num_seqs, free, total, size, rate = context.tolist()
        queue = QueueView(
            data=rows[:count],
            now_s=now,
            running=int(running),
            max_num_seqs=int(max_num_seqs),
            free_blocks=int(free),
            total_blocks=int(total),
            block_size=int(size),
            prefill_tokens_per_s=rate,
        )
        self.memory.requests["key"][members[:count]] = self._request_policy.score(queue)
        record["ordered"] = 1

    # ------------------------------------------------------------------------------------------------ change
    def kill(self, engine: int) -> None:
        """Let an engine die now."""
        faults.kill(self.memory.cluster, engine, self.environment.now)

    def recover(self, engine: int) -> None:
        """Bring a dead engine back, empty."""
        faults.recover(self.memory.cluster, engine, self.environment.now)

    def hang(self, engine: int) -> None:
        """Stop an engine in the middle of its step."""
        faults.hang(self.memory.cluster, engine, self.environment.now)

    def resume(self, engine: int) -> None:
        """Let a hung engine go on."""
        faults.resume(self.memory.cluster, engine, self.environment.now)

    def leave(self, engine: int) -> None:
        """Drain an engine: no new requests."""
        faults.leave(self.memory.cluster, engine)

    def join(self, engine: int) -> None:
        """Let a drained engine take requests again."""
        faults.join(self.memory.cluster, engine, self.environment.now)

    def slow(self, engine: int, factor: float) -> None:
        """Multiply the engine's step times by ``factor``, from its next step."""
        self.memory.engines["slowdown"][engine] = self.specs[engine].slowdown * factor

    def report(self, engine: int, reporting: bool) -> None:
        """Stop or resume an engine's telemetry."""
        self.memory.engines["reporting"][engine] = reporting

    def _fault(self, fault: Fault) -> Generator[simpy.Event, Any, None]:
        yield self.environment.timeout(fault.at_s)
        self._apply(fault)

    def _apply(self, fault: Fault) -> None:
        actions: dict[str, Callable[[int], None]] = {
            "die": self.kill,
            "recover": self.recover,
            "hang": self.hang,
            "resume": self.resume,
            "leave": self.leave,
            "join": self.join,
            "slow": lambda engine: self.slow(engine, fault.factor),
            "mute": lambda engine: self.report(engine, False),
            "unmute": lambda engine: self.report(engine, True),
        }
        actions[fault.kind](fault.engine)

    def _given_up(self) -> bool:
        """Whether only random faults can still happen, none of which brings an engine back."""
        last = max((fault.at_s for fault in self.config.faults), default=0.0)
        return bool(self.config.random_faults) and self.environment.now >= last and not self.random_faults.pending

    def _report(self, progress: Callable[[float], None]) -> Generator[simpy.Event, Any, None]:
        span = float(self.table.arrival_s.max()) / 100 or 1.0
        while self.finished < len(self.table):
            yield self.environment.timeout(span)
            progress(self.finished / len(self.table))


def _order(policy: RequestPolicy) -> tuple[int, Callable[..., float] | None, FloatArray]:
    """Which kind of queue the kernel needs for a request policy, its compiled key and the key's parameters."""
    native = getattr(policy, "native", None)
    if native is not None:
        return (ORDER_PRIORITY if native == "priority" else ORDER_FCFS), None, np.zeros(0)
    form = compiled_form(policy)
    if form is None:
        return ORDER_EXTERNAL, None, np.zeros(0)
    return (ORDER_STATIC if getattr(policy, "static", False) else ORDER_DYNAMIC), *form


def _hooks(policy: EnginePolicy | None) -> dict[str, Callable[..., None]]:
    names = ("on_dispatch", "on_first_token", "on_finish")
    return {name: getattr(policy, name) for name in names if hasattr(policy, name)}
