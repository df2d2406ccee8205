"""The engines as a router sees them: its own exact counters, and telemetry as old as it is.

The columns mean what they mean in the simulator (``servegym.envs.simulator.kernel.dispatch``); a test feeds both the
same events and compares them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from servegym.baselines.interface import (
    E_AVAILABLE,
    E_DECODE_STEP_S,
    E_DISPATCHED,
    E_DISPATCHED_SINCE,
    E_FIRST_TOKEN_S,
    E_FRESH_TOKENS,
    E_HIT_TOKENS,
    E_INDEX_TOKENS,
    E_INFLIGHT,
    E_INFLIGHT_PROMPT_TOKENS,
    E_ITL_EWMA_S,
    E_KV_TOKENS,
    E_KV_USAGE,
    E_MAX_BATCHED_TOKENS,
    E_MAX_NUM_SEQS,
    E_MOE_PRESSURE,
    E_PREFILL_REQUESTS,
    E_PREFILL_TOKENS,
    E_PREFILL_TOKENS_PER_S,
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
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.baselines.prefix_index import PrefixIndex, PrefixIndexConfig
from servegym.configuration import Config

EWMA_WEIGHT = 0.1
"""Weight of a new latency in the moving averages, as in the simulator."""
_HOMES = 100_000
_CONSTANTS = [E_MAX_NUM_SEQS, E_KV_TOKENS, E_MAX_BATCHED_TOKENS, E_PREFILL_TOKENS_PER_S, E_DECODE_STEP_S]
_UNKNOWN = [E_TRUE_PREFILL_TOKENS, E_TRUE_OUTPUT_TOKENS]


class EngineLimits(Config):
    """Constants of an engine that policies read; vLLM's settings, and two calibrated rates."""

    max_num_seqs: Annotated[int, Field(ge=1)] = Field(default=256, description="largest running batch, requests")
    kv_tokens: Annotated[float, Field(gt=0)] = Field(default=500_000.0, description="KV cache capacity, tokens")
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = Field(default=8192, description="token budget of a step")
    prefill_tokens_per_s: Annotated[float, Field(gt=0)] = Field(default=10_000.0, description="measured, tokens/s")
    decode_step_s: Annotated[float, Field(gt=0)] = Field(default=0.01, description="measured, one request, seconds")


@dataclass(frozen=True, slots=True)
class EngineSample:
    """What an engine says of itself at one time; None where it does not say."""

    waiting: float | None
    running: float | None
    kv_usage: float | None


@dataclass(slots=True)
class _Flight:
    """A request that was sent and has not ended."""

    engine: int
    prompt_tokens: int
    uncached_tokens: int
    arrival_s: float
    first_s: float | None = None


class EngineTable:
    """Counters and telemetry of all engines; the caller gives all times, on one clock.

    Args:
        limits: of each engine.
        index: sizes of the prefix index.
        homes: users and sessions that are remembered, each; the oldest are forgotten.
    """

    def __init__(
        self, limits: Sequence[EngineLimits], index: PrefixIndexConfig | None = None, homes: int = _HOMES
    ) -> None:
        self.prefixes = PrefixIndex(len(limits), index)
        self._data = np.zeros((len(limits), ENGINE_COLUMNS))
        for row, limit in zip(self._data, limits, strict=True):
            row[E_MAX_NUM_SEQS] = limit.max_num_seqs
            row[E_KV_TOKENS] = limit.kv_tokens
            row[E_MAX_BATCHED_TOKENS] = limit.max_num_batched_tokens
            row[E_PREFILL_TOKENS_PER_S] = limit.prefill_tokens_per_s
            row[E_DECODE_STEP_S] = limit.decode_step_s
        self._data[:, [E_AVAILABLE, E_MOE_PRESSURE]] = 1.0
        self._data[:, _UNKNOWN] = np.nan
        self._sampled_s = np.zeros(len(limits))
        self._dispatched_at_sample = np.zeros(len(limits))
        self._flights: dict[int, _Flight] = {}
        self._users: OrderedDict[int, int] = OrderedDict()
        self._sessions: OrderedDict[int, int] = OrderedDict()
        self._homes = homes
        self._matched: tuple[tuple[int, float], FloatArray] = (-1, 0.0), np.zeros(len(limits))
        self.last_engine = -1

    def __len__(self) -> int:
        return len(self._data)

    def view(self, request: RequestView, blocks: Sequence[Hashable] = ()) -> EngineViews:
        """Return the engines as they are for the dispatch of a request.

        Args:
            request: the request.
            blocks: hashes of its prompt's blocks, for the prefix index.
        """
        data = self._data.copy()
        data[:, E_TELEMETRY_AGE_S] = self.telemetry_age_s(request.now_s)
        data[:, E_DISPATCHED_SINCE] = data[:, E_DISPATCHED] - self._dispatched_at_sample
        data[:, E_INDEX_TOKENS] = self.prefixes.tokens()
        if blocks:
            data[:, E_HIT_TOKENS] = self._hits(request, blocks)
        for column, homes, key in (
            (E_USER_HOME, self._users, request.user),
            (E_SESSION_HOME, self._sessions, request.session),
        ):
            if key in homes:
                data[homes[key], column] = 1.0
        return EngineViews(data)

    def dispatched(self, request: RequestView, engine: int, blocks: Sequence[Hashable] = ()) -> None:
        """Note that a request was sent to an engine."""
        row = self._data[engine]
        row[E_INFLIGHT] += 1
        row[E_INFLIGHT_PROMPT_TOKENS] += request.prompt_tokens
        row[E_PREFILL_REQUESTS] += 1
        row[E_PREFILL_TOKENS] += request.prompt_tokens
        row[E_DISPATCHED] += 1
        uncached = request.prompt_tokens - (int(self._hits(request, blocks)[engine]) if blocks else 0)
        row[[E_UNCACHED_TOKENS, E_FRESH_TOKENS]] += uncached
        self._flights[request.index] = _Flight(engine, request.prompt_tokens, uncached, request.arrival_s)
        self.last_engine = engine
        for homes, key in ((self._users, request.user), (self._sessions, request.session)):
            if key >= 0:
                homes[key] = engine
                homes.move_to_end(key)
                if len(homes) > self._homes:
                    homes.popitem(last=False)
        if blocks:
            self.prefixes.insert(engine, blocks, request.now_s)

    def moved(self, index: int, engine: int) -> None:
        """Note that another engine serves a request than it was first sent to."""
        flight = self._flights.get(index)
        if flight is None or flight.engine == engine:
            return
        waits = flight.first_s is None
        for row, sign in ((self._data[flight.engine], -1), (self._data[engine], 1)):
            row[E_INFLIGHT] += sign
            row[E_INFLIGHT_PROMPT_TOKENS] += sign * flight.prompt_tokens
            row[E_PREFILL_REQUESTS] += sign * waits
            row[E_PREFILL_TOKENS] += sign * waits * flight.prompt_tokens
            row[E_UNCACHED_TOKENS] += sign * waits * flight.uncached_tokens
            row[E_FRESH_TOKENS] = max(row[E_FRESH_TOKENS] + sign * waits * flight.uncached_tokens, 0)
        flight.engine = engine

    def first_token(self, index: int, now_s: float) -> None:
        """Note that a request got its first token."""
        flight = self._flights.get(index)
        if flight is None or flight.first_s is not None:
            return
        flight.first_s = now_s
        row = self._data[flight.engine]
        row[E_PREFILL_REQUESTS] -= 1
        row[E_PREFILL_TOKENS] -= flight.prompt_tokens
        row[E_UNCACHED_TOKENS] -= flight.uncached_tokens
        row[E_FRESH_TOKENS] = 0
        row[E_FIRST_TOKEN_S] = now_s
        self._average(row, E_TTFT_EWMA_S, now_s - flight.arrival_s)

    def finished(self, index: int, now_s: float, output_tokens: int) -> None:
        """Note that a request got its last token."""
        flight = self._flights.get(index)
        if flight is not None and flight.first_s is not None and output_tokens > 1:
            mean = (now_s - flight.first_s) / (output_tokens - 1)
            self._average(self._data[flight.engine], E_ITL_EWMA_S, mean)
        self.lost(index)

    def lost(self, index: int) -> None:
        """Note that a request has ended, however; what it took is free again."""
        flight = self._flights.pop(index, None)
        if flight is None:
            return
        row = self._data[flight.engine]
        row[E_INFLIGHT] -= 1
        row[E_INFLIGHT_PROMPT_TOKENS] -= flight.prompt_tokens
        if flight.first_s is None:
            row[E_PREFILL_REQUESTS] -= 1
            row[E_PREFILL_TOKENS] -= flight.prompt_tokens
            row[E_UNCACHED_TOKENS] -= flight.uncached_tokens
            row[E_FRESH_TOKENS] = min(row[E_FRESH_TOKENS], row[E_UNCACHED_TOKENS])

    def renew(self, engine: int) -> None:
        """Let another engine take a place: what was counted and known of the one before is forgotten."""
        row = self._data[engine]
        constants = row[_CONSTANTS].copy()
        row[:] = 0.0
        row[_CONSTANTS] = constants
        row[_UNKNOWN] = np.nan
        row[E_MOE_PRESSURE] = 1.0
        self._sampled_s[engine] = self._dispatched_at_sample[engine] = 0.0
        self.prefixes.clear(engine)
        for homes in (self._users, self._sessions):
            for key in [key for key, home in homes.items() if home == engine]:
                del homes[key]

    @property
    def data(self) -> FloatArray:
        """The columns ``E_*`` as they are, shape (engines, ENGINE_COLUMNS), for a look only."""
        return self._data

    def telemetry_age_s(self, now_s: float) -> FloatArray:
        """Return the age of each engine's telemetry, shape (engines,); 0 for what was taken after that time."""
        return np.maximum(now_s - self._sampled_s, 0.0)

    def sampled(self, engine: int, sample: EngineSample, taken_s: float) -> None:
        """Take in what an engine said of itself at a time."""
        row = self._data[engine]
        for column, value in (
            (E_WAITING, sample.waiting),
            (E_RUNNING, sample.running),
            (E_KV_USAGE, sample.kv_usage),
        ):
            if value is not None:
                row[column] = value
        self._sampled_s[engine] = taken_s
        self._dispatched_at_sample[engine] = row[E_DISPATCHED]

    def set_available(self, engine: int, available: bool) -> None:
        """Say whether an engine may be chosen; one that is gone has forgotten its cache."""
        if not available and self._data[engine, E_AVAILABLE] > 0:
            self.prefixes.clear(engine)
        self._data[engine, E_AVAILABLE] = float(available)

    def _hits(self, request: RequestView, blocks: Sequence[Hashable]) -> FloatArray:
        """Return the prompt tokens believed cached on each engine; asked twice for a request, looked up once."""
        key = (request.index, request.now_s)
        if self._matched[0] != key:
            matched = self.prefixes.match(blocks, request.now_s)
            self._matched = key, np.minimum(matched, request.prompt_tokens - 1)
        return self._matched[1]

    @staticmethod
    def _average(row: FloatArray, column: int, value: float) -> None:
        row[column] += (value - row[column]) * (EWMA_WEIGHT if row[column] > 0 else 1.0)
