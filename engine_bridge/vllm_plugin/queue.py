"""The waiting queue of an engine, ordered by a policy before each step.

vLLM's scheduler looks at the head (``peek_request``), may skip it (``pop_request`` and later ``prepend_requests``),
admits it (``pop_request``), or stops there for this step; what it peeks at is what it pops next, so that the order
changes between steps only. What it puts back, preempted requests and skipped ones, goes first, as in its own queues.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from servegym.baselines.interface import (
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
    FloatArray,
    QueueView,
)
from servegym.engine_bridge.vllm_plugin.served import ServedCounters

Scores = Callable[[QueueView], FloatArray | None]


class PolicyQueue:
    """Waiting requests in the order of a policy; vLLM's ``RequestQueue`` by its methods.

    Requests are vLLM's own; of each only attributes are read, with defaults where a version of vLLM lacks one.
    """

    def __init__(self) -> None:
        self._front: deque[Any] = deque()
        # Last first, so that the head is cheap to take.
        self._ordered: list[Any] = []
        self._rows = np.empty((64, QUEUE_COLUMNS))
        self._new: deque[Any] = deque()
        self._count = 0
        self._served: ServedCounters | None = None

    # ------------------------------------------------------------------------------------------------ ordering
    def count_served(self, weights: tuple[float, float] | None, running: Iterable[Any]) -> None:
        """Keep counters of what users have been served, for a policy with such weights; call it around each step.

        Args:
            weights: per prompt and per output token; None: the policy needs none.
            running: requests of the running batch.
        """
        if weights is None:
            self._served = None
            return
        if self._served is None or self._served.weights != weights:
            self._served = ServedCounters(weights, lambda request: float(request_row(request, 0)[Q_USER]))
            for request in (*self._ordered, *self._new):
                self._served.wait(request)
        self._served.update(running)

    def reorder(self, scores: Scores, context: dict[str, Any]) -> None:
        """Order what waits, by scores; without scores, by arrival.

        Args:
            scores: scores a queue.
            context: the fields of a QueueView beside its data.
        """
        for request in self._new:
            if len(self._ordered) == len(self._rows):
                self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
            self._rows[len(self._ordered)] = request_row(request, self._count)
            self._ordered.append(request)
            self._count += 1
        self._new.clear()
        count = len(self._ordered)
        if count < 2:
            return
        rows = self._rows[:count]
        rows[:, Q_WAIT_S] = np.maximum(context["now_s"] - rows[:, Q_ARRIVAL_S], 0.0)
        if self._served is not None:
            self._served.fill(rows)
        found = scores(QueueView(data=rows.copy(), **context))
        arrival = rows[:, Q_INDEX]
        order = np.lexsort((arrival, np.zeros(count) if found is None else found))[::-1]
        self._ordered = [self._ordered[i] for i in order]
        self._rows[:count] = rows[order]

    # ------------------------------------------------------------------------------------------------ vLLM's methods
    def add_request(self, request: Any) -> None:
        """Add a new request at the end."""
        self._new.append(request)
        if self._served is not None:
            self._served.wait(request)

    def peek_request(self) -> Any:
        """Return the head.

        Raises:
            IndexError: nothing waits.
        """
        if self._front:
            return self._front[0]
        return self._ordered[-1] if self._ordered else self._new[0]

    def pop_request(self) -> Any:
        """Take the head.

        Raises:
            IndexError: nothing waits.
        """
        if self._front:
            return self._front.popleft()
        return self._ordered.pop() if self._ordered else self._new.popleft()

    def prepend_request(self, request: Any) -> None:
        """Put a request before all others."""
        self._front.appendleft(request)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        """Put requests before all others, the last one first, as vLLM's own queue does."""
        self._front.extendleft(requests)

    def remove_request(self, request: Any) -> None:
        """Take a request out, wherever it stands."""
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Any]) -> None:
        """Take requests out, wherever they stand."""
        requests = list(requests)
        if self._served is not None:
            for request in requests:
                self._served.gone(request)
        gone = {id(request) for request in requests}
        self._front = deque(request for request in self._front if id(request) not in gone)
        self._new = deque(request for request in self._new if id(request) not in gone)
        kept = [i for i, request in enumerate(self._ordered) if id(request) not in gone]
        self._rows[: len(kept)] = self._rows[kept]
        self._ordered = [self._ordered[i] for i in kept]

    def __bool__(self) -> bool:
        return bool(self._front or self._ordered or self._new)

    def __len__(self) -> int:
        return len(self._front) + len(self._ordered) + len(self._new)

    def __iter__(self) -> Iterator[Any]:
        yield from self._front
        yield from reversed(self._ordered)
        yield from self._new


def request_row(request: Any, index: int) -> FloatArray:
    """Return what a policy sees of a waiting request, shape (QUEUE_COLUMNS,); the wait is filled in at each step.

    ``vllm_xargs`` of the request may carry ``user``, ``session`` (numbers or names), ``turn``, ``deadline_s`` and
    ``predicted_tokens``.

    Args:
        request: vLLM's.
        index: its place in the order of arrival.
    """
    extra = getattr(getattr(request, "sampling_params", None), "extra_args", None) or {}
    prompt = float(getattr(request, "num_prompt_tokens", 0) or getattr(request, "num_tokens", 1))
    row = np.empty(QUEUE_COLUMNS)
    row[Q_WAIT_S] = 0.0
    row[Q_ARRIVAL_S] = float(getattr(request, "arrival_time", 0.0))
    row[Q_PROMPT_TOKENS] = prompt
    row[Q_COMPUTED_TOKENS] = float(getattr(request, "num_computed_tokens", 0))
    row[Q_PRIORITY] = float(getattr(request, "priority", 0))
    row[Q_DEADLINE_S] = _number(extra.get("deadline_s"), math.inf)
    row[Q_USER] = _identity(extra.get("user"))
    row[Q_SESSION] = _identity(extra.get("session"))
    row[Q_TURN] = _number(extra.get("turn"), 0.0)
    row[Q_PREEMPTIONS] = float(getattr(request, "num_preemptions", 0))
    row[Q_OUTPUT_TOKENS] = math.nan
    row[Q_PREDICTED_TOKENS] = _number(extra.get("predicted_tokens"), math.nan)
    row[Q_USER_SERVED] = math.nan
    row[Q_INDEX] = index
    return row


def _number(value: Any, default: float) -> float:
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        return default


def _identity(value: Any) -> float:
    """A number for a name: the name itself where it is one, else a hash that a float64 holds exactly; -1 for none."""
    if value is None or isinstance(value, bool):
        return -1.0
    if isinstance(value, int | float) and 0 <= value < 2**52:
        return float(int(value))
    digest = hashlib.blake2b(str(value).encode(), digest_size=6).digest()
    return float(int.from_bytes(digest, "big"))
