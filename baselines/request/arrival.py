"""The two queues that vLLM has: first come first served, and priority classes."""

from __future__ import annotations

from typing import ClassVar, Literal

from servegym.baselines.heuristic import RequestHeuristic
from servegym.baselines.interface import Q_ARRIVAL_S, Q_PRIORITY, FloatArray, QueueView
from servegym.baselines.registry import register

# Longer than any run, so that the arrival only decides within a priority class: 115 days in seconds.
CLASS_WIDTH_S = 1e7


@register("request", "fcfs", source="vLLM 0.32, v1/core/sched/request_queue.py, FCFSRequestQueue")
class Fcfs(RequestHeuristic):
    """First come, first served: vLLM's default.

    ``score = arrival_s``. In vLLM a preempted request returns to the head of the queue; as it arrived before all that
    still wait for their first admission, the score says the same.
    """

    static: ClassVar[bool] = True
    native: ClassVar[Literal["fcfs", "priority"] | None] = "fcfs"

    def score(self, queue: QueueView) -> FloatArray:
        """Return the arrival times, shape (waiting,)."""
        scores: FloatArray = queue.arrival_s.copy()
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        return item[Q_ARRIVAL_S]  # type: ignore[no-any-return]


@register("request", "priority", source="vLLM 0.32, v1/core/sched/request_queue.py, PriorityRequestQueue")
class Priority(RequestHeuristic):
    """Smallest (priority, arrival) first: vLLM's ``--scheduling-policy priority``.

    ``score = priority * 1e7 s + arrival_s``: one number in that order for runs of up to 115 days. Within a class,
    arrivals closer than a float64 can tell (2 microseconds at priority 1,000) count as equal.
    """

    static: ClassVar[bool] = True
    native: ClassVar[Literal["fcfs", "priority"] | None] = "priority"

    def score(self, queue: QueueView) -> FloatArray:
        """Return the keys, shape (waiting,)."""
        scores: FloatArray = queue.priority * CLASS_WIDTH_S + queue.arrival_s
        return scores

    @staticmethod
    def compiled(item: FloatArray, context: FloatArray, params: FloatArray) -> float:
        """Score one waiting request."""
        return item[Q_PRIORITY] * CLASS_WIDTH_S + item[Q_ARRIVAL_S]  # type: ignore[no-any-return]
