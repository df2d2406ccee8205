"""Policies that the kernel cannot call by themselves: it stops, Python scores, and it goes on."""

from __future__ import annotations

import numpy as np

from servegym.baselines.interface import EnginePolicy, RequestPolicy, pick
from servegym.baselines.user_code import checked_scores, not_a_number
from servegym.envs.simulator.build import Memory
from servegym.envs.simulator.views import engine_views, queue_view, request_view


def score_queue(policy: RequestPolicy, memory: Memory, engine: int) -> None:
    """Order the waiting queue of an engine by a request policy's scores.

    Raises:
        InputError: scores of another shape, or not a number.
    """
    queue, members = queue_view(memory, engine)
    scores = checked_scores(policy, policy.score(queue), len(queue))
    if np.isnan(scores).any():
        raise not_a_number(policy)
    memory.requests["key"][members] = scores
    memory.engines["ordered"][engine] = 1


class EngineChooser:
    """Asks an engine policy, and tells it what became of its requests.

    Attributes:
        log_events: whether the kernel is to log first tokens and ends, for the policy's hooks.
    """

    def __init__(self, policy: EnginePolicy | None) -> None:
        self._policy = policy
        names = ("on_dispatch", "on_first_token", "on_finish")
        self._hooks = {name: getattr(policy, name) for name in names if hasattr(policy, name)}
        self._events_seen = 0
        self.log_events = bool(self._hooks.keys() & {"on_first_token", "on_finish"})

    def choose(self, memory: Memory) -> int:
        """Return the engine that the policy picks for the pending request.

        Raises:
            InputError: scores of another shape, or no number for any available engine.
        """
        policy = self._policy
        if policy is None:
            raise RuntimeError("the cluster has no engine policy; use next_decision() and dispatch()")
        self._deliver_events(memory)
        request, engines = request_view(memory), engine_views(memory)
        scores = checked_scores(policy, policy.score(request, engines), len(engines))
        choice = pick(scores, engines.available)
        if not scores[choice] < np.inf and np.isnan(scores[engines.available > 0]).any():
            raise not_a_number(policy)
        if "on_dispatch" in self._hooks:
            self._hooks["on_dispatch"](request, choice)
        return choice

    def _deliver_events(self, memory: Memory) -> None:
        count = int(memory.cluster["event_count"][0])
        fresh = memory.events[self._events_seen : count]
        self._events_seen = count
        requests = memory.requests
        times = np.where(fresh % 2 == 0, requests["first_s"][fresh // 2], requests["finish_s"][fresh // 2])
        for position in np.argsort(times, kind="stable"):
            r, ended = divmod(int(fresh[position]), 2)
            engine, time = int(requests["engine"][r]), float(times[position])
            if ended and "on_finish" in self._hooks:
                self._hooks["on_finish"](r, engine, time, int(requests["output"][r]))
            elif not ended and "on_first_token" in self._hooks:
                self._hooks["on_first_token"](r, engine, time)
