"""What a policy sees and what it answers, at each of the three layers.

A policy *scores candidates*; the lowest score wins and the caller picks. Heuristics and networks are the same kind of
object. Views hold only what a live deployment can observe: telemetry of an engine is as old as its scrape, counters
that the router keeps itself are exact, and the output length of a request is nowhere.

Engine and queue views are read-only windows onto one matrix of float64, a row per engine or waiting request and a
column per property, so that a view costs nothing to make and a compiled policy reads the very same numbers. The
column indices below are that layout's single definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Columns of EngineViews.data, shape (engines, ENGINE_COLUMNS).
E_AVAILABLE = 0
E_WAITING = 1
E_RUNNING = 2
E_KV_USAGE = 3
E_TELEMETRY_AGE_S = 4
E_INFLIGHT = 5
E_INFLIGHT_PROMPT_TOKENS = 6
E_PREFILL_REQUESTS = 7
E_PREFILL_TOKENS = 8
E_HIT_TOKENS = 9
E_USER_HOME = 10
E_SESSION_HOME = 11
E_TTFT_EWMA_S = 12
E_ITL_EWMA_S = 13
E_DISPATCHED = 14
E_DISPATCHED_SINCE = 15
E_MAX_NUM_SEQS = 16
E_KV_TOKENS = 17
E_MAX_BATCHED_TOKENS = 18
E_PREFILL_TOKENS_PER_S = 19
E_DECODE_STEP_S = 20
E_MOE_PRESSURE = 21
E_INDEX_TOKENS = 22
E_TRUE_PREFILL_TOKENS = 23
E_TRUE_OUTPUT_TOKENS = 24
E_UNCACHED_TOKENS = 25
E_FRESH_TOKENS = 26
E_FIRST_TOKEN_S = 27
ENGINE_COLUMNS = 28

# Columns of QueueView.data, shape (waiting, QUEUE_COLUMNS).
Q_WAIT_S = 0
Q_PROMPT_TOKENS = 1
Q_COMPUTED_TOKENS = 2
Q_PRIORITY = 3
Q_DEADLINE_S = 4
Q_USER = 5
Q_SESSION = 6
Q_TURN = 7
Q_PREEMPTIONS = 8
Q_ARRIVAL_S = 9
Q_OUTPUT_TOKENS = 10
Q_PREDICTED_TOKENS = 11
Q_USER_SERVED = 12
Q_INDEX = 13
QUEUE_COLUMNS = 14

# Entries of the context row that a compiled request policy reads beside a row of QueueView.data.
C_NOW_S = 0
C_RUNNING = 1
C_MAX_NUM_SEQS = 2
C_FREE_BLOCKS = 3
C_TOTAL_BLOCKS = 4
C_BLOCK_SIZE = 5
C_PREFILL_TOKENS_PER_S = 6
# Of a queue that is scored anew at each step; 0 where a score is taken once, on arrival.
C_WAITING = 7
C_WAITING_TOKENS = 8
CONTEXT_COLUMNS = 9

# Entries of the request row that a compiled engine policy reads, shape (REQUEST_COLUMNS,).
R_NOW_S = 0
R_ARRIVAL_S = 1
R_PROMPT_TOKENS = 2
R_PRIORITY = 3
R_DEADLINE_S = 4
R_USER = 5
R_SESSION = 6
R_TURN = 7
R_INDEX = 8
R_LAST_ENGINE = 9
R_UNIFORM_0 = 10
R_UNIFORM_1 = 11
R_PREFIX_KEY = 12
R_RECEIVED_TOKENS = 13
REQUEST_COLUMNS = 14


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request that is to be dispatched. ``-1`` stands for an unknown user or session.

    Attributes:
        index: identity of the request within the run; also the key of per-request randomness.
        now_s: time of the decision, seconds on the run's clock.
        arrival_s: arrival at the router, same clock.
        prompt_tokens: length of the prompt.
        priority: smaller runs first, as in vLLM.
        user: user id.
        session: session id.
        turn: 0 for the first request of a session.
        deadline_s: seconds after arrival by which the first token is due; ``inf`` without one.
        last_engine: engine that the previous request was sent to, -1 at the start of a run.
        uniforms: two draws from [0, 1) keyed by the run's seed and the request's index. Randomised policies use these
            instead of a generator of their own, which makes every policy a pure function of its views and pairs the
            randomness of runs that compare policies.
        prefix_key: hash of the first blocks of the prompt, equal for requests that begin alike, from 1 to 2^52; 0 where
            the router knows of no other request that could.
        received_tokens: output tokens that its client has already, of a request that lost its engine.
    """

    index: int
    now_s: float
    arrival_s: float
    prompt_tokens: int
    priority: int = 0
    user: int = -1
    session: int = -1
    turn: int = 0
    deadline_s: float = float("inf")
    last_engine: int = -1
    uniforms: tuple[float, float] = (0.0, 0.0)
    prefix_key: int = 0
    received_tokens: int = 0

    def row(self) -> FloatArray:
        """Return the ``R_*`` entries as one float64 row, as compiled policies read them. Shape (REQUEST_COLUMNS,)."""
        return np.array(
            [
                self.now_s,
                self.arrival_s,
                self.prompt_tokens,
                self.priority,
                self.deadline_s,
                self.user,
                self.session,
                self.turn,
                self.index,
                self.last_engine,
                *self.uniforms,
                self.prefix_key,
                self.received_tokens,
            ],
            dtype=np.float64,
        )


class _Column:
    """A column of a view's matrix as an attribute, shape (rows,)."""

    def __init__(self, index: int, text: str) -> None:
        self.index = index
        self.__doc__ = text

    def __get__(self, view: EngineViews | QueueView, owner: type | None = None) -> FloatArray:
        return view.data[:, self.index]


@dataclass(frozen=True, slots=True)
class EngineViews:
    """The engines of a cluster as the router sees them at one decision; every property has shape (engines,).

    Attributes:
        data: float64 matrix, shape (engines, ENGINE_COLUMNS), read-only by contract.
    """

    data: FloatArray

    def __len__(self) -> int:
        return len(self.data)

    available = _Column(E_AVAILABLE, "1 where a request may be sent, 0 where the engine is down or draining")
    # Telemetry: as old as `telemetry_age_s`.
    waiting = _Column(E_WAITING, "requests in the engine's waiting queue (telemetry)")
    running = _Column(E_RUNNING, "requests in the engine's running batch (telemetry)")
    kv_usage = _Column(E_KV_USAGE, "share of KV blocks in use, 0..1 (telemetry)")
    moe_pressure = _Column(
        E_MOE_PRESSURE, "load of the engine's expert-parallel ranks over the mean of all; 1 if unknown (telemetry)"
    )
    telemetry_age_s = _Column(E_TELEMETRY_AGE_S, "age of the columns above, seconds")
    # Counters of the router itself: exact.
    inflight = _Column(E_INFLIGHT, "requests dispatched and not finished (exact)")
    inflight_prompt_tokens = _Column(E_INFLIGHT_PROMPT_TOKENS, "prompt tokens of the requests in flight (exact)")
    prefill_requests = _Column(E_PREFILL_REQUESTS, "requests in flight without first token (exact)")
    prefill_tokens = _Column(E_PREFILL_TOKENS, "prompt tokens of requests in flight without first token (exact)")
    uncached_tokens = _Column(E_UNCACHED_TOKENS, "of prefill_tokens those believed not cached at dispatch (exact)")
    fresh_tokens = _Column(E_FRESH_TOKENS, "of uncached_tokens those sent after the engine's last first token (exact)")
    first_token_s = _Column(E_FIRST_TOKEN_S, "time of the engine's last first token, clock of now_s; 0 before (exact)")
    hit_tokens = _Column(E_HIT_TOKENS, "prompt tokens of this request that the router believes cached there")
    index_tokens = _Column(E_INDEX_TOKENS, "tokens that the router's prefix index holds of the engine (exact)")
    user_home = _Column(E_USER_HOME, "1 at the engine that served this user last, else 0")
    session_home = _Column(E_SESSION_HOME, "1 at the engine that served this session last, else 0")
    ttft_ewma_s = _Column(E_TTFT_EWMA_S, "moving average of TTFT of finished first tokens, seconds")
    itl_ewma_s = _Column(E_ITL_EWMA_S, "moving average of the mean inter-token latency of finished requests, seconds")
    dispatched = _Column(E_DISPATCHED, "requests sent there since the start of the run")
    dispatched_since = _Column(E_DISPATCHED_SINCE, "requests sent there since the telemetry snapshot was taken")
    # Constants of the engine.
    max_num_seqs = _Column(E_MAX_NUM_SEQS, "largest running batch, requests")
    kv_tokens = _Column(E_KV_TOKENS, "KV cache capacity, tokens")
    max_batched_tokens = _Column(E_MAX_BATCHED_TOKENS, "token budget of a step")
    prefill_tokens_per_s = _Column(E_PREFILL_TOKENS_PER_S, "calibrated prefill rate at a full token budget, tokens/s")
    decode_step_s = _Column(E_DECODE_STEP_S, "calibrated duration of a decode step of one request, seconds")
    # The truth: NaN unless the run grants it to an oracle policy, which only a simulator can.
    true_prefill_tokens = _Column(E_TRUE_PREFILL_TOKENS, "tokens yet to prefill; NaN unless an oracle is granted it")
    true_output_tokens = _Column(E_TRUE_OUTPUT_TOKENS, "tokens yet to generate; NaN unless an oracle is granted it")


@dataclass(frozen=True, slots=True)
class QueueView:
    """The waiting queue of one engine; every column has shape (waiting,), in order of arrival at the engine.

    ``output_tokens`` is NaN unless the run grants an oracle policy the true output length, which only a simulator
    can; ``predicted_tokens`` is NaN unless the workload carries a prediction; ``user_served`` is NaN unless the policy
    asks for it by an attribute ``served_weights``.

    Attributes:
        data: float64 matrix, shape (waiting, QUEUE_COLUMNS), read-only by contract.
        now_s: time of the decision.
        running: requests in the running batch.
        max_num_seqs: largest running batch.
        free_blocks: free KV blocks.
        total_blocks: all KV blocks.
        block_size: tokens per KV block.
        prefill_tokens_per_s: calibrated prefill rate of the engine.
    """

    data: FloatArray
    now_s: float
    running: int
    max_num_seqs: int
    free_blocks: int
    total_blocks: int
    block_size: int
    prefill_tokens_per_s: float

    def __len__(self) -> int:
        return len(self.data)

    def context(self) -> FloatArray:
        """Return the ``C_*`` entries as one row, as compiled policies read them. Shape (CONTEXT_COLUMNS,)."""
        row = np.empty(CONTEXT_COLUMNS)
        row[C_NOW_S], row[C_RUNNING], row[C_MAX_NUM_SEQS] = self.now_s, self.running, self.max_num_seqs
        row[C_FREE_BLOCKS], row[C_TOTAL_BLOCKS] = self.free_blocks, self.total_blocks
        row[C_BLOCK_SIZE], row[C_PREFILL_TOKENS_PER_S] = self.block_size, self.prefill_tokens_per_s
        row[C_WAITING] = len(self.data)
        row[C_WAITING_TOKENS] = (self.prompt_tokens - self.computed_tokens).sum()
        return row

    wait_s = _Column(Q_WAIT_S, "now - arrival, seconds")
    prompt_tokens = _Column(Q_PROMPT_TOKENS, "tokens to be in the KV cache before the next output token")
    computed_tokens = _Column(Q_COMPUTED_TOKENS, "tokens already computed (0 after a preemption)")
    priority = _Column(Q_PRIORITY, "smaller runs first")
    deadline_s = _Column(Q_DEADLINE_S, "seconds after arrival by which the first token is due; inf without one")
    user = _Column(Q_USER, "user id, -1 if unknown")
    session = _Column(Q_SESSION, "session id, -1 if unknown")
    turn = _Column(Q_TURN, "0 for the first request of a session")
    preemptions = _Column(Q_PREEMPTIONS, "times the request was preempted")
    arrival_s = _Column(Q_ARRIVAL_S, "arrival time, seconds on the run's clock")
    output_tokens = _Column(Q_OUTPUT_TOKENS, "true output length; NaN unless an oracle is granted it")
    predicted_tokens = _Column(Q_PREDICTED_TOKENS, "predicted output length; NaN without a prediction")
    user_served = _Column(
        Q_USER_SERVED, "weighted tokens served to the user here, earlier waiting prompts of the user included"
    )
    index = _Column(Q_INDEX, "identity of the request within the run; the key of per-request randomness")


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Expert activations of a window as a live engine can report them.

    Attributes:
        tokens: routed tokens per layer and logical expert, shape (layers, experts).
        by_source: the same per source EP rank, shape (layers, ranks, experts), or None.
        coactivation: joint counts of experts of adjacent layers, shape (layers - 1, experts, experts), or None.
        steps: engine steps in the window.
    """

    tokens: FloatArray
    by_source: FloatArray | None = None
    coactivation: FloatArray | None = None
    steps: int = 0
    future: FloatArray | None = None
    expert_bytes: float = 0.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Which logical expert each physical slot holds; slot ``p`` is on EP rank ``p // (slots / ranks)``, as in vLLM.

    Attributes:
        physical_to_logical: shape (layers, slots), int64.
        ranks: EP ranks.
    """

    physical_to_logical: IntArray
    ranks: int


@runtime_checkable
class RequestPolicy(Protocol):
    """Orders the waiting queue of one engine."""

    def score(self, queue: QueueView) -> FloatArray:
        """Return one score per waiting request, shape (waiting,); the lowest is admitted first."""
        ...


@runtime_checkable
class EnginePolicy(Protocol):
    """Chooses the engine for one request."""

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return one score per engine, shape (engines,); the lowest wins, ``inf`` means not allowed."""
        ...


@runtime_checkable
class ExpertPolicy(Protocol):
    """Decides which slot holds which expert."""

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return a new placement, or None to keep the current one."""
        ...


class PolicyHooks:
    """Optional events for policies that keep state; a policy overrides those that it needs.

    The caller looks the hooks up once, so a policy without them costs nothing.
    """

    def reset(self, seed: int) -> None:
        """Forget everything and seed the policy's own randomness; called before each run."""

    def on_dispatch(self, request: RequestView, engine: int) -> None:
        """Note that a request was sent to an engine."""

    def on_first_token(self, request_index: int, engine: int, now_s: float) -> None:
        """Note that a request got its first token."""

    def on_finish(self, request_index: int, engine: int, now_s: float, output_tokens: int) -> None:
        """Note that a request finished; its output length is known from here on."""


def pick(scores: FloatArray, allowed: FloatArray) -> int:
    """Return the index of the lowest finite score among the allowed candidates; ties go to the lowest index.

    Falls back to the first allowed candidate when the policy excluded all of them, so that a policy can never lose a
    request. Returns -1 if none is allowed.

    >>> pick(np.array([2.0, 1.0, 0.5]), np.array([1.0, 1.0, 0.0]))
    1
    """
    masked = np.where((allowed > 0) & ~np.isnan(scores), scores, np.inf)
    best = int(masked.argmin())
    if masked[best] < np.inf:
        return best
    candidates = np.flatnonzero(allowed > 0)
    return int(candidates[0]) if len(candidates) else -1
