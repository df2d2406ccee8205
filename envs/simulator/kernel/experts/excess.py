"""How far the heaviest rank of a small batch exceeds its expectation, tabulated by batch size.

A batch of few tokens is more uneven than its expectation. The excess, E[max] / max E of independent normal loads, is
tabulated for the present mix of tasks, and so are the experts that a batch activates.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import floats, ints
from servegym.envs.simulator.kernel.state import BATCH_SIZES, Experts


@jit
def _normal_below(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x * 0.7071067811865476))


@jit
def expected_max(mean: Any, deviation: Any, count: int) -> float:
    """E[max] of independent normal variables; by the trapezoidal rule over P(max > x)."""
    top, widest = -math.inf, 0.0
    for r in range(count):
        top = max(top, mean[r])
        widest = max(widest, deviation[r])
    if widest == 0.0 or count == 1:
        return top
    points = 14
    width = 7.0 * widest / points
    total = 0.0
    for point in range(points + 1):
        x = top - 3.0 * widest + point * width
        below = 1.0
        for r in range(count):
            if deviation[r] > 0.0:
                below *= _normal_below((x - mean[r]) / deviation[r])
            elif x < mean[r]:
                below = 0.0
        total += (1.0 - below) * (0.5 if point in (0, points) else 1.0)
    return max(top, top - 3.0 * widest + total * width)


@jit
def tabulate(x: Experts, first_layer: int, last_layer: int) -> None:
    """Tabulate, by batch size, activated experts and the excess of heaviest ranks; for the tables' mix of tasks."""
    mean, deviation = np.zeros(x.ranks), np.zeros(x.ranks)
    chosen = np.zeros(x.slots)
    for layer in range(first_layer, last_layer):
        _find_chosen(x, layer, chosen)
        for size in range(BATCH_SIZES):
            _tabulate_active(x, layer, size, chosen, mean, deviation)
            _tabulate_load(x, layer, size, mean, deviation)


@jit
def _find_chosen(x: Experts, layer: int, chosen: Any) -> None:
    """Find how probably a token of the mix chooses each slot of a layer; into ``chosen``, shape (slots,)."""
    mix_now = floats(x.table_mix_at)
    for p in range(x.slots):
        expert = ints(x.slot_expert_at)[layer * x.slots + p]
        chosen[p] = 0.0
        for task in range(x.tasks):
            popularity = floats(x.popularity_at)[(task * x.layers + layer) * x.experts + expert]
            chosen[p] += mix_now[task] * popularity
        chosen[p] /= ints(x.replicas_at)[layer * x.experts + expert]


@jit
def _tabulate_active(x: Experts, layer: int, size: int, chosen: Any, mean: Any, deviation: Any) -> None:
    """Tabulate the experts that ``2**size`` tokens activate on each rank, and the excess of the most."""
    ranks, per_rank = x.ranks, x.slots // x.ranks
    tokens = 2.0**size
    row = layer * BATCH_SIZES + size
    heaviest = 0.0
    for r in range(ranks):
        active = variance = 0.0
        for p in range(r * per_rank, (r + 1) * per_rank):
            hit = 1.0 - math.exp(tokens * math.log1p(-min(chosen[p], 0.999999)))
            active += hit
            variance += hit * (1.0 - hit)
        floats(x.active_at)[row * ranks + r] = active
        mean[r], deviation[r] = active, math.sqrt(variance)
        heaviest = max(heaviest, active)
    floats(x.active_excess_at)[row] = expected_max(mean, deviation, ranks) / heaviest if heaviest > 0.0 else 1.0


@jit
def _tabulate_load(x: Experts, layer: int, size: int, mean: Any, deviation: Any) -> None:
    """Tabulate the excess of the rank with the most of ``2**size`` tokens."""
    ranks, tasks = x.ranks, x.tasks
    mix_now = floats(x.table_mix_at)
    tokens = 2.0**size
    row = layer * BATCH_SIZES + size
    heaviest = 0.0
    for r in range(ranks):
        first = second = 0.0
        for task in range(tasks):
            cell = (layer * ranks + r) * tasks + task
            first += mix_now[task] * floats(x.share_at)[cell]
            second += mix_now[task] * floats(x.second_at)[cell]
        mean[r] = tokens * first
        deviation[r] = math.sqrt(tokens * max(second - first * first, 0.0))
        heaviest = max(heaviest, mean[r])
    floats(x.load_excess_at)[row] = expected_max(mean, deviation, ranks) / heaviest if heaviest > 0.0 else 1.0


@jit
def tabulate_layers(groups: Any, group: int, layers: Any) -> None:
    """Make the tables of some layers of a group anew, after their placement has changed.

    Args:
        groups: the EXPERTS records, shape (groups,).
        group: which one.
        layers: which, shape (m,).
    """
    for i in range(len(layers)):
        tabulate(groups[group], layers[i], layers[i] + 1)
