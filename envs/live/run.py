"""Live engines behind the interface of the simulated cluster: episodes of the environments in real time.

While the agent thinks, time goes on: what a slow agent costs is in the result.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servegym.baselines.interface import EnginePolicy, ExpertPolicy, FloatArray, QueueView
from servegym.envs.live.options import LiveOptions, Target
from servegym.envs.live.placement import LivePlacement
from servegym.envs.live.records import LiveMemory
from servegym.envs.live.sender import Question, Sender
from servegym.envs.workloads.table import RequestTable
from servegym.errors import EngineError


@dataclass(frozen=True, slots=True)
class LiveSize:
    """What is asked of a cluster's configuration.

    Attributes:
        size: number of engines.
    """

    size: int


class LiveRun:
    """One episode on live engines, with the methods of a simulated cluster.

    Args:
        table: the requests.
        target: the engines.
        options: how they are sent to.
        engine_policy: chooses engines; None if the caller dispatches.
        hold: keep requests back that find no free slot of ``limits.max_num_seqs``; the caller admits them.
        seed: of randomised policies.
        expert_policies: of each engine, which place its experts anew every ``options.replacement_s``.

    Attributes:
        frontend: None: a client's times are measured.
        config: has the number of engines.
        table: the requests.
        target: the engines.
        memory: what is known.
        expert_policies: of each engine; empty where experts stay.
        placement: what they did; None where experts stay.
    """

    def __init__(
        self,
        table: RequestTable,
        target: Target,
        options: LiveOptions,
        engine_policy: EnginePolicy | None = None,
        *,
        hold: bool = False,
        seed: int = 0,
        expert_policies: Sequence[ExpertPolicy] = (),
    ) -> None:
        self.table, self.target = table, target
        self.frontend = None
        self.config = LiveSize(len(target.urls))
        self.memory = LiveMemory.new(table, options, len(target.urls))
        self._pending: Question | None = None
        self._over = False
        self._decided_s = 0.0
        reset = getattr(engine_policy, "reset", None)
        if reset is not None:
            reset(seed)
        self.expert_policies = expert_policies
        self.placement: LivePlacement | None = None
        if expert_policies:
            self.placement = LivePlacement(target.urls, expert_policies, options.replacement_s)
        self._sender = Sender(table, target, options, self.memory, engine_policy, hold, seed, self.placement)

    @property
    def decided_s(self) -> float:
        """Time of the pending decision; at the end, the end."""
        return self._decided_s

    @property
    def finished(self) -> int:
        """Requests that have ended."""
        return self._sender.ended

    @property
    def arrived(self) -> int:
        """Requests that were due."""
        return self._sender.arrived

    @property
    def totals(self) -> FloatArray:
        """Integrals over time of the first reward parts (TTFT, E2E, TPOT) up to ``decided_s``, shape (3,)."""
        requests, until = self.memory.requests, self._decided_s
        arrival = requests["arrival_s"]
        first, finish = (
            np.minimum(np.nan_to_num(requests[name], nan=np.inf), until) for name in ("first_s", "finish_s")
        )
        gaps = np.maximum(requests["output"] - 1, 1)
        decode = np.where(requests["output"] > 1, (finish - first) / gaps, 0.0)
        parts = np.stack([first - arrival, finish - arrival, decode])
        return np.asarray(parts[:, arrival <= until].sum(axis=1))

    def next_decision(self) -> bool:
        """Wait for the next request that needs an engine; False at the end of the run.

        Raises:
            EngineError: sending has failed.
        """
        question = self._next()
        if question is not None:
            assert question.request_row is not None
            assert question.engine_view is not None
            self.memory.request_row, self.memory.engine_view = question.request_row, question.engine_view
        return question is not None

    def dispatch(self, engine: int) -> bool:
        """Send the pending request to ``engine`` and wait for the next decision; False at the end of the run."""
        self._sender.answer(engine)
        return self.next_decision()

    def next_admission(self) -> int | None:
        """Wait for the next engine with a free slot and several requests for it; None at the end of the run."""
        question = self._next()
        if question is None:
            return None
        assert question.queue is not None
        self.memory.context_row = question.queue.context()
        return question.engine

    def admit(self, engine: int, request: int) -> None:
        """Send this request of those that are kept back for an engine."""
        self._sender.answer(request)

    def waiting_requests(self, engine: int) -> tuple[QueueView, npt.NDArray[np.int32]]:
        """Return the requests without a token of an engine, in order of arrival, and which they are."""
        question = self._pending
        if question is not None and question.engine == engine:
            assert question.queue is not None
            assert question.members is not None
            return question.queue, question.members
        members = self._sender.without_token(engine)
        waiting = self.memory.queue(engine, members, self._sender.now_s, self.table)
        return waiting, np.array(members, dtype=np.int32)

    def run_until(self, time_s: float) -> bool:
        """Wait until a time of the run; False if it ended before."""
        try:
            while not self._over:
                self._take(self._sender.asked.get(timeout=max(time_s - self._sender.now_s, 0.001)))
        except queue.Empty:
            pass
        self._decided_s = self._end_s() if self._over else self._sender.now_s
        self._sender.look()
        return not self._over

    def close(self) -> None:
        """End the run; what the engines would still answer is lost."""
        self._sender.stop()

    def _next(self) -> Question | None:
        self._pending = None if self._over else self._take(self._sender.asked.get())
        self._decided_s = self._end_s() if self._pending is None else self._pending.at_s
        self._sender.look()
        return self._pending

    def _take(self, item: Question | BaseException | None) -> Question | None:
        if isinstance(item, BaseException):
            self._over = True
            raise EngineError(f"the live episode failed: {item}") from item
        self._over = item is None
        return item

    def _end_s(self) -> float:
        finish = self.memory.requests["finish_s"]
        return float(np.nanmax(finish)) if np.isfinite(finish).any() else self._sender.now_s
