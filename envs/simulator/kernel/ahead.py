"""Asynchronous scheduling, one step ahead, as vLLM 0.32 does it on GPUs (``AsyncScheduler``).

While a step runs the next one is scheduled already; its output is *delivered* when it ends, and only then is the step
after the next one scheduled (``EngineCore.step_with_batch_queue`` with two batches):

- The scheduler counts on the tokens of the running step. Their number is known, so that a request's state moves on as
  soon as the step that computes them begins; a request that reaches its last token there leaves the running list and
  keeps its slot and its blocks until the step ends.
- Their values are not known: a block that ends with such a token enters the prefix cache one schedule later.
- A request that is preempted while a token of it is computed still gets it.
"""

from __future__ import annotations

from servegym.envs.simulator.kernel.blocks import cache_known, in_flight, release
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import ints, request_at
from servegym.envs.simulator.kernel.progress import computed_tokens, finish_request, first_token, settle_integrals
from servegym.envs.simulator.kernel.state import GROUNDED, NONE, STEP_MIXED, Engine, State


@jit
def leaving_victim(s: State, engine: Engine) -> int:
    """Which of the requests that leave is to be preempted, before any that stay; NONE for none of them."""
    victim = NONE
    if not engine.priority_preemption:
        for i in range(engine.leaving):  # the last one of all that hold blocks
            if ints(engine.leaving_place_at)[i] >= engine.running:
                victim = i
        return victim
    for i in range(engine.leaving):
        if ints(engine.leaving_place_at)[i] != NONE:
            r = ints(engine.leaving_at)[i]
            if victim == NONE or _yields_to(s, r, ints(engine.leaving_at)[victim]):
                victim = i
    if victim == NONE:
        return NONE
    # Of equals the one that runs first is preempted.
    r, place = ints(engine.leaving_at)[victim], ints(engine.leaving_place_at)[victim]
    for i in range(engine.running):
        other = ints(engine.running_at)[i]
        if _yields_to(s, other, r) or (i < place and not _yields_to(s, r, other)):
            return NONE
    return victim


@jit
def _yields_to(s: State, a: int, b: int) -> bool:
    """Whether ``a`` is preempted before ``b`` wherever they stand."""
    x, y = request_at(s.requests_at, a), request_at(s.requests_at, b)
    return x.priority > y.priority or (x.priority == y.priority and x.arrival_s > y.arrival_s)


@jit
def preempt_leaving(s: State, engine: Engine, i: int) -> None:
    """Take the blocks of a request that leaves: vLLM puts it back to its queue, where its last token ends it."""
    r = ints(engine.leaving_at)[i]
    request = request_at(s.requests_at, r)
    request.preemptions += 1
    release(s, engine, r, request.prompt + request.output - 1, True)
    ints(engine.leaving_place_at)[i] = NONE
    engine.preemptions += 1
    ints(engine.preempted_at)[engine.preempted_count] = r
    engine.preempted_count += 1
    engine.blocked = 0


@jit
def deliver(s: State, engine: Engine, now: float) -> None:
    """The running step ends: its tokens are known, finished requests go, and what they held is free."""
    if engine.firsts + engine.leaving > 0:
        settle_integrals(s, engine, now)
    for i in range(engine.firsts):
        first_token(s, engine, ints(engine.firsts_at)[i], now)
    cached = 0
    for i in range(engine.leaving):
        r, place = ints(engine.leaving_at)[i], ints(engine.leaving_place_at)[i]
        if place != NONE:
            _cache_starved(s, engine, cached, place)
            cached = place
            computed = request_at(s.requests_at, r).prompt + request_at(s.requests_at, r).output - 1
            if engine.prefix_caching:
                cache_known(s, engine, r, computed)
            release(s, engine, r, computed, False)
        finish_request(s, engine, r, now)
    _cache_starved(s, engine, cached, engine.running)
    engine.firsts = engine.leaving = 0
    engine.flight = GROUNDED


@jit
def _cache_starved(s: State, engine: Engine, first: int, last: int) -> None:
    """Cache what the delivered tokens complete of requests that the next step leaves out, by place on the running list.

    For those that it does not leave out, its scheduling has done so.
    """
    if engine.prefix_caching and engine.activity == STEP_MIXED:
        for i in range(first, last):
            r = ints(engine.running_at)[i]
            if ints(engine.scheduled_at)[i] == 0 and in_flight(engine, request_at(s.requests_at, r)):
                cache_known(s, engine, r, computed_tokens(s, engine, r))
