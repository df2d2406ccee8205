"""The router: what it sees of the engines, its choice, and the hand-over of a request to an engine."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, farray

from servegym.baselines.interface import (
    E_AVAILABLE,
    E_DISPATCHED,
    E_DISPATCHED_SINCE,
    E_FIRST_TOKEN_S,
    E_FRESH_TOKENS,
    E_HIT_TOKENS,
    E_INDEX_TOKENS,
    E_INFLIGHT,
    E_INFLIGHT_PROMPT_TOKENS,
    E_ITL_EWMA_S,
    E_KV_USAGE,
    E_MOE_PRESSURE,
    E_PREFILL_REQUESTS,
    E_PREFILL_TOKENS,
    E_RUNNING,
    E_SESSION_HOME,
    E_TELEMETRY_AGE_S,
    E_TRUE_OUTPUT_TOKENS,
    E_TRUE_PREFILL_TOKENS,
    E_TTFT_EWMA_S,
    E_UNCACHED_TOKENS,
    E_USER_HOME,
    E_WAITING,
    ENGINE_COLUMNS,
    R_ARRIVAL_S,
    R_DEADLINE_S,
    R_INDEX,
    R_LAST_ENGINE,
    R_NOW_S,
    R_PREFIX_KEY,
    R_PRIORITY,
    R_PROMPT_TOKENS,
    R_RECEIVED_TOKENS,
    R_SESSION,
    R_TURN,
    R_UNIFORM_0,
    R_UNIFORM_1,
    R_USER,
    REQUEST_COLUMNS,
)
from servegym.envs.simulator.kernel.arrivals import push_later
from servegym.envs.simulator.kernel.blocks import mix
from servegym.envs.simulator.kernel.experts.step import pressure
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import (
    call_engine_score,
    engine_at,
    experts_at,
    floats,
    ints,
    lru_at,
    request_at,
    telemetry_at,
)
from servegym.envs.simulator.kernel.prefix_index import insert_prefix, match_prefix, prefix_key
from servegym.envs.simulator.kernel.progress import settle_integrals, true_output_tokens, true_prefill_tokens
from servegym.envs.simulator.kernel.queues import push_waiting
from servegym.envs.simulator.kernel.state import IDLE, NONE, READY, State


@jit
def _uniform(seed: int, index: int, salt: int) -> float:
    """A draw from [0, 1) keyed by the run's seed and a request."""
    return np.float64(np.uint64(mix(mix(seed, salt), index)) >> np.uint64(11)) * 2.0**-53


@jit
def take_telemetry(s: State, time: float) -> None:
    """Take the next snapshot of all engines that report."""
    depth = s.telemetry_depth
    now, before = s.telemetry_count % depth, (s.telemetry_count - 1) % depth
    for e in range(s.engine_count):
        if engine_at(s.engines_at, e).reporting:
            _measure(s, e, time, now)
        else:
            _repeat(s, e, before, now)
    s.telemetry_count += 1


@jit
def _measure(s: State, e: int, time: float, slot: int) -> None:
    engine, sample = engine_at(s.engines_at, e), telemetry_at(s.telemetry_at, slot * s.engine_count + e)
    sample.time_s = time
    sample.waiting = engine.waiting
    sample.running = engine.running + engine.leaving
    sample.kv_usage = 1.0 - engine.free_blocks / (engine.num_blocks - 1)
    sample.moe_pressure = pressure(experts_at(s.groups_at, engine.group), e) if s.groups_at != 0 else 1.0
    sample.dispatched = engine.dispatched


@jit
def _repeat(s: State, e: int, before: int, now: int) -> None:
    """A silent engine: the newest snapshot shows what the one before showed."""
    old = telemetry_at(s.telemetry_at, before * s.engine_count + e)
    new = telemetry_at(s.telemetry_at, now * s.engine_count + e)
    new.time_s = old.time_s
    new.waiting = old.waiting
    new.running = old.running
    new.kv_usage = old.kv_usage
    new.moe_pressure = old.moe_pressure
    new.dispatched = old.dispatched


@jit
def _visible_snapshot(s: State, now: float) -> int:
    """Number of the newest snapshot that has arrived at the router."""
    newest = math.floor((now - s.telemetry_lag_s) / s.telemetry_period_s)
    return min(max(newest, 0), s.telemetry_count - 1)


@jit
def _view(s: State) -> Any:
    """The matrix of the engines, shape (engines, ENGINE_COLUMNS), column by column so that a column is one stretch."""
    return farray(floats(s.engine_view_at), (s.engine_count, ENGINE_COLUMNS))


@jit
def _show(s: State, view: Any, e: int, slot: int) -> None:
    """Write what does not depend on the request."""
    engine = engine_at(s.engines_at, e)
    sample = telemetry_at(s.telemetry_at, slot * s.engine_count + e)
    floats(s.snapshot_s_at)[e] = sample.time_s
    view[e, E_AVAILABLE] = engine.accepting
    view[e, E_WAITING] = sample.waiting
    view[e, E_RUNNING] = sample.running
    view[e, E_KV_USAGE] = sample.kv_usage
    view[e, E_MOE_PRESSURE] = sample.moe_pressure
    view[e, E_INFLIGHT] = engine.inflight
    view[e, E_INFLIGHT_PROMPT_TOKENS] = engine.inflight_prompt
    view[e, E_PREFILL_REQUESTS] = engine.prefill_requests
    view[e, E_PREFILL_TOKENS] = engine.prefill_tokens
    view[e, E_UNCACHED_TOKENS] = engine.uncached_tokens
    view[e, E_FRESH_TOKENS] = engine.fresh_tokens
    view[e, E_FIRST_TOKEN_S] = engine.first_token_s
    view[e, E_TTFT_EWMA_S] = engine.ttft_ewma_s
    view[e, E_ITL_EWMA_S] = engine.itl_ewma_s
    view[e, E_DISPATCHED] = engine.dispatched
    if s.indexing:
        view[e, E_INDEX_TOKENS] = lru_at(s.index_lru_at, e).count * s.index_block_tokens
    view[e, E_DISPATCHED_SINCE] = engine.dispatched - sample.dispatched


@jit
def _show_engines(s: State, view: Any, now: float) -> None:
    """Bring the view up to date: all engines after a new snapshot, else those whose counters have changed."""
    count = s.engine_count
    live = s.telemetry_period_s == 0.0
    number = 0 if live else _visible_snapshot(s, now)
    slot = number % s.telemetry_depth
    if live:
        for e in range(count):
            if engine_at(s.engines_at, e).reporting:
                _measure(s, e, now, 0)
    if live or number != s.shown_snapshot:
        for e in range(count):
            _show(s, view, e, slot)
    else:
        for i in range(s.changed_count):
            _show(s, view, ints(s.changed_at)[i], slot)
    for i in range(s.changed_count):
        engine_at(s.engines_at, ints(s.changed_at)[i]).changed = 0
    s.changed_count = 0
    s.shown_snapshot = number
    for e in range(count):
        view[e, E_TELEMETRY_AGE_S] = now - floats(s.snapshot_s_at)[e]


@jit
def _show_affinity(s: State, view: Any, r: int) -> None:
    """Write where the request's user and session have been before."""
    request = request_at(s.requests_at, r)
    if s.affinity_shown:
        for e in range(s.engine_count):
            view[e, E_USER_HOME] = 0.0
            view[e, E_SESSION_HOME] = 0.0
    s.affinity_shown = request.user != NONE or request.session != NONE
    if request.user != NONE and ints(s.user_engine_at)[request.user] != NONE:
        view[ints(s.user_engine_at)[request.user], E_USER_HOME] = 1.0
    if request.session != NONE and ints(s.session_engine_at)[request.session] != NONE:
        view[ints(s.session_engine_at)[request.session], E_SESSION_HOME] = 1.0


@jit
def _show_hits(s: State, view: Any, r: int, now: float) -> None:
    """Write what of the prompt the router believes cached on each engine."""
    hits = match_prefix(s, r, now)
    if hits > 0 or s.hits_shown:
        longest = request_at(s.requests_at, r).prompt - 1
        for e in range(s.engine_count):
            matched = lru_at(s.index_lru_at, e).matched if hits > 0 else 0
            view[e, E_HIT_TOKENS] = min(matched * s.index_block_tokens, longest)
    s.hits_shown = hits > 0


@jit
def _show_truth(s: State, view: Any) -> None:
    """Write the unfinished work that only an oracle sees."""
    for e in range(s.engine_count):
        engine = engine_at(s.engines_at, e)
        view[e, E_TRUE_PREFILL_TOKENS] = true_prefill_tokens(s, engine)
        view[e, E_TRUE_OUTPUT_TOKENS] = true_output_tokens(s, engine)


@jit
def fill_view(s: State, r: int, now: float) -> None:
    """Write what the router knows for the dispatch of request ``r``; constants of engines stand there already."""
    request = request_at(s.requests_at, r)
    view = _view(s)
    _show_engines(s, view, now)
    _show_affinity(s, view, r)
    if s.indexing:
        _show_hits(s, view, r, now)
    if s.dispatch_oracle:
        _show_truth(s, view)
    row = carray(floats(s.request_row_at), (REQUEST_COLUMNS,))
    row[R_NOW_S] = now
    row[R_ARRIVAL_S] = request.arrival_s
    row[R_PROMPT_TOKENS] = request.prompt
    row[R_PRIORITY] = request.priority
    row[R_DEADLINE_S] = request.deadline_s
    row[R_USER] = request.user
    row[R_SESSION] = request.session
    row[R_TURN] = request.turn
    row[R_INDEX] = r
    row[R_LAST_ENGINE] = s.last_engine
    row[R_UNIFORM_0] = _uniform(s.seed, r, 0)
    row[R_UNIFORM_1] = _uniform(s.seed, r, 1)
    row[R_PREFIX_KEY] = prefix_key(s, r) if s.indexing else 0.0
    row[R_RECEIVED_TOKENS] = request.generated


@jit
def choose(s: State) -> int:
    """The engine that the compiled policy scores lowest; without such a policy, the first that accepts requests.

    NONE if no engine accepts requests.
    """
    scores = carray(floats(s.scores_at), (s.engine_count,))
    if s.engine_score_at != 0:
        call_engine_score(
            s.engine_score_at,
            s.request_row_at,
            s.engine_view_at,
            s.engine_params_at,
            s.scores_at,
            s.engine_count,
            s.engine_param_count,
        )
    view = _view(s)
    best, lowest = NONE, math.inf
    for e in range(s.engine_count):
        if scores[e] < lowest and view[e, E_AVAILABLE] > 0.0:
            best, lowest = e, scores[e]
    if best == NONE:  # the policy excluded all
        for e in range(s.engine_count - 1, -1, -1):
            if view[e, E_AVAILABLE] > 0.0:
                best = e
                if math.isnan(scores[e]):
                    s.engine_nan = 1
    return best


@jit
def hand_over(s: State, r: int, e: int, now: float) -> None:
    """Send request ``r`` to engine ``e``."""
    engine, request = engine_at(s.engines_at, e), request_at(s.requests_at, r)
    settle_integrals(s, engine, now)
    request.engine = e
    engine.inflight += 1
    engine.inflight_prompt += request.prompt
    engine.inflight_output += request.output
    if request.generated == 0:
        engine.prefill_requests += 1
        engine.prefill_tokens += request.prompt
        request.uncached = request.prompt
        if s.hits_shown:
            request.uncached -= int(_view(s)[e, E_HIT_TOKENS])
        engine.uncached_tokens += request.uncached
        engine.fresh_tokens += request.uncached
    elif request.output > 1:
        engine.tpot_rate += 1.0 / (request.output - 1)  # re-dispatched in the middle of its output
    engine.dispatched += 1
    s.last_engine = e
    if request.user != NONE:
        ints(s.user_engine_at)[request.user] = e
    if request.session != NONE:
        ints(s.session_engine_at)[request.session] = e
    if s.indexing and engine.prefix_caching:
        insert_prefix(s, r, e, now)
    push_waiting(s, engine, r, now)
    if engine.activity == IDLE and not engine.hung:
        engine.activity = READY
        floats(s.event_s_at)[e] = now
        if s.lockstep and not s.stepping:
            s.stepping = 1
            s.step_s = now


@jit
def strand(s: State, r: int, now: float) -> None:
    """Keep a request that found no engine, until one returns."""
    request = request_at(s.requests_at, r)
    request.link = s.stranded
    request.key = now
    s.stranded = r


@jit
def rescue(s: State, now: float) -> None:
    """Let stranded requests arrive again; the time they were stranded enters the reward integrals."""
    engine = engine_at(s.engines_at, 0)
    while s.stranded != NONE:
        r = s.stranded
        request = request_at(s.requests_at, r)
        s.stranded = request.link
        request.link = NONE
        span = now - request.key
        engine.integral_inflight += span
        if request.generated == 0:
            engine.integral_prefill += span
        elif request.output > 1:
            engine.integral_tpot += span / (request.output - 1)
        push_later(s, r, now)
