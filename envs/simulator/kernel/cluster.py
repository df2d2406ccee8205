"""The event loop of a cluster: arrivals, telemetry and engine steps in order of time.

Between two events that touch the whole cluster the engines are independent of each other, so each is advanced on its
own up to the next such event. With closed-loop sessions a finished request causes an arrival; the shortest think time
bounds from below when, and engines are advanced no further than that (the lookahead of conservative parallel
simulation).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray

from servegym.envs.simulator.kernel.arrivals import next_arrival_s, pop_arrival
from servegym.envs.simulator.kernel.dispatch import choose, fill_view, hand_over, strand, take_telemetry
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.lockstep import advance_lockstep
from servegym.envs.simulator.kernel.memory import engine_at, floats
from servegym.envs.simulator.kernel.progress import settle_integrals
from servegym.envs.simulator.kernel.state import GROUNDED, IDLE, IN_FLIGHT, NONE, READY, STEP_STEADY, State
from servegym.envs.simulator.kernel.step import (
    NEEDS_ORDER,
    NOTHING_TO_DO,
    ask_for_placement,
    begin_step,
    finish_step,
    land,
    step_s,
    take_off,
)

# Why `advance` returned.
DONE, HORIZON, DISPATCH, ORDER, PLACEMENT, NOT_A_NUMBER = range(6)


@jit
def _advance_engine(s: State, e: int, limit: float) -> bool:
    """Run one engine's events before ``limit``; False if it waits for a policy outside of the kernel."""
    engine = engine_at(s.engines_at, e)
    while floats(s.event_s_at)[e] < limit:
        now = floats(s.event_s_at)[e]
        if engine.ahead:
            if not _advance_ahead(s, e, now):
                return False
            continue
        if engine.activity >= STEP_STEADY:
            finish_step(s, engine, now)
            engine.activity = READY
        if engine.group != NONE and ask_for_placement(s, engine.group, now):
            return False
        duration = begin_step(s, engine, now)
        if duration == NEEDS_ORDER:
            s.order_engine = e
            return False
        if duration == NOTHING_TO_DO:
            engine.activity = IDLE
            floats(s.event_s_at)[e] = math.inf
            return True
        floats(s.event_s_at)[e] = now + duration
        engine.busy_s += duration
    return True


@jit
def _advance_ahead(s: State, e: int, now: float) -> bool:
    """End the running step, begin the one that was scheduled ahead, and schedule the next one; False as above.

    At an idle engine, the first step is scheduled and begins at once.
    """
    engine = engine_at(s.engines_at, e)
    if engine.flight == IN_FLIGHT:
        land(s, engine, now)
    if engine.flight == GROUNDED:
        if engine.group != NONE and ask_for_placement(s, engine.group, now):
            return False
        if engine.activity == READY:
            scheduled = begin_step(s, engine, now)
            if scheduled == NEEDS_ORDER:
                s.order_engine = e
                return False
            if scheduled == NOTHING_TO_DO:
                engine.activity = IDLE
                floats(s.event_s_at)[e] = math.inf
                return True
        duration = step_s(s, engine)
        engine.step_end_s = now + duration
        engine.busy_s += duration
        take_off(s, engine, now)
    if begin_step(s, engine, now) == NEEDS_ORDER:
        s.order_engine = e
        return False
    engine.flight = IN_FLIGHT
    floats(s.event_s_at)[e] = engine.step_end_s
    return True


@jit
def _advance_engines(s: State, limit: float) -> bool:
    """Run all events of engines before ``limit``, or before the first follow-up that they may cause."""
    if s.lockstep:
        if s.closed_loop and s.stepping:
            limit = min(limit, max(s.step_s + s.shortest_think_s, np.nextafter(s.step_s, math.inf)))
        return advance_lockstep(s, limit)
    if s.closed_loop:
        first = math.inf
        for e in range(s.engine_count):
            first = min(first, floats(s.event_s_at)[e])
        limit = min(limit, max(first + s.shortest_think_s, np.nextafter(first, math.inf)))
    for e in range(s.engine_count):
        if floats(s.event_s_at)[e] < limit and not _advance_engine(s, e, limit):
            return False
    return True


@jit
def _next_engine_event_s(s: State) -> float:
    if s.lockstep:
        return s.step_s if s.stepping else math.inf
    first = math.inf
    for e in range(s.engine_count):
        first = min(first, floats(s.event_s_at)[e])
    return first


@jit
def sum_integrals(s: State, now: float, out: Any) -> None:
    """Add up the reward integrals of all engines from the start to ``now``.

    Args:
        s: the cluster.
        now: time up to which to integrate, seconds.
        out: output, shape (3,): requests without first token, requests in flight, sum of 1 / (output - 1) over requests
            between first and last token; each integrated over time, in seconds.
    """
    out[0] = out[1] = out[2] = 0.0
    for e in range(s.engine_count):
        engine = engine_at(s.engines_at, e)
        settle_integrals(s, engine, now)
        out[0] += engine.integral_prefill
        out[1] += engine.integral_inflight
        out[2] += engine.integral_tpot


@jit
def _advance_all(s: State, limit: float) -> bool:
    """Run all engine events before ``limit``, follow-ups that arrive meanwhile apart; False to wait for a policy."""
    if not s.closed_loop:
        return _advance_engines(s, limit)
    while _next_engine_event_s(s) < min(limit, next_arrival_s(s)):
        if not _advance_engines(s, min(limit, next_arrival_s(s))):
            return False
    return True


@jit
def _arrive(s: State, r: int, now: float) -> bool:
    """Dispatch an arriving request with the compiled policy; False to wait for the caller's decision."""
    s.arrived += 1
    if s.recording:
        sum_integrals(s, now, carray(floats(s.totals_at + 24 * r), (3,)))
    fill_view(s, r, now)
    choice = choose(s)
    if choice == NONE:
        strand(s, r, now)
        return True
    if s.external_dispatch:
        s.pending = r
        return False
    hand_over(s, r, choice, now)
    return True


@jit
def advance(s: State, horizon: float, action: int) -> int:
    """Run the cluster up to ``horizon`` or to the next decision that is not compiled.

    Args:
        s: the cluster.
        horizon: stop before events at or after this time, seconds.
        action: engine for the request that waits for a decision, NONE if none does.

    Returns:
        DONE when nothing is left to happen, HORIZON, DISPATCH with the view filled and ``pending`` set, ORDER with
        ``order_engine`` set, or PLACEMENT with ``placement_group`` and ``placement_s`` set, which the caller takes back
        by moving the group's ``next_placement``.
    """
    if s.pending != NONE:
        if action == NONE:
            return DISPATCH
        r = s.pending
        s.pending = NONE
        hand_over(s, r, action, s.now_s)
    while True:
        snapshot = s.telemetry_count * s.telemetry_period_s if s.telemetry_period_s > 0.0 else math.inf
        if not _advance_all(s, min(horizon, min(next_arrival_s(s), snapshot))):
            return ORDER if s.placement_group == NONE else PLACEMENT
        arrival = next_arrival_s(s)
        if arrival == math.inf and _next_engine_event_s(s) == math.inf:
            return DONE
        if horizon <= min(arrival, snapshot) and horizon < math.inf:
            s.now_s = max(s.now_s, horizon)
            return HORIZON
        if snapshot <= arrival and snapshot < math.inf:
            s.now_s = snapshot
            take_telemetry(s, snapshot)
        elif arrival < math.inf:
            s.now_s = arrival
            if not _arrive(s, pop_arrival(s), arrival):
                return DISPATCH


@jit
def advance_with_totals(s: State, horizon: float, action: int, totals: Any) -> int:
    """As :func:`advance`, and write the reward integrals into ``totals``, shape (3,), as of the decision or the end.

    Of an engine that has not come that far its counts now are taken to last until then; the next call mends that.
    NOT_A_NUMBER if a compiled policy has failed meanwhile; the run is void then.
    """
    reason = advance(s, horizon, action)
    if reason == DONE:
        for e in range(s.engine_count):
            s.now_s = max(s.now_s, engine_at(s.engines_at, e).integral_s)
    s.totals_s = s.now_s
    if reason == ORDER:
        s.totals_s = max(s.now_s, s.step_s if s.lockstep else floats(s.event_s_at)[s.order_engine])
    elif reason == PLACEMENT:
        s.totals_s = max(s.now_s, s.placement_s)
    sum_integrals(s, s.totals_s, totals)
    return NOT_A_NUMBER if s.engine_nan or s.request_nan else reason


@jit
def advance_to_decision(cluster: Any, horizon: float, action: int, totals: Any) -> int:
    """As :func:`advance_with_totals`, of a cluster's record as an array of one."""
    return advance_with_totals(cluster[0], horizon, action, totals)
