"""The general step: vLLM 0.32's ``Scheduler.schedule`` walked through request by request, and the effect of its output.

Preemption, budgets that run out among running requests, and requests that prefill before others that decode all end
here; what remains, most steps of most runs, is ``steady.py``.
"""

from __future__ import annotations

from servegym.envs.simulator.kernel.ahead import leaving_victim, preempt_leaving
from servegym.envs.simulator.kernel.blocks import adopt_prefix, cached_prefix, evictable, grow
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import floats, ints, longs, request_at
from servegym.envs.simulator.kernel.progress import (
    NEVER,
    advance_prefill,
    block_phase,
    computed_tokens,
    conclude,
    place_running,
    preempt,
    settle_integrals,
    stop_decoding,
    total_tokens,
)
from servegym.envs.simulator.kernel.queues import needs_pick, peek_waiting, pop_waiting
from servegym.envs.simulator.kernel.state import DECODE, NONE, PREFILL, Engine, State


@jit
def _victim(s: State, engine: Engine) -> int:
    """Position on the running list of the request to preempt; -1 minus that among those that leave, if it is one."""
    if engine.leaving > 0:
        leaving = leaving_victim(s, engine)
        if leaving != NONE:
            return -1 - leaving
    if not engine.priority_preemption:
        return engine.running - 1
    best = 0
    for i in range(1, engine.running):
        a = request_at(s.requests_at, ints(engine.running_at)[i])
        b = request_at(s.requests_at, ints(engine.running_at)[best])
        if a.priority > b.priority or (a.priority == b.priority and a.arrival_s > b.arrival_s):
            best = i
    return best


@jit
def _remove_running(s: State, engine: Engine, position: int) -> None:
    for i in range(position, engine.running - 1):
        ints(engine.running_at)[i] = ints(engine.running_at)[i + 1]
        ints(engine.scheduled_at)[i] = ints(engine.scheduled_at)[i + 1]
        ints(engine.phase_of_at)[i] = ints(engine.phase_of_at)[i + 1]
        longs(engine.end_of_at)[i] = longs(engine.end_of_at)[i + 1]
    engine.running -= 1
    for i in range(engine.leaving):
        ints(engine.leaving_place_at)[i] -= ints(engine.leaving_place_at)[i] > position


@jit
def _clear_rest(s: State, engine: Engine, position: int, budget: int) -> int:
    for i in range(position, engine.running):
        ints(engine.scheduled_at)[i] = 0
    return budget


@jit
def schedule_running(s: State, engine: Engine, budget: int, threshold: int) -> int:
    """First half of ``Scheduler.schedule``: running requests in order. Returns the token budget that is left."""
    i = 0
    while i < engine.running and budget > 0:
        r = ints(engine.running_at)[i]
        computed = computed_tokens(s, engine, r)
        tokens = total_tokens(s, engine, r) - computed
        if 0 < threshold < tokens:
            tokens = threshold
        tokens = min(tokens, budget)
        fits = grow(s, engine, r, computed, tokens)
        while not fits:
            position = _victim(s, engine)
            if position < 0:
                preempt_leaving(s, engine, -1 - position)
                fits = grow(s, engine, r, computed, tokens)
                continue
            victim = ints(engine.running_at)[position]
            taken = ints(engine.scheduled_at)[position] if position < i else 0
            preempt(s, engine, victim, taken)
            _remove_running(s, engine, position)
            budget += taken
            if position < i:
                i -= 1
            if victim == r:
                return _clear_rest(s, engine, i, budget)
            fits = grow(s, engine, r, computed, tokens)
        ints(engine.scheduled_at)[i] = tokens
        budget -= tokens
        i += 1
    return _clear_rest(s, engine, i, budget)


@jit
def schedule_waiting(s: State, engine: Engine, budget: int, threshold: int) -> int:
    """Second half of ``Scheduler.schedule``: admit waiting requests while budget, slots and blocks last.

    Returns:
        the token budget that is left, or, while an agent must choose who is next, -1 minus it.
    """
    size = engine.block_size
    while budget > 0 and engine.waiting > 0 and engine.running + engine.leaving < engine.max_num_seqs:
        if needs_pick(engine):
            return -1 - budget
        r = peek_waiting(s, engine)
        request = request_at(s.requests_at, r)
        total = request.prompt + request.generated
        hits = cached_prefix(s, engine, r, total) if engine.prefix_caching else 0
        # The whole prompt must fit (scheduler_reserve_full_isl), though only a chunk is allocated.
        needed = (total + size - 1) // size - hits
        if engine.prefix_caching:
            needed += evictable(engine, hits)
        if needed > engine.free_blocks:
            engine.blocked = 1
            engine.picked = NONE
            break
        computed = hits * size
        tokens = total - computed
        if 0 < threshold < tokens:
            tokens = threshold
        tokens = min(tokens, budget)
        pop_waiting(s, engine, r)
        if engine.prefix_caching:
            adopt_prefix(s, engine, r, hits)
            engine.cache_queries += total
            engine.cache_hits += computed
        if request.preemptions == 0:
            request.hit_tokens = computed
        request.computed = computed
        request.status = PREFILL
        grow(s, engine, r, computed, tokens)
        ints(engine.running_at)[engine.running] = r
        ints(engine.scheduled_at)[engine.running] = tokens
        ints(engine.phase_of_at)[engine.running] = NONE
        engine.running += 1
        budget -= tokens
    return budget


@jit
def step_cost(s: State, engine: Engine) -> None:
    """Tokens and duration of a mixed step, without MoE layers."""
    pairs = 0.0
    context = 0
    tokens = 0
    sequences = 0
    for i in range(engine.running):
        chunk = ints(engine.scheduled_at)[i]
        if chunk == 0:
            continue
        r = ints(engine.running_at)[i]
        sequences += 1
        tokens += chunk
        if request_at(s.requests_at, r).status == DECODE:
            context += total_tokens(s, engine, r)
        else:
            pairs += chunk * (request_at(s.requests_at, r).computed + (chunk + 1) * 0.5)
    engine.step_tokens = tokens
    engine.step_local_s = (
        engine.fixed_s
        + engine.sequence_s * sequences
        + floats(engine.local_cost_at)[tokens]
        + engine.pair_s * pairs
        + engine.context_s * context
    )


@jit
def finish_mixed_step(s: State, engine: Engine, now: float) -> None:
    """Apply the step that ends at ``now``, request by request in the order in which vLLM handles them."""
    settle_integrals(s, engine, now)
    # Every decoding request ages by the tick; those left out of this step are set back.
    engine.tick += 1
    engine.context += engine.decoding
    kept = 0
    next_finish = NEVER
    count = engine.running
    for i in range(count):
        r = ints(engine.running_at)[i]
        request = request_at(s.requests_at, r)
        tokens = ints(engine.scheduled_at)[i]
        if request.status == DECODE:
            if tokens == 0:
                ints(engine.phases_at)[block_phase(s, engine, r)] -= 1
                request.tick0 += 1
                ints(engine.phases_at)[block_phase(s, engine, r)] += 1
                engine.context -= 1
                if engine.ahead:
                    request.skipped = engine.tick
                    engine.starved = 1
            if request.tick0 + request.output <= engine.tick:
                stop_decoding(s, engine, r)
                conclude(s, engine, r, now, kept)
                continue
        elif advance_prefill(s, engine, r, tokens, now, kept):
            continue
        if request.status == DECODE:
            next_finish = min(next_finish, request.tick0 + request.output)
        place_running(s, engine, r, kept)
        kept += 1
    engine.running = kept
    engine.next_finish = next_finish
