"""One step of an expert-parallel group: its tokens, its loads for the expert policy, and its time."""

from __future__ import annotations

from servegym.envs.simulator.kernel.experts.excess import tabulate
from servegym.envs.simulator.kernel.experts.mean_field import mean_field_step
from servegym.envs.simulator.kernel.experts.sampled import sampled_step
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import engine_at, experts_at, floats, ints, longs, request_at
from servegym.envs.simulator.kernel.state import STEP_STEADY, WINDOW_BUCKETS, Engine, Experts, State

_MIX_TOKENS = 65536.0  # of the running mix of tasks; few requests at a time make an uneven mix, but no drift
_PRESSURE_WEIGHT = 1.0 / 128.0  # of one step in the running average of ranks' loads
_MIX_TOLERANCE = 0.1  # total variation between the running mix and that of the tables before they are made anew


@jit
def count_steady_tasks(s: State, engine: Engine) -> None:
    """Tokens of a common step by task: one per decoding request, and the chunks behind them."""
    tokens = floats(engine.task_tokens_at)
    for task in range(engine.tasks):
        tokens[task] = longs(engine.task_decoding_at)[task]
    for i in range(engine.decoding, engine.running):
        tokens[request_at(s.requests_at, ints(engine.running_at)[i]).task] += ints(engine.scheduled_at)[i]


@jit
def count_mixed_tasks(s: State, engine: Engine) -> None:
    """Tokens of a mixed step by task."""
    tokens = floats(engine.task_tokens_at)
    for task in range(engine.tasks):
        tokens[task] = 0.0
    for i in range(engine.running):
        tokens[request_at(s.requests_at, ints(engine.running_at)[i]).task] += ints(engine.scheduled_at)[i]


@jit
def placement_due(s: State, group: int) -> bool:
    """Whether the expert policy is to be asked before the group's next step."""
    x = experts_at(s.groups_at, group)
    return x.steps >= x.next_placement


@jit
def pressure(x: Experts, engine: int) -> float:
    """Load of the engine's EP ranks over the mean, a running average; 1 when balanced."""
    own = total = 0.0
    for r in range(x.ranks):
        load = floats(x.rank_load_at)[r]
        total += load
        if r // x.ranks_per_engine == engine - x.first_engine:
            own += load
    if total == 0.0:
        return 1.0
    return own / x.ranks_per_engine / (total / x.ranks)


@jit
def expert_step_s(s: State, group: int) -> float:
    """Duration of the MoE layers of the step that the group's engines have just begun, in seconds.

    Also counts loads for the expert policy, and adds a stall that a re-placement left.
    """
    x = experts_at(s.groups_at, group)
    tokens = _gather(s, x)
    bucket = _bucket(x)
    for cell in range(x.engines * x.tasks):
        floats(x.window_at)[bucket * x.engines * x.tasks + cell] += floats(x.source_tasks_at)[cell]
    _follow_mix(x)
    for r in range(x.ranks):
        floats(x.rank_load_at)[r] *= 1.0 - _PRESSURE_WEIGHT
    duration = sampled_step(s, x, bucket) if x.sampled else mean_field_step(x, tokens)
    x.steps += 1
    duration += x.stall_s
    x.stall_s = 0.0
    return duration


@jit
def _gather(s: State, x: Experts) -> float:
    """Collect the tokens of the step by source engine and task; returns their sum. Idle ranks run one dummy token."""
    total = 0.0
    for task in range(x.tasks):
        floats(x.step_tasks_at)[task] = 0.0
    for i in range(x.engines):
        engine = engine_at(s.engines_at, x.first_engine + i)
        row = i * x.tasks
        busy = engine.activity >= STEP_STEADY
        for task in range(x.tasks):
            tokens = floats(engine.task_tokens_at)[task] if busy else floats(x.mix_at)[task] * engine.alive
            floats(x.source_tasks_at)[row + task] = tokens
            floats(x.step_tasks_at)[task] += tokens
            total += tokens
    return total


@jit
def _bucket(x: Experts) -> int:
    """The bucket of the load window that this step falls into, emptied when it is entered."""
    bucket = (x.steps // x.bucket_steps) % WINDOW_BUCKETS
    if x.steps % x.bucket_steps == 0:
        longs(x.bucket_steps_at)[bucket] = 0
        width = x.engines * x.tasks
        for cell in range(bucket * width, (bucket + 1) * width):
            floats(x.window_at)[cell] = 0.0
        if x.sampled:
            width = x.engines * x.layers * x.experts
            for cell in range(bucket * width, (bucket + 1) * width):
                floats(x.counts_at)[cell] = 0.0
    longs(x.bucket_steps_at)[bucket] += 1
    return bucket


@jit
def _follow_mix(x: Experts) -> None:
    """Move the running mix towards the tokens of this step; make the tables anew when it has left theirs."""
    total = 0.0
    for task in range(x.tasks):
        total += floats(x.step_tasks_at)[task]
    distance = 0.0
    weight = min(total / _MIX_TOKENS, 0.1)
    for task in range(x.tasks):
        share = floats(x.step_tasks_at)[task] / total
        floats(x.mix_at)[task] += weight * (share - floats(x.mix_at)[task])
        distance += 0.5 * abs(floats(x.mix_at)[task] - floats(x.table_mix_at)[task])
    if distance > _MIX_TOLERANCE:
        for task in range(x.tasks):
            floats(x.table_mix_at)[task] = floats(x.mix_at)[task]
        tabulate(x, 0, x.layers)
