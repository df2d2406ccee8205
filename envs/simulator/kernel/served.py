"""Virtual counters of what users have been served on an engine, for fair orders of its queue (VTC, arXiv 2401.00588).

A counter grows by a weight per prompt token when a request is admitted and by another per output token. It is brought
up to date only when it is read, and for a request that leaves the running batch. A user without waiting requests who
sends one is lifted to the least counter of those who have some, or, if nobody has, to that of the user admitted last:
idle time is no credit.
"""

from __future__ import annotations

import math

from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import floats, ints, request_at
from servegym.envs.simulator.kernel.state import DECODE, NONE, Engine, State


@jit
def _user(s: State, r: int) -> int:
    user = request_at(s.requests_at, r).user
    return s.user_count if user == NONE else user


@jit
def charge(s: State, engine: Engine, r: int, generated: int) -> None:
    """Charge a request's user for what was not charged yet: its prompt, once, and its output so far."""
    request = request_at(s.requests_at, r)
    if request.served == NONE:
        floats(engine.served_at)[_user(s, r)] += s.prompt_weight * request.prompt
        request.served = 0
    floats(engine.served_at)[_user(s, r)] += s.output_weight * (generated - request.served)
    request.served = generated


@jit
def charge_running(s: State, engine: Engine) -> None:
    """Bring the counters up to date with the running batch."""
    for i in range(engine.running):
        r = ints(engine.running_at)[i]
        request = request_at(s.requests_at, r)
        charge(s, engine, r, engine.tick - request.tick0 if request.status == DECODE else request.generated)


@jit
def join_queue(s: State, engine: Engine, r: int) -> None:
    """Lift the counter of a user who has no waiting request, and count the new one."""
    user = _user(s, r)
    counters, queued = floats(engine.served_at), ints(engine.queued_at)
    if queued[user] == 0:
        charge_running(s, engine)
        lowest, anyone = math.inf, False
        for other in range(s.user_count + 1):
            if queued[other] > 0:
                lowest, anyone = min(lowest, counters[other]), True
        if not anyone:
            lowest = counters[engine.last_admitted] if engine.last_admitted != NONE else 0.0
        counters[user] = max(counters[user], lowest)
    queued[user] += 1


@jit
def leave_queue(s: State, engine: Engine, r: int) -> None:
    """Charge an admitted request's prompt; one that was preempted has paid, and does not count as waiting."""
    user = _user(s, r)
    if request_at(s.requests_at, r).served == NONE:
        ints(engine.queued_at)[user] -= 1
        engine.last_admitted = user
        charge(s, engine, r, request_at(s.requests_at, r).generated)


@jit
def begin_reading(s: State, engine: Engine) -> None:
    """Prepare for :func:`user_served` of each waiting request in order."""
    if s.serving:
        charge_running(s, engine)
        for user in range(s.user_count + 1):
            floats(s.charges_at)[user] = floats(engine.served_at)[user]


@jit
def user_served(s: State, r: int) -> float:
    """The counter as it will stand when the user's earlier waiting requests have been admitted."""
    if not s.serving:
        return math.nan
    user = _user(s, r)
    counter = floats(s.charges_at)[user]
    floats(s.charges_at)[user] += s.prompt_weight * request_at(s.requests_at, r).prompt
    return counter


@jit
def forget_served(s: State, engine: Engine) -> None:
    """A dead engine has served nobody."""
    if s.serving:
        engine.last_admitted = NONE
        for user in range(s.user_count + 1):
            floats(engine.served_at)[user] = 0.0
            ints(engine.queued_at)[user] = 0
