"""The common step: every decoding request decodes, and the requests behind them on the running list prefill.

Then decoding requests need no look at each of them: sums tell what they cost, and counts by phase how many begin a new
block. vLLM's own walk comes to the same schedule as long as blocks and the token budget suffice, which is checked
first.
"""

from __future__ import annotations

from servegym.envs.simulator.kernel.blocks import grow, take_blocks
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import floats, ints, longs, request_at
from servegym.envs.simulator.kernel.progress import (
    NEVER,
    advance_prefill,
    computed_tokens,
    conclude,
    place_running,
    settle_integrals,
    stop_decoding,
)
from servegym.envs.simulator.kernel.state import NONE, Engine, State


@jit
def _chunk(s: State, engine: Engine, i: int, budget: int, threshold: int) -> int:
    """Tokens that the prefilling request at a position of the running list gets."""
    request = request_at(s.requests_at, ints(engine.running_at)[i])
    tokens = request.prompt + request.generated - request.computed
    if 0 < threshold < tokens:
        tokens = threshold
    return min(tokens, budget)


@jit
def schedule_steady(s: State, engine: Engine, threshold: int) -> int:
    """Schedule the running requests.

    Returns:
        The token budget that is left, or -1, with nothing changed, if vLLM's walk is needed.
    """
    size = engine.block_size
    decoding = engine.decoding
    budget = engine.max_num_batched_tokens - decoding
    if budget < 0 or (engine.starved and engine.prefix_caching):
        return -1
    # Phases that begin and complete a block. Scheduling ahead, a block is cached once its last token is known.
    starting = (-engine.tick) % size
    filling = starting if engine.ahead else (-1 - engine.tick) % size
    needed = ints(engine.phases_at)[starting]
    if engine.running > decoding:
        for i in range(decoding):
            if ints(engine.phase_of_at)[i] == NONE:
                return -1
        left = budget
        for i in range(decoding, engine.running):
            tokens = _chunk(s, engine, i, left, threshold)
            computed = request_at(s.requests_at, ints(engine.running_at)[i]).computed
            needed += (computed + tokens + size - 1) // size - (computed + size - 1) // size
            left -= tokens
    if needed > engine.free_blocks:
        return -1
    if not engine.prefix_caching:
        engine.free_blocks -= ints(engine.phases_at)[starting]
    elif engine.findable == 0 and not engine.ahead:
        take_blocks(engine, ints(engine.phases_at)[starting])
    elif ints(engine.phases_at)[starting] + ints(engine.phases_at)[filling] > 0:
        for i in range(decoding):
            phase = ints(engine.phase_of_at)[i]
            if phase in (starting, filling):
                r = ints(engine.running_at)[i]
                grow(s, engine, r, computed_tokens(s, engine, r), 1)
    for i in range(decoding, engine.running):
        tokens = _chunk(s, engine, i, budget, threshold)
        r = ints(engine.running_at)[i]
        if tokens > 0:
            grow(s, engine, r, request_at(s.requests_at, r).computed, tokens)
        ints(engine.scheduled_at)[i] = tokens
        budget -= tokens
    return budget


@jit
def steady_cost(s: State, engine: Engine) -> None:
    """Tokens and duration of the step, without MoE layers."""
    tokens = sequences = engine.decoding
    pairs = 0.0
    for i in range(engine.decoding, engine.running):
        chunk = ints(engine.scheduled_at)[i]
        if chunk > 0:
            tokens += chunk
            sequences += 1
            computed = request_at(s.requests_at, ints(engine.running_at)[i]).computed
            pairs += chunk * (computed + (chunk + 1) * 0.5)
    engine.step_tokens = tokens
    engine.step_local_s = (
        engine.fixed_s
        + engine.sequence_s * sequences
        + floats(engine.local_cost_at)[tokens]
        + engine.pair_s * pairs
        + engine.context_s * engine.context
    )


@jit
def finish_steady_step(s: State, engine: Engine, now: float) -> None:
    """Apply the step that ends at ``now``."""
    decoding, running = engine.decoding, engine.running
    engine.tick += 1
    engine.context += decoding
    if engine.tick < engine.next_finish and running == decoding:
        return
    settle_integrals(s, engine, now)
    kept = decoding
    if engine.tick >= engine.next_finish:
        kept = 0
        next_finish = NEVER
        for i in range(decoding):
            r, end = ints(engine.running_at)[i], longs(engine.end_of_at)[i]
            if end <= engine.tick:
                stop_decoding(s, engine, r)
                conclude(s, engine, r, now, kept)
            else:
                next_finish = min(next_finish, end)
                ints(engine.running_at)[kept] = r
                ints(engine.phase_of_at)[kept] = ints(engine.phase_of_at)[i]
                longs(engine.end_of_at)[kept] = end
                kept += 1
        engine.next_finish = next_finish
    for i in range(decoding, running):
        r = ints(engine.running_at)[i]
        if advance_prefill(s, engine, r, ints(engine.scheduled_at)[i], now, kept):
            continue
        place_running(s, engine, r, kept)
        kept += 1
    engine.running = kept
