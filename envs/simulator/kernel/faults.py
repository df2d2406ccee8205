"""Engines that die, hang, slow down, fall silent, leave and come back."""

from __future__ import annotations

import math
from typing import Any

from servegym.envs.simulator.kernel.arrivals import push_later
from servegym.envs.simulator.kernel.blocks import in_flight, reset_pool
from servegym.envs.simulator.kernel.dispatch import rescue
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import engine_at, floats, ints, longs, request_at
from servegym.envs.simulator.kernel.prefix_index import forget_engine
from servegym.envs.simulator.kernel.progress import NEVER, mark_changed, settle_integrals
from servegym.envs.simulator.kernel.served import forget_served
from servegym.envs.simulator.kernel.state import (
    DECODE,
    GROUNDED,
    IDLE,
    IN_FLIGHT,
    LEAVING,
    NONE,
    ORDER_PRIORITY,
    ORDER_STATIC,
    PENDING,
    READY,
    WAITING,
    Engine,
    State,
)


@jit
def _lose(s: State, engine: Engine, r: int, now: float) -> None:
    """A request of a dying engine arrives at the router again; what it generated so far is computed anew."""
    request = request_at(s.requests_at, r)
    if request.status == DECODE:
        request.generated = engine.tick - request.tick0
    if engine.ahead and (request.status == LEAVING or in_flight(engine, request)):
        request.generated -= 1  # computed by the step that does not end
    request.status = PENDING
    request.computed = 0
    request.row = NONE
    request.link = NONE
    request.heap_child = NONE
    request.retries += 1
    request.served = NONE
    push_later(s, r, now)


@jit
def _lose_list(s: State, engine: Engine, head: int, now: float) -> None:
    while head != NONE:
        following = request_at(s.requests_at, head).link
        _lose(s, engine, head, now)
        head = following


@jit
def _lose_heap(s: State, engine: Engine, root: int, now: float) -> None:
    """Take a heap apart: children are spliced into the list of siblings, so that no recursion is needed."""
    head = root
    while head != NONE:
        request = request_at(s.requests_at, head)
        child, following = request.heap_child, request.link
        if child != NONE:
            last = child
            while request_at(s.requests_at, last).link != NONE:
                last = request_at(s.requests_at, last).link
            request_at(s.requests_at, last).link = following
            following = child
        _lose(s, engine, head, now)
        head = following


@jit
def kill(cluster: Any, e: int, now: float) -> None:
    """The engine and all its KV are gone; the router sends its requests elsewhere."""
    s = cluster[0]
    engine = engine_at(s.engines_at, e)
    settle_integrals(s, engine, now)
    if engine.flight == IN_FLIGHT:
        for i in range(engine.preempted_count):
            request = request_at(s.requests_at, ints(engine.preempted_at)[i])
            if request.status == WAITING and request.skipped != engine.tick:
                request.generated -= 1
    for i in range(engine.leaving):
        _lose(s, engine, ints(engine.leaving_at)[i], now)
    for i in range(engine.running):
        _lose(s, engine, ints(engine.running_at)[i], now)
    _lose_list(s, engine, engine.front, now)
    if engine.order == ORDER_PRIORITY or engine.order == ORDER_STATIC:
        _lose_heap(s, engine, engine.heap, now)
    else:
        _lose_list(s, engine, engine.queue_head, now)
    engine.queue_head = engine.queue_tail = engine.front = engine.heap = NONE
    engine.running = engine.decoding = engine.context = engine.waiting = 0
    engine.blocked = engine.ordered = 0
    engine.firsts = engine.leaving = engine.starved = engine.drained = 0
    engine.flight = GROUNDED
    engine.picked = engine.pick_budget = NONE
    engine.next_finish = NEVER
    for i in range(engine.block_size):
        ints(engine.phases_at)[i] = 0
    for task in range(engine.tasks):
        longs(engine.task_decoding_at)[task] = 0
    engine.inflight = engine.inflight_prompt = engine.prefill_requests = engine.prefill_tokens = 0
    engine.uncached_tokens = engine.fresh_tokens = 0
    engine.inflight_output = engine.waiting_tokens = engine.waiting_generated = 0
    engine.tpot_rate = 0.0
    engine.activity = IDLE
    floats(s.event_s_at)[e] = math.inf
    engine.alive = engine.accepting = engine.reporting = engine.hung = 0
    if s.indexing:
        forget_engine(s, e)
    forget_served(s, engine)
    reset_pool(engine)


@jit
def recover(cluster: Any, e: int, now: float) -> None:
    """A dead engine comes back, empty."""
    engine = engine_at(cluster[0].engines_at, e)
    engine.alive = engine.reporting = 1
    join(cluster, e, now)


@jit
def hang(cluster: Any, e: int, now: float) -> None:
    """The engine stops in the middle of its step and reports nothing; the router does not know.

    In lockstep all ranks stop with it.
    """
    s = cluster[0]
    engine = engine_at(s.engines_at, e)
    if engine.hung or not engine.alive:
        return
    engine.hung = 1
    engine.reporting = 0
    if s.lockstep:
        engine.hung_s = s.step_s - now
        s.step_s = math.inf
    else:
        engine.hung_s = floats(s.event_s_at)[e] - now
        floats(s.event_s_at)[e] = math.inf


@jit
def resume(cluster: Any, e: int, now: float) -> None:
    """A hung engine goes on with its step."""
    s = cluster[0]
    engine = engine_at(s.engines_at, e)
    if not engine.hung:
        return
    engine.hung = 0
    engine.reporting = 1
    if engine.activity == IDLE and engine.waiting > 0:
        engine.activity = READY
        engine.hung_s = 0.0
    if s.lockstep:
        s.step_s = now + max(engine.hung_s, 0.0) if s.stepping else math.inf
        if not s.stepping and engine.activity == READY:
            s.stepping = 1
            s.step_s = now
    else:
        floats(s.event_s_at)[e] = now + engine.hung_s


@jit
def leave(cluster: Any, e: int) -> None:
    """Take no new requests; those that it has are finished."""
    s = cluster[0]
    engine = engine_at(s.engines_at, e)
    engine.accepting = 0
    mark_changed(s, engine)


@jit
def join(cluster: Any, e: int, now: float) -> None:
    """Take requests again, first those that found no engine."""
    s = cluster[0]
    engine = engine_at(s.engines_at, e)
    if engine.alive:
        engine.accepting = 1
        mark_changed(s, engine)
        rescue(s, now)
