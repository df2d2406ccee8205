"""One engine step: vLLM 0.32's ``Scheduler.schedule`` and the effect of its output.

``begin_step`` decides what a step computes and how long it takes, ``finish_step`` applies the result. While a request
decodes, all that changes with a step is one token; so a step of decodes only touches sums per engine, and the state of
a decoding request follows from the engine's tick. Any other step walks the running list as vLLM does.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.simulator.kernel.arrivals import end_turn, log_event
from servegym.envs.simulator.kernel.blocks import adopt_prefix, cached_prefix, evictable, grow, release
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import floats, ints, request_at
from servegym.envs.simulator.kernel.queues import order_queue, peek_waiting, pop_waiting, push_preempted
from servegym.envs.simulator.kernel.state import (
    DECODE,
    FINISHED,
    NONE,
    ORDER_DYNAMIC,
    ORDER_EXTERNAL,
    PREFILL,
    STEP_DECODE,
    STEP_MIXED,
    Engine,
    State,
)

NEVER = np.iinfo(np.int64).max
NOTHING_TO_DO = -1.0
NEEDS_ORDER = -2.0
_EWMA = 0.1  # weight of the newest sample in the router's latency averages


@jit
def total_tokens(s: State, engine: Engine, r: int) -> int:
    """Tokens of a request so far: prompt and generated ones (vLLM's ``num_tokens``)."""
    request = request_at(s.requests_at, r)
    if request.status == DECODE:
        return request.prompt + engine.tick - request.tick0
    return request.prompt + request.generated


@jit
def computed_tokens(s: State, engine: Engine, r: int) -> int:
    """Tokens of a running request whose KV is computed (vLLM's ``num_computed_tokens``)."""
    request = request_at(s.requests_at, r)
    if request.status == DECODE:
        return request.prompt + engine.tick - request.tick0 - 1
    return request.computed


@jit
def _phase(s: State, engine: Engine, r: int) -> int:
    """Class of a decoding request by the ticks at which it needs a new block: tick + phase = 0 modulo block size."""
    return (request_at(s.requests_at, r).prompt - request_at(s.requests_at, r).tick0 - 1) % engine.block_size


@jit
def settle_integrals(engine: Engine, now: float) -> None:
    """Extend the engine's reward integrals to ``now``; called before each change of the router's counters."""
    engine.changed = 1
    span = now - engine.integral_s
    engine.integral_prefill += span * engine.prefill_requests
    engine.integral_inflight += span * engine.inflight
    engine.integral_tpot += span * engine.tpot_rate
    engine.integral_s = now


@jit
def _start_decoding(s: State, engine: Engine, r: int, tick0: int) -> None:
    request = request_at(s.requests_at, r)
    request.status = DECODE
    request.tick0 = tick0
    engine.decoding += 1
    engine.context += request.prompt + engine.tick - tick0
    engine.next_finish = min(engine.next_finish, tick0 + request.output)
    ints(engine.phases_at)[_phase(s, engine, r)] += 1


@jit
def _stop_decoding(s: State, engine: Engine, r: int) -> None:
    """Leave the sums of decoding requests; ``generated`` becomes valid. ``next_finish`` may stay too early."""
    request = request_at(s.requests_at, r)
    ints(engine.phases_at)[_phase(s, engine, r)] -= 1
    engine.decoding -= 1
    engine.context -= total_tokens(s, engine, r)
    request.generated = engine.tick - request.tick0


@jit
def preempt(s: State, engine: Engine, r: int) -> None:
    """Free a running request's blocks and put it back to the queue; the caller takes it off the running list."""
    request = request_at(s.requests_at, r)
    computed = computed_tokens(s, engine, r)
    if request.status == DECODE:
        _stop_decoding(s, engine, r)
    request.preemptions += 1
    release(s, engine, r, computed, True)
    request.computed = 0
    engine.preemptions += 1
    ints(engine.preempted_at)[engine.preempted_count] = r
    engine.preempted_count += 1
    push_preempted(s, engine, r)


@jit
def _victim(s: State, engine: Engine) -> int:
    """Position on the running list of the request to preempt."""
    last = engine.running - 1
    if not engine.priority_preemption:
        return last
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
    engine.running -= 1


@jit
def _schedule_running(s: State, engine: Engine, budget: int, threshold: int) -> int:
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
            victim = ints(engine.running_at)[position]
            taken = ints(engine.scheduled_at)[position] if position < i else 0
            if taken > 0:
                # Its blocks were grown for this step already.
                if request_at(s.requests_at, victim).status == DECODE:
                    _undo_decode(s, engine, victim)
                else:
                    request_at(s.requests_at, victim).computed += taken
            preempt(s, engine, victim)
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
def _undo_decode(s: State, engine: Engine, r: int) -> None:
    """Turn a decoding request that was already scheduled in this step into one with its new block counted."""
    computed = computed_tokens(s, engine, r)
    _stop_decoding(s, engine, r)
    request_at(s.requests_at, r).status = PREFILL
    request_at(s.requests_at, r).computed = computed + 1


@jit
def _clear_rest(s: State, engine: Engine, position: int, budget: int) -> int:
    for i in range(position, engine.running):
        ints(engine.scheduled_at)[i] = 0
    return budget


@jit
def _schedule_waiting(s: State, engine: Engine, budget: int, threshold: int) -> int:
    """Second half of ``Scheduler.schedule``: admit waiting requests while budget, slots and blocks last."""
    size = engine.block_size
    while budget > 0 and engine.waiting > 0 and engine.running < engine.max_num_seqs:
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
def _step_cost(s: State, engine: Engine) -> None:
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
def _begin_decode_step(s: State, engine: Engine) -> bool:
    """Begin a step in which every running request decodes one token; False if blocks run out."""
    size = engine.block_size
    starting, filling = (-engine.tick) % size, (-1 - engine.tick) % size  # phases that begin and complete a block
    needing = ints(engine.phases_at)[starting]
    if needing > engine.free_blocks:
        return False
    if not engine.prefix_caching:
        engine.free_blocks -= needing
    elif needing + ints(engine.phases_at)[filling] > 0:
        for i in range(engine.running):
            phase = ints(engine.phase_of_at)[i]
            if phase in (starting, filling):
                r = ints(engine.running_at)[i]
                grow(s, engine, r, computed_tokens(s, engine, r), 1)
    count = engine.decoding
    engine.step_tokens = count
    engine.step_local_s = (
        engine.fixed_s
        + engine.sequence_s * count
        + floats(engine.local_cost_at)[count]
        + engine.context_s * engine.context
    )
    return True


@jit
def begin_step(s: State, engine: Engine, now: float) -> float:
    """Schedule the next step of an engine.

    Returns:
        The duration in seconds; NOTHING_TO_DO if the engine is idle; NEEDS_ORDER, with nothing changed, if an external
        request policy must score the waiting queue first.
    """
    engine.preempted_count = 0
    if engine.running + engine.waiting == 0:
        return NOTHING_TO_DO
    may_admit = engine.waiting > 0 and engine.running < engine.max_num_seqs
    # A head that did not fit still does not: blocks only become fewer until a request finishes, and without a prefix
    # cache its demand cannot shrink. Orders that change with time have no fixed head.
    if (
        engine.blocked
        and not engine.prefix_caching
        and engine.order != ORDER_DYNAMIC
        and engine.order != ORDER_EXTERNAL
    ):
        may_admit = False
    if (
        engine.decoding == engine.running
        and engine.decoding > 0
        and not may_admit
        and engine.decoding <= engine.max_num_batched_tokens
        and _begin_decode_step(s, engine)
    ):
        engine.activity = STEP_DECODE
    else:
        if engine.order == ORDER_EXTERNAL and may_admit and not engine.ordered:
            return NEEDS_ORDER
        threshold = engine.long_prefill_threshold if engine.running + engine.waiting > 1 else 0
        budget = _schedule_running(s, engine, engine.max_num_batched_tokens, threshold)
        if engine.preempted_count == 0 and may_admit:
            order_queue(s, engine, now)
            _schedule_waiting(s, engine, budget, threshold)
        engine.ordered = 0
        _step_cost(s, engine)
        engine.activity = STEP_MIXED
    engine.peak_blocks = max(engine.peak_blocks, engine.num_blocks - 1 - engine.free_blocks)
    duration = engine.step_local_s + floats(engine.moe_cost_at)[engine.step_tokens]
    return duration * engine.slowdown


@jit
def _first_token(s: State, engine: Engine, r: int, now: float) -> None:
    request = request_at(s.requests_at, r)
    request.first_s = now
    log_event(s, 2 * r)
    engine.prefill_requests -= 1
    engine.prefill_tokens -= request.prompt
    late = now - request.arrival_s - request.deadline_s
    if late > 0:
        engine.integral_late += late
    if request.output > 1:
        engine.tpot_rate += 1.0 / (request.output - 1)
    ttft = now - request.arrival_s
    engine.ttft_ewma_s += (ttft - engine.ttft_ewma_s) * (_EWMA if engine.ttft_ewma_s > 0 else 1.0)


@jit
def _finish(s: State, engine: Engine, r: int, now: float) -> None:
    """Account for a finished request, whose last token needs no KV; its blocks go back."""
    request = request_at(s.requests_at, r)
    release(s, engine, r, request.prompt + request.output - 1, False)
    request.status = FINISHED
    request.generated = request.output
    request.finish_s = now
    engine.finished += 1
    engine.blocked = 0
    engine.inflight -= 1
    engine.inflight_prompt -= request.prompt
    if request.output > 1:
        engine.tpot_rate -= 1.0 / (request.output - 1)
        itl = (now - request.first_s) / (request.output - 1)
        engine.itl_ewma_s += (itl - engine.itl_ewma_s) * (_EWMA if engine.itl_ewma_s > 0 else 1.0)
    end_turn(s, r, now)


@jit
def _finish_decode_step(s: State, engine: Engine, now: float) -> None:
    engine.tick += 1
    engine.context += engine.decoding
    if engine.tick < engine.next_finish:
        return
    settle_integrals(engine, now)
    kept = 0
    next_finish = NEVER
    for i in range(engine.running):
        r = ints(engine.running_at)[i]
        end = request_at(s.requests_at, r).tick0 + request_at(s.requests_at, r).output
        if end <= engine.tick:
            _stop_decoding(s, engine, r)
            _finish(s, engine, r, now)
        else:
            next_finish = min(next_finish, end)
            ints(engine.running_at)[kept] = r
            ints(engine.phase_of_at)[kept] = ints(engine.phase_of_at)[i]
            kept += 1
    engine.running = kept
    engine.next_finish = next_finish


@jit
def _finish_mixed_step(s: State, engine: Engine, now: float) -> None:
    settle_integrals(engine, now)
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
                ints(engine.phases_at)[_phase(s, engine, r)] -= 1
                request.tick0 += 1
                ints(engine.phases_at)[_phase(s, engine, r)] += 1
                engine.context -= 1
            if request.tick0 + request.output <= engine.tick:
                _stop_decoding(s, engine, r)
                _finish(s, engine, r, now)
                continue
        elif tokens > 0:
            request.computed += tokens
            if request.computed == request.prompt + request.generated:
                request.generated += 1
                if request.generated == 1:
                    _first_token(s, engine, r, now)
                if request.generated >= request.output:
                    _finish(s, engine, r, now)
                    continue
                _start_decoding(s, engine, r, engine.tick - request.generated)
        if request.status == DECODE:
            next_finish = min(next_finish, request.tick0 + request.output)
        ints(engine.running_at)[kept] = r
        ints(engine.phase_of_at)[kept] = _phase(s, engine, r) if request.status == DECODE else NONE
        kept += 1
    engine.running = kept
    engine.next_finish = next_finish


@jit
def finish_step(s: State, engine: Engine, now: float) -> None:
    """Apply the running step of an engine, which ends at ``now``."""
    engine.steps += 1
    engine.computed_tokens += engine.step_tokens
    if engine.activity == STEP_DECODE:
        _finish_decode_step(s, engine, now)
    else:
        _finish_mixed_step(s, engine, now)
