"""How a request proceeds on an engine: decoding, first token, end, preemption, and the counters that follow it.

While a request decodes, all that changes with a step is one token; so its state follows from the engine's tick, and the
engine keeps sums over its decoding requests.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.simulator.kernel.arrivals import end_turn, log_event
from servegym.envs.simulator.kernel.blocks import in_flight, release
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import ints, longs, request_at
from servegym.envs.simulator.kernel.queues import push_preempted
from servegym.envs.simulator.kernel.served import charge
from servegym.envs.simulator.kernel.state import DECODE, FINISHED, LEAVING, NONE, Engine, State

NEVER = np.iinfo(np.int64).max
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
def block_phase(s: State, engine: Engine, r: int) -> int:
    """Class of a decoding request by the ticks at which it needs a new block: tick + phase = 0 modulo block size."""
    return (request_at(s.requests_at, r).prompt - request_at(s.requests_at, r).tick0 - 1) % engine.block_size


@jit
def mark_changed(s: State, engine: Engine) -> None:
    """Have the engine's counters shown anew in the next view."""
    if not engine.changed:
        engine.changed = 1
        ints(s.changed_at)[s.changed_count] = engine.index
        s.changed_count += 1


@jit
def settle_integrals(s: State, engine: Engine, now: float) -> None:
    """Extend the engine's reward integrals to ``now``; called before each change of the router's counters."""
    mark_changed(s, engine)
    span = now - engine.integral_s
    engine.integral_prefill += span * engine.prefill_requests
    engine.integral_inflight += span * engine.inflight
    engine.integral_tpot += span * engine.tpot_rate
    engine.integral_s = now


@jit
def start_decoding(s: State, engine: Engine, r: int, tick0: int) -> None:
    """Enter the sums of decoding requests; ``generated`` follows from the tick from here on."""
    request = request_at(s.requests_at, r)
    request.status = DECODE
    request.tick0 = tick0
    request.skipped = NONE
    engine.decoding += 1
    engine.context += request.prompt + engine.tick - tick0
    engine.next_finish = min(engine.next_finish, tick0 + request.output)
    ints(engine.phases_at)[block_phase(s, engine, r)] += 1
    if engine.tasks > 0:
        longs(engine.task_decoding_at)[request.task] += 1


@jit
def stop_decoding(s: State, engine: Engine, r: int) -> None:
    """Leave the sums of decoding requests; ``generated`` becomes valid. ``next_finish`` may stay too early."""
    request = request_at(s.requests_at, r)
    ints(engine.phases_at)[block_phase(s, engine, r)] -= 1
    engine.decoding -= 1
    engine.context -= total_tokens(s, engine, r)
    if engine.tasks > 0:
        longs(engine.task_decoding_at)[request.task] -= 1
    request.generated = engine.tick - request.tick0


@jit
def preempt(s: State, engine: Engine, r: int, taken: int) -> None:
    """Free a running request's blocks and put it back to the queue; the caller takes it off the running list.

    Args:
        s: the cluster.
        engine: the engine.
        r: the request.
        taken: its tokens that were scheduled in this step already, for which it holds blocks.
    """
    request = request_at(s.requests_at, r)
    computed = computed_tokens(s, engine, r) + taken
    if not in_flight(engine, request):
        request.skipped = engine.tick
    if request.status == DECODE:
        stop_decoding(s, engine, r)
    request.preemptions += 1
    if s.serving:
        charge(s, engine, r, request.generated)
    release(s, engine, r, computed, True)
    request.computed = 0
    engine.preemptions += 1
    ints(engine.preempted_at)[engine.preempted_count] = r
    engine.preempted_count += 1
    push_preempted(s, engine, r)


@jit
def first_token(s: State, engine: Engine, r: int, now: float) -> None:
    """Account for a first token; it reaches the router as the step ends."""
    request = request_at(s.requests_at, r)
    request.first_s = now
    log_event(s, 2 * r)
    engine.prefill_requests -= 1
    engine.prefill_tokens -= request.prompt
    engine.uncached_tokens -= request.uncached
    engine.fresh_tokens = 0
    engine.first_token_s = now
    if request.output > 1:
        engine.tpot_rate += 1.0 / (request.output - 1)
    ttft = now - request.arrival_s
    engine.ttft_ewma_s += (ttft - engine.ttft_ewma_s) * (_EWMA if engine.ttft_ewma_s > 0 else 1.0)


@jit
def conclude(s: State, engine: Engine, r: int, now: float, place: int) -> None:
    """End a request with its last token, or, scheduling ahead, have it wait for the end of the step.

    Args:
        s: the cluster.
        engine: the engine.
        r: the request, no longer among those that decode; its last token needs no KV.
        now: the time.
        place: requests before it on the running list, which the caller takes it off.
    """
    request = request_at(s.requests_at, r)
    if not engine.ahead:
        release(s, engine, r, request.prompt + request.output - 1, False)
        finish_request(s, engine, r, now)
        return
    request.status = LEAVING
    if s.serving:
        charge(s, engine, r, request.output)
    ints(engine.leaving_at)[engine.leaving] = r
    ints(engine.leaving_place_at)[engine.leaving] = place
    engine.leaving += 1


@jit
def finish_request(s: State, engine: Engine, r: int, now: float) -> None:
    """Account for a finished request, whose blocks have gone back."""
    request = request_at(s.requests_at, r)
    request.status = FINISHED
    request.generated = request.output
    if s.serving:
        charge(s, engine, r, request.output)
    request.finish_s = now
    engine.finished += 1
    engine.blocked = 0
    engine.inflight -= 1
    engine.inflight_prompt -= request.prompt
    engine.inflight_output -= request.output
    if request.output > 1:
        engine.tpot_rate -= 1.0 / (request.output - 1)
        itl = (now - request.first_s) / (request.output - 1)
        engine.itl_ewma_s += (itl - engine.itl_ewma_s) * (_EWMA if engine.itl_ewma_s > 0 else 1.0)
    end_turn(s, r, now)


@jit
def true_prefill_tokens(s: State, engine: Engine) -> int:
    """Tokens that the engine's requests, waiting and running, must compute before each can generate its next one."""
    tokens = engine.waiting_tokens
    for i in range(engine.running):
        r = ints(engine.running_at)[i]
        if request_at(s.requests_at, r).status != DECODE:
            tokens += total_tokens(s, engine, r) - computed_tokens(s, engine, r)
    return tokens


@jit
def true_output_tokens(s: State, engine: Engine) -> int:
    """Tokens that the engine's requests, waiting and running, will still generate."""
    tokens = engine.inflight_output - engine.waiting_generated
    for i in range(engine.running):
        r = ints(engine.running_at)[i]
        tokens -= total_tokens(s, engine, r) - request_at(s.requests_at, r).prompt
    for i in range(engine.leaving):
        tokens -= request_at(s.requests_at, ints(engine.leaving_at)[i]).output
    return tokens


@jit
def place_running(s: State, engine: Engine, r: int, position: int) -> None:
    """Put a request on the running list, with what a step needs to know of it beside it."""
    request = request_at(s.requests_at, r)
    ints(engine.running_at)[position] = r
    if request.status == DECODE:
        ints(engine.phase_of_at)[position] = block_phase(s, engine, r)
        longs(engine.end_of_at)[position] = request.tick0 + request.output
    else:
        ints(engine.phase_of_at)[position] = NONE


@jit
def advance_prefill(s: State, engine: Engine, r: int, tokens: int, now: float, place: int) -> bool:
    """Apply a chunk of prefill; with the last one a token is generated. True if that ends the request.

    ``place`` is as in :func:`conclude`.
    """
    request = request_at(s.requests_at, r)
    request.computed += tokens
    if tokens == 0 or request.computed < request.prompt + request.generated:
        return False
    request.generated += 1
    if request.generated == 1:
        if engine.ahead:
            ints(engine.firsts_at)[engine.firsts] = r
            engine.firsts += 1
        else:
            first_token(s, engine, r, now)
    if request.generated >= request.output:
        conclude(s, engine, r, now, place)
        return True
    start_decoding(s, engine, r, engine.tick - request.generated)
    return False
