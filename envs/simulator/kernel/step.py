"""One step of an engine: what it computes, how long it takes, and its result."""

from __future__ import annotations

from servegym.envs.simulator.kernel.ahead import deliver
from servegym.envs.simulator.kernel.experts.step import (
    count_mixed_tasks,
    count_steady_tasks,
    expert_step_s,
    placement_due,
)
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import floats
from servegym.envs.simulator.kernel.queues import order_queue
from servegym.envs.simulator.kernel.scheduler import (
    finish_mixed_step,
    schedule_running,
    schedule_waiting,
    step_cost,
)
from servegym.envs.simulator.kernel.state import (
    NONE,
    ORDER_DYNAMIC,
    ORDER_EXTERNAL,
    READY,
    STEP_MIXED,
    STEP_STEADY,
    TAKEN_OFF,
    Engine,
    State,
)
from servegym.envs.simulator.kernel.steady import finish_steady_step, schedule_steady, steady_cost

NOTHING_TO_DO = -1.0
NEEDS_ORDER = -2.0


@jit
def ask_for_placement(s: State, group: int, now: float) -> bool:
    """Whether the step at ``now`` must wait for the group's expert policy."""
    if not placement_due(s, group):
        return False
    s.placement_group = group
    s.placement_s = now
    return True


@jit
def _may_admit(engine: Engine) -> bool:
    """Whether a waiting request may be admitted, as far as can be told without looking at it."""
    if engine.waiting == 0 or engine.running + engine.leaving >= engine.max_num_seqs:
        return False
    # A head that did not fit still does not: blocks only become fewer until a request finishes, and without a prefix
    # cache its demand cannot shrink. Orders that change with time have no fixed head.
    fixed_head = engine.order != ORDER_DYNAMIC and engine.order != ORDER_EXTERNAL
    return not (engine.blocked and fixed_head and not engine.prefix_caching)


@jit
def begin_step(s: State, engine: Engine, now: float) -> float:
    """Schedule the next step of an engine.

    Returns:
        The duration in seconds, as :func:`step_s` if it begins now, 0 if it is scheduled ahead; NOTHING_TO_DO if the
        engine is idle; NEEDS_ORDER if an external request policy must score the waiting queue first, or an agent choose
        who is next.
    """
    threshold = engine.long_prefill_threshold if engine.running + engine.leaving + engine.waiting > 1 else 0
    if engine.pick_budget == NONE:
        engine.preempted_count = 0
        if engine.running + engine.waiting == 0:
            return NOTHING_TO_DO
        may_admit = _may_admit(engine)
        if engine.order == ORDER_EXTERNAL and may_admit and not engine.ordered:
            return NEEDS_ORDER
        budget = schedule_steady(s, engine, threshold)
        steady = budget >= 0
        if not steady:
            budget = schedule_running(s, engine, engine.max_num_batched_tokens, threshold)
        may_admit = may_admit and engine.preempted_count == 0
    else:  # in the middle of the admissions of a step
        budget, steady, may_admit = engine.pick_budget, engine.pick_steady == 1, True
        engine.pick_budget = NONE
    if may_admit:
        order_queue(s, engine, now)
        budget = schedule_waiting(s, engine, budget, threshold)
        if budget < 0:
            engine.pick_budget, engine.pick_steady = -1 - budget, steady
            return NEEDS_ORDER
    engine.ordered = 0
    if steady:
        steady_cost(s, engine)
        engine.activity = STEP_STEADY
        if engine.tasks > 0:
            count_steady_tasks(s, engine)
    else:
        step_cost(s, engine)
        engine.activity = STEP_MIXED
        if engine.tasks > 0:
            count_mixed_tasks(s, engine)
    engine.peak_blocks = max(engine.peak_blocks, engine.num_blocks - 1 - engine.free_blocks)
    return 0.0 if engine.ahead else step_s(s, engine)


@jit
def step_s(s: State, engine: Engine) -> float:
    """Duration of the step that an engine has scheduled and begins now, in seconds; in lockstep of its own layers."""
    if s.lockstep:
        return engine.step_local_s * engine.slowdown  # the MoE layers are those of all ranks together
    if engine.group != NONE:
        return (engine.step_local_s + expert_step_s(s, engine.group)) * engine.slowdown
    return (engine.step_local_s + floats(engine.moe_cost_at)[engine.step_tokens]) * engine.slowdown


@jit
def finish_step(s: State, engine: Engine, now: float) -> None:
    """Apply the running step of an engine, which ends at ``now``."""
    engine.steps += 1
    engine.computed_tokens += engine.step_tokens
    _apply_step(s, engine, now)


@jit
def _apply_step(s: State, engine: Engine, now: float) -> None:
    if engine.activity == STEP_STEADY:
        finish_steady_step(s, engine, now)
    else:
        finish_mixed_step(s, engine, now)


@jit
def take_off(s: State, engine: Engine, now: float) -> None:
    """Begin the step that was scheduled ahead: the next one is scheduled as if this one had ended."""
    engine.starved = 0
    engine.steps += 1
    engine.computed_tokens += engine.step_tokens
    _apply_step(s, engine, now)
    engine.activity = READY
    engine.flight = TAKEN_OFF


@jit
def land(s: State, engine: Engine, now: float) -> None:
    """End the running step of an engine that schedules ahead; a next one without tokens takes no time."""
    deliver(s, engine, now)
    if engine.activity >= STEP_STEADY and engine.step_tokens == 0:
        engine.starved = 0
        _apply_step(s, engine, now)
        engine.activity = READY
