"""Entry points that drive a single engine step by step, for schedule traces and tests."""

from __future__ import annotations

from typing import Any

from servegym.envs.simulator.kernel.dispatch import hand_over
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import engine_at
from servegym.envs.simulator.kernel.state import IDLE, IN_FLIGHT, STEP_STEADY
from servegym.envs.simulator.kernel.step import begin_step, finish_step, land, take_off


@jit
def enqueue(cluster: Any, r: int, now: float) -> None:
    """Send a request to engine 0."""
    hand_over(cluster[0], r, 0, now)


@jit
def begin(cluster: Any, now: float) -> float:
    """Begin a step of engine 0; returns its duration in seconds, negative if there is nothing to do."""
    s = cluster[0]
    return begin_step(s, engine_at(s.engines_at, 0), now)


@jit
def finish(cluster: Any, now: float) -> None:
    """Finish the step of engine 0; scheduling ahead, the step before, so that the scheduled one begins."""
    s = cluster[0]
    engine = engine_at(s.engines_at, 0)
    if engine.ahead:
        if engine.flight == IN_FLIGHT:
            land(s, engine, now)
        if engine.activity >= STEP_STEADY:
            take_off(s, engine, now)
            engine.flight = IN_FLIGHT
    elif engine.activity >= STEP_STEADY:
        finish_step(s, engine, now)
    engine.activity = IDLE
