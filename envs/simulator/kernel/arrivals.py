"""Arrivals in order of time: open-loop requests from their sorted table, later ones from a binary heap.

Later arrivals are follow-up turns, which come a think time after the previous turn has finished, and requests that are
dispatched again after the death of their engine.
"""

from __future__ import annotations

import math

from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import floats, ints, request_at
from servegym.envs.simulator.kernel.state import NONE, State


@jit
def _earlier(s: State, i: int, j: int) -> bool:
    if floats(s.later_s_at)[i] != floats(s.later_s_at)[j]:
        return floats(s.later_s_at)[i] < floats(s.later_s_at)[j]
    return ints(s.later_at)[i] < ints(s.later_at)[j]


@jit
def _swap(s: State, i: int, j: int) -> None:
    floats(s.later_s_at)[i], floats(s.later_s_at)[j] = floats(s.later_s_at)[j], floats(s.later_s_at)[i]
    ints(s.later_at)[i], ints(s.later_at)[j] = ints(s.later_at)[j], ints(s.later_at)[i]


@jit
def push_later(s: State, r: int, time: float) -> None:
    """Let request ``r`` arrive at the router at ``time``."""
    i = s.later
    floats(s.later_s_at)[i], ints(s.later_at)[i] = time, r
    s.later += 1
    while i > 0 and _earlier(s, i, (i - 1) // 2):
        _swap(s, i, (i - 1) // 2)
        i = (i - 1) // 2


@jit
def _pop_later(s: State) -> int:
    r = ints(s.later_at)[0]
    s.later -= 1
    last = s.later
    floats(s.later_s_at)[0], ints(s.later_at)[0] = floats(s.later_s_at)[last], ints(s.later_at)[last]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= last:
            return r
        if child + 1 < last and _earlier(s, child + 1, child):
            child += 1
        if not _earlier(s, child, i):
            return r
        _swap(s, i, child)
        i = child


@jit
def next_arrival_s(s: State) -> float:
    """Time of the next arrival, inf if none is known."""
    time = math.inf
    if s.next_root < s.root_count:
        time = request_at(s.requests_at, ints(s.roots_at)[s.next_root]).arrival_s
    if s.later > 0 and floats(s.later_s_at)[0] < time:
        time = floats(s.later_s_at)[0]
    return time


@jit
def pop_arrival(s: State) -> int:
    """The next request to arrive."""
    if s.next_root < s.root_count:
        r = ints(s.roots_at)[s.next_root]
        if s.later == 0 or request_at(s.requests_at, r).arrival_s <= floats(s.later_s_at)[0]:
            s.next_root += 1
            return r
    return _pop_later(s)


@jit
def log_event(s: State, event: int) -> None:
    """Note an event for the hooks of policies, if the run has any."""
    if s.logging:
        ints(s.events_at)[s.event_count] = event
        s.event_count += 1


@jit
def end_turn(s: State, r: int, now: float) -> None:
    """Count a finished request and let its session go on."""
    request = request_at(s.requests_at, r)
    s.finished += 1
    log_event(s, 2 * r + 1)
    if request.child != NONE:
        follow_up = request_at(s.requests_at, request.child)
        follow_up.arrival_s = now + follow_up.think_s
        push_later(s, request.child, follow_up.arrival_s)
