"""The mean-field step: loads are expectations over the tasks of the batch."""

from __future__ import annotations

import math

from servegym.envs.simulator.kernel.experts.costs import add_communication, interpolate
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import floats
from servegym.envs.simulator.kernel.state import BATCH_SIZES, Experts


@jit
def _blend(table_at: int, row: int, part: float) -> float:
    """Between two batch sizes of a table."""
    return floats(table_at)[row] * (1.0 - part) + floats(table_at)[row + 1] * part


@jit
def mean_field_step(x: Experts, tokens: float) -> float:
    """Duration of the MoE layers of a step of ``tokens`` tokens, in seconds, from the expected loads of its tasks."""
    ranks, tasks = x.ranks, x.tasks
    step_tasks, source_tasks = floats(x.step_tasks_at), floats(x.source_tasks_at)
    compute = floats(x.compute_at)
    place = min(math.log2(max(tokens, 1.0)), BATCH_SIZES - 1.001)
    size = int(place)
    part = place - size
    total_s = traffic_sum = imbalance = balancedness = 0.0
    for layer in range(x.layers):
        row = layer * BATCH_SIZES + size
        load_excess = _blend(x.load_excess_at, row, part)
        active_excess = _blend(x.active_excess_at, row, part)
        slowest = heaviest = all_load = busiest = combining = 0.0
        for r in range(ranks):
            cell = (layer * ranks + r) * tasks
            source = (r // x.ranks_per_engine) * tasks
            load = arriving = leaving = 0.0
            for task in range(tasks):
                own = source_tasks[source + task] / x.ranks_per_engine
                load += step_tasks[task] * floats(x.share_at)[cell + task]
                elsewhere = step_tasks[task] - own if x.returning else step_tasks[task]
                here = own if x.returning else step_tasks[task]
                arriving += elsewhere * floats(x.arrive_at)[cell + task]
                leaving += here * floats(x.leave_at)[cell + task]
            active = floats(x.active_at)[row * ranks + r] * (1.0 - part)
            active += floats(x.active_at)[(row + 1) * ranks + r] * part
            cost = interpolate(compute, x.compute_size, load * load_excess * x.compute_scale)
            slowest = max(slowest, cost + x.expert_s * active * active_excess)
            heaviest = max(heaviest, load)
            all_load += load
            busiest = max(busiest, max(arriving, leaving))
            if not x.returning:
                arriving = leaving = 0.0
                for task in range(tasks):
                    arriving += step_tasks[task] * floats(x.combine_arrive_at)[cell + task]
                    leaving += step_tasks[task] * floats(x.combine_leave_at)[cell + task]
                combining = max(combining, max(arriving, leaving))
            floats(x.rank_load_at)[r] += load
        total_s += slowest
        # Where tokens are varies with where their experts are; where they return to does not.
        traffic_sum += busiest if x.returning else 0.5 * (busiest + combining) * load_excess
        ratio = heaviest * load_excess * ranks / all_load
        imbalance += ratio
        balancedness += 1.0 / ratio
    x.imbalance_sum += imbalance / x.layers
    x.balancedness_sum += balancedness / x.layers
    return add_communication(x, total_s, traffic_sum)
