"""The waiting queue of an engine: vLLM's two queues, and the queue of a request policy.

- FCFS: a linked list; preempted requests go to its front (vLLM's deque).
- Priority: a heap over (priority, arrival, id); preempted requests go back into it (vLLM's heap).
- A policy: preempted requests wait in a front list that is served first, last preempted first, as the in-engine shim
  does it; the others stand in a heap if the policy's score never changes, else in a list that is scanned for its
  minimum.

Heaps are pairing heaps threaded through the request records, so that a queue of any length needs no memory of its own.
"""

from __future__ import annotations

import math
from typing import Any

from numba import carray

from servegym.baselines.interface import (
    C_BLOCK_SIZE,
    C_FREE_BLOCKS,
    C_MAX_NUM_SEQS,
    C_NOW_S,
    C_PREFILL_TOKENS_PER_S,
    C_RUNNING,
    C_TOTAL_BLOCKS,
    C_WAITING,
    C_WAITING_TOKENS,
    CONTEXT_COLUMNS,
    Q_ARRIVAL_S,
    Q_COMPUTED_TOKENS,
    Q_DEADLINE_S,
    Q_INDEX,
    Q_OUTPUT_TOKENS,
    Q_PREDICTED_TOKENS,
    Q_PREEMPTIONS,
    Q_PRIORITY,
    Q_PROMPT_TOKENS,
    Q_SESSION,
    Q_TURN,
    Q_USER,
    Q_USER_SERVED,
    Q_WAIT_S,
    QUEUE_COLUMNS,
)
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import call_request_key, engine_at, floats, request_at
from servegym.envs.simulator.kernel.served import begin_reading, join_queue, leave_queue, user_served
from servegym.envs.simulator.kernel.state import (
    NONE,
    ORDER_DYNAMIC,
    ORDER_FCFS,
    ORDER_PICK,
    ORDER_PRIORITY,
    ORDER_STATIC,
    WAITING,
    Engine,
    State,
)


@jit
def _before(s: State, a: int, b: int) -> bool:
    """Heap order: key, then arrival, then rank."""
    x, y = request_at(s.requests_at, a), request_at(s.requests_at, b)
    if x.key != y.key:
        return x.key < y.key
    if x.arrival_s != y.arrival_s:
        return x.arrival_s < y.arrival_s
    return x.rank < y.rank


@jit
def _meld(s: State, a: int, b: int) -> int:
    """Join two heaps; NONE stands for an empty one."""
    if a == NONE:
        return b
    if b == NONE:
        return a
    if _before(s, b, a):
        a, b = b, a
    request_at(s.requests_at, b).link = request_at(s.requests_at, a).heap_child
    request_at(s.requests_at, a).heap_child = b
    return a


@jit
def _without_root(s: State, root: int) -> int:
    """The heap that remains when its root is taken away: siblings are melded in pairs, then right to left."""
    pairs = NONE
    current = request_at(s.requests_at, root).heap_child
    while current != NONE:
        following = request_at(s.requests_at, current).link
        request_at(s.requests_at, current).link = NONE
        if following == NONE:
            merged, rest = current, NONE
        else:
            rest = request_at(s.requests_at, following).link
            request_at(s.requests_at, following).link = NONE
            merged = _meld(s, current, following)
        request_at(s.requests_at, merged).link = pairs
        pairs = merged
        current = rest
    result = NONE
    while pairs != NONE:
        following = request_at(s.requests_at, pairs).link
        request_at(s.requests_at, pairs).link = NONE
        result = _meld(s, result, pairs)
        pairs = following
    return result


@jit
def queue_row(s: State) -> Any:
    """Scratch row of one waiting request, shape (QUEUE_COLUMNS,)."""
    return carray(floats(s.queue_row_at), (QUEUE_COLUMNS,))


@jit
def context_row(s: State) -> Any:
    """Scratch row of one engine's context, shape (CONTEXT_COLUMNS,)."""
    return carray(floats(s.context_row_at), (CONTEXT_COLUMNS,))


@jit
def _policy_key(s: State) -> float:
    """Score the request in the scratch rows with the compiled policy."""
    key = call_request_key(
        s.request_key_at, s.queue_row_at, s.context_row_at, s.request_params_at, s.request_param_count
    )
    if math.isnan(key):
        s.request_nan = 1
    return key


@jit
def fill_queue_row(s: State, r: int, now: float) -> None:
    """Write the ``Q_*`` entries of one waiting request into the scratch row."""
    request, row = request_at(s.requests_at, r), queue_row(s)
    row[Q_WAIT_S] = now - request.arrival_s
    row[Q_PROMPT_TOKENS] = request.prompt + request.generated
    row[Q_COMPUTED_TOKENS] = request.computed
    row[Q_PRIORITY] = request.priority
    row[Q_DEADLINE_S] = request.deadline_s
    row[Q_USER] = request.user
    row[Q_SESSION] = request.session
    row[Q_TURN] = request.turn
    row[Q_PREEMPTIONS] = request.preemptions
    row[Q_ARRIVAL_S] = request.arrival_s
    row[Q_OUTPUT_TOKENS] = request.output if s.oracle else math.nan
    row[Q_PREDICTED_TOKENS] = request.predicted_tokens
    row[Q_USER_SERVED] = user_served(s, r)
    row[Q_INDEX] = r


@jit
def fill_context_row(s: State, engine: Engine, now: float) -> None:
    """Write the ``C_*`` entries of an engine into the scratch row."""
    row = context_row(s)
    row[C_NOW_S] = now
    row[C_RUNNING] = engine.running + engine.leaving
    row[C_MAX_NUM_SEQS] = engine.max_num_seqs
    row[C_FREE_BLOCKS] = engine.free_blocks
    row[C_TOTAL_BLOCKS] = engine.num_blocks - 1
    row[C_BLOCK_SIZE] = engine.block_size
    row[C_PREFILL_TOKENS_PER_S] = engine.prefill_tokens_per_s
    row[C_WAITING] = 0.0
    row[C_WAITING_TOKENS] = 0.0


@jit
def _measure_queue(s: State, engine: Engine) -> None:
    """Write what waits, preempted requests apart, into the scratch row of the context."""
    row = context_row(s)
    r = engine.queue_head
    while r != NONE:
        request = request_at(s.requests_at, r)
        row[C_WAITING] += 1.0
        row[C_WAITING_TOKENS] += request.prompt + request.generated - request.computed
        r = request.link


@jit
def push_waiting(s: State, engine: Engine, r: int, now: float) -> None:
    """Add an arrived request to the waiting queue."""
    request = request_at(s.requests_at, r)
    request.status = WAITING
    request.link = NONE
    request.heap_child = NONE
    engine.waiting += 1
    engine.waiting_tokens += request.prompt + request.generated
    engine.waiting_generated += request.generated
    if s.serving:
        join_queue(s, engine, r)
    engine.ordered = 0
    if engine.order == ORDER_PRIORITY:
        request.key = request.priority
        engine.heap = _meld(s, engine.heap, r)
    elif engine.order == ORDER_STATIC:
        fill_queue_row(s, r, now)
        fill_context_row(s, engine, now)
        request.key = _policy_key(s)
        engine.heap = _meld(s, engine.heap, r)
    else:
        if engine.queue_head == NONE:
            engine.queue_head = r
        else:
            request_at(s.requests_at, engine.queue_tail).link = r
        engine.queue_tail = r
    if engine.order != ORDER_FCFS:
        engine.blocked = 0  # the newcomer may stand before the head that did not fit


@jit
def push_preempted(s: State, engine: Engine, r: int) -> None:
    """Put a preempted request back."""
    request = request_at(s.requests_at, r)
    request.status = WAITING
    request.heap_child = NONE
    engine.waiting += 1
    engine.waiting_tokens += request.prompt + request.generated
    engine.waiting_generated += request.generated
    engine.blocked = 0
    if engine.order == ORDER_PRIORITY:
        request.link = NONE
        request.key = request.priority
        engine.heap = _meld(s, engine.heap, r)
    else:
        request.link = engine.front
        engine.front = r


@jit
def order_queue(s: State, engine: Engine, now: float) -> None:
    """Score the whole list of a policy whose scores change with time; once a step, as the in-engine shim does."""
    if engine.order != ORDER_DYNAMIC:
        return
    fill_context_row(s, engine, now)
    _measure_queue(s, engine)
    begin_reading(s, engine)
    r = engine.queue_head
    while r != NONE:
        fill_queue_row(s, r, now)
        request_at(s.requests_at, r).key = _policy_key(s)
        r = request_at(s.requests_at, r).link


@jit
def needs_pick(engine: Engine) -> bool:
    """Whether an agent must choose among several waiting requests; preempted ones go first, as in vLLM."""
    undecided = engine.order == ORDER_PICK and engine.picked == NONE and engine.front == NONE
    return undecided and engine.queue_head != engine.queue_tail


@jit
def peek_waiting(s: State, engine: Engine) -> int:
    """The request to admit next; the queue is not empty."""
    if engine.front != NONE:
        return engine.front
    if engine.order == ORDER_FCFS:
        return engine.queue_head
    if engine.order == ORDER_PICK:
        return engine.queue_head if engine.picked == NONE else engine.picked
    if engine.order == ORDER_PRIORITY or engine.order == ORDER_STATIC:
        return engine.heap
    best = engine.queue_head
    r = request_at(s.requests_at, best).link
    while r != NONE:
        # The list is in order of arrival, so that ties go to the earliest; NaN never wins.
        key, lowest = request_at(s.requests_at, r).key, request_at(s.requests_at, best).key
        if key < lowest or math.isnan(lowest):
            best = r
        r = request_at(s.requests_at, r).link
    return best


@jit
def pop_waiting(s: State, engine: Engine, r: int) -> None:
    """Remove the request that ``peek_waiting`` returned."""
    engine.waiting -= 1
    request = request_at(s.requests_at, r)
    engine.waiting_tokens -= request.prompt + request.generated
    engine.waiting_generated -= request.generated
    if s.serving:
        leave_queue(s, engine, r)
    if r == engine.front:
        engine.front = request_at(s.requests_at, r).link
    elif engine.order == ORDER_PRIORITY or engine.order == ORDER_STATIC:
        engine.heap = _without_root(s, r)
    elif r == engine.queue_head:
        engine.queue_head = request_at(s.requests_at, r).link
    else:
        before = engine.queue_head
        while request_at(s.requests_at, before).link != r:
            before = request_at(s.requests_at, before).link
        request_at(s.requests_at, before).link = request_at(s.requests_at, r).link
        if engine.queue_tail == r:
            engine.queue_tail = before
    request_at(s.requests_at, r).link = NONE
    engine.picked = NONE


@jit
def read_queue_of(cluster: Any, e: int, rows: Any, members: Any, context: Any) -> int:
    """Copy the queue of an engine whose order an external policy decides, in order of arrival.

    Args:
        cluster: the cluster's record, an array of one.
        e: the engine.
        rows: output, shape (at least waiting, QUEUE_COLUMNS).
        members: output, indices of the requests, shape (at least waiting,).
        context: output, shape (CONTEXT_COLUMNS,).

    Returns:
        Number of requests; those preempted stand before the queue and are not part of it.
    """
    s = cluster[0]
    engine = engine_at(s.engines_at, e)
    now = s.step_s if s.lockstep else floats(s.event_s_at)[e]
    fill_context_row(s, engine, now)
    _measure_queue(s, engine)
    context[:] = context_row(s)
    begin_reading(s, engine)
    count = 0
    r = engine.queue_head
    while r != NONE:
        fill_queue_row(s, r, now)
        rows[count, :] = queue_row(s)
        members[count] = r
        count += 1
        r = request_at(s.requests_at, r).link
    return count
