"""Data parallel with expert parallel: all ranks take each step together, and it lasts as long as its slowest rank."""

from __future__ import annotations

import math

from servegym.envs.simulator.kernel.experts.step import expert_step_s
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import engine_at, floats
from servegym.envs.simulator.kernel.state import IDLE, IN_FLIGHT, READY, STEP_STEADY, TAKEN_OFF, State
from servegym.envs.simulator.kernel.step import (
    NEEDS_ORDER,
    NOTHING_TO_DO,
    ask_for_placement,
    begin_step,
    finish_step,
    land,
    take_off,
)


@jit
def _finish_ranks(s: State, now: float) -> None:
    for e in range(s.engine_count):
        engine = engine_at(s.engines_at, e)
        if engine.flight == IN_FLIGHT:
            land(s, engine, now)
            engine.drained = engine.activity < STEP_STEADY
        elif engine.activity >= STEP_STEADY:
            finish_step(s, engine, now)
            engine.activity = READY


@jit
def _begin_ranks(s: State, now: float) -> bool:
    """Schedule the common step of all ranks; False if one waits for an external order of its queue."""
    for e in range(s.engine_count):
        engine = engine_at(s.engines_at, e)
        if engine.activity == READY and engine.alive and not engine.drained:
            duration = begin_step(s, engine, now)
            if duration == NEEDS_ORDER:
                s.order_engine = e
                return False
            if duration == NOTHING_TO_DO:
                engine.activity = IDLE
    return True


@jit
def _take_off_ranks(s: State, now: float) -> None:
    """Begin the steps that the ranks have scheduled ahead."""
    for e in range(s.engine_count):
        engine = engine_at(s.engines_at, e)
        engine.drained = 0
        if engine.activity >= STEP_STEADY:
            take_off(s, engine, now)


@jit
def _schedule_ahead(s: State, now: float) -> bool:
    """Schedule the next step of each rank that has begun one; False if one waits for an external order of its queue."""
    for e in range(s.engine_count):
        engine = engine_at(s.engines_at, e)
        if engine.flight == TAKEN_OFF:
            if begin_step(s, engine, now) == NEEDS_ORDER:
                s.order_engine = e
                return False
            engine.flight = IN_FLIGHT
    return True


@jit
def _rest(s: State) -> None:
    """No rank has work: none steps until a request arrives."""
    s.stepping = 0
    s.step_s = math.inf
    for e in range(s.engine_count):
        engine = engine_at(s.engines_at, e)
        engine.drained = 0
        if engine.activity == READY:
            engine.activity = IDLE


@jit
def _common_step_s(s: State) -> float:
    """Duration of the step that the ranks have begun: the slowest one's own layers, then the MoE layers of all.

    Ranks without work run a dummy batch of one token; so does one that schedules ahead and had nothing to schedule when
    the step before began, whatever has arrived since. NOTHING_TO_DO if no rank has work.
    """
    working, tokens, slowest = 0, 0, 0.0
    for e in range(s.engine_count):
        engine = engine_at(s.engines_at, e)
        if not engine.alive:
            continue
        if engine.activity >= STEP_STEADY:
            working += 1
            tokens += engine.step_tokens
            slowest = max(slowest, engine.step_local_s * engine.slowdown)
        else:
            dummy = engine.fixed_s + engine.sequence_s + floats(engine.local_cost_at)[1]
            tokens += 1
            slowest = max(slowest, dummy * engine.slowdown)
            if engine.drained and engine.running + engine.waiting > 0:
                working += 1
    if working == 0:
        return NOTHING_TO_DO
    if s.groups_at != 0:
        return slowest + expert_step_s(s, 0)
    return slowest + floats(engine_at(s.engines_at, 0).moe_cost_at)[tokens]


@jit
def advance_lockstep(s: State, limit: float) -> bool:
    """Run the common steps of all ranks before ``limit``; False if they wait for a policy outside of the kernel."""
    while s.stepping and s.step_s < limit:
        now = s.step_s
        if s.stepping == 3:
            if not _schedule_ahead(s, now):
                return False
            s.stepping = 1
            s.step_s = s.step_end_s
            continue
        if s.stepping == 1:
            _finish_ranks(s, now)
            s.stepping = 2
        if s.groups_at != 0 and ask_for_placement(s, 0, now):
            return False
        if not _begin_ranks(s, now):
            return False
        duration = _common_step_s(s)
        if duration == NOTHING_TO_DO:
            _rest(s)
            return True
        for e in range(s.engine_count):
            if engine_at(s.engines_at, e).activity >= STEP_STEADY:
                engine_at(s.engines_at, e).busy_s += duration
                floats(s.event_s_at)[e] = now + duration
        s.stepping = 1
        if engine_at(s.engines_at, 0).ahead:
            _take_off_ranks(s, now)
            s.step_end_s = now + duration
            s.stepping = 3
        else:
            s.step_s = now + duration
    return True
