"""Repairing a placement: from where the experts are, exchange pairs of them while that pays, layer by layer.

The objective of a layer is, lower is better::

    sum_r (load_r / mean)^2 / ranks                       even loads
    - together * sum_{i, j on one rank} excess[i, j]      tokens reach fewer ranks, so that less is sent
    - local * sum_r share of the tokens of r that r serves itself
    + move * experts that a rank must receive, over slots

``excess[i, j]`` is how much more often a token chooses ``i`` and ``j`` together than experts of their popularity would
be chosen by chance, as a share of all pairs. Dispatch sends a token once to each rank that holds one of its experts, so
experts that are chosen together belong together. Engines report pairs of adjacent layers; tokens that agree in a layer
agree in the next, so that pairs within a layer follow from two steps, there and back (:func:`within_layers`).
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.interface import FloatArray, IntArray
from servegym.compilation import compiled


def within_layers(coactivation: FloatArray) -> FloatArray:
    """Estimate how often experts of one layer are chosen together beyond chance, from pairs of adjacent layers.

    Two experts whose tokens go on to the same experts, or come from the same ones, serve the same kinds of tokens:
    ``P(i, j) = sum_k P(i, k) P(j, k) / P(k)`` over the experts ``k`` of a neighbouring layer, the mean of both
    neighbours.

    Args:
        coactivation: joint counts, shape (layers - 1, experts, experts).

    Returns:
        share of all pairs less what popularity alone makes of it, shape (layers, experts, experts), diagonal 0.
    """
    joint = coactivation / np.maximum(coactivation.sum(axis=(1, 2), keepdims=True), 1e-300)
    before, after = joint.sum(axis=2), joint.sum(axis=1)  # shares of the experts of either layer
    # Single precision: the counts of a sample are far less exact, and the products are half of the time.
    onward = (joint / np.sqrt(np.maximum(after, 1e-300))[:, None, :]).astype(np.float32)
    back = (joint / np.sqrt(np.maximum(before, 1e-300))[:, :, None]).astype(np.float32)
    layers, experts = len(joint) + 1, joint.shape[1]
    excess, sides = np.zeros((layers, experts, experts)), np.zeros(layers)
    excess[:-1] += onward @ onward.swapaxes(1, 2) - before[:, :, None] * before[:, None, :]
    excess[1:] += back.swapaxes(1, 2) @ back - after[:, :, None] * after[:, None, :]
    sides[:-1] += 1.0
    sides[1:] += 1.0
    excess /= sides[:, None, None]
    excess[:, np.arange(experts), np.arange(experts)] = 0.0
    return excess


@compiled
def start_from(expert: IntArray, current: IntArray, per_rank: int) -> IntArray:
    """Return the slots of one layer with these copies, each where such a copy stands now, the others where room is.

    Args:
        expert: expert of each copy wanted, shape (slots,).
        current: slots now, shape (slots,).
        per_rank: slots of a rank.
    """
    slots = len(current)
    left = np.zeros(max(expert.max(), current.max()) + 1, dtype=np.int64)
    for e in expert:
        left[e] += 1
    found = np.full(slots, -1, dtype=np.int64)
    for p in range(slots):
        if left[current[p]] > 0:
            left[current[p]] -= 1
            found[p] = current[p]
    for p in range(slots):
        if found[p] >= 0:
            continue
        rank, best = p // per_rank, -1
        for e in range(len(left)):
            if left[e] == 0:
                continue
            if best < 0:
                best = e
            here = False
            for q in range(rank * per_rank, (rank + 1) * per_rank):
                here = here or found[q] == e
            if not here:
                best = e
                break
        found[p] = best
        left[best] -= 1
    return found


@compiled
def layer_cost(slots: IntArray, load: FloatArray, cost: FloatArray, excess: FloatArray, together: float) -> float:
    """Return the objective of one layer.

    Args:
        slots: expert of each slot, rank by rank, shape (slots,).
        load: tokens of a copy of each expert, shape (experts,).
        cost: cost of an expert on a rank, shape (experts, ranks).
        excess: pairs beyond chance, shape (experts, experts).
        together: their weight.
    """
    ranks = cost.shape[1]
    per_rank = len(slots) // ranks
    mean = 0.0
    for p in range(len(slots)):
        mean += load[slots[p]] / ranks
    total = 0.0
    for r in range(ranks):
        own = 0.0
        for p in range(r * per_rank, (r + 1) * per_rank):
            own += load[slots[p]]
            total += cost[slots[p], r]
            for q in range(r * per_rank, (r + 1) * per_rank):
                total -= together * excess[slots[p], slots[q]]
        total += (own / max(mean, 1e-12)) ** 2 / ranks
    return total


@compiled
def exchange(
    slots: IntArray, load: FloatArray, cost: FloatArray, excess: FloatArray, together: float, sweeps: int
) -> None:
    """Exchange the experts of pairs of slots of one layer, in place, while the objective falls.

    Args:
        slots: expert of each slot, rank by rank, shape (slots,).
        load: tokens of a copy of each expert, shape (experts,).
        cost: cost of an expert on a rank, shape (experts, ranks).
        excess: pairs beyond chance, symmetric, shape (experts, experts).
        together: their weight.
        sweeps: passes over all pairs at most.
    """
    count, ranks = len(slots), cost.shape[1]
    experts = len(load)
    per_rank = count // ranks
    loads = np.zeros(ranks)
    near = np.zeros((ranks, experts))
    copies = np.zeros((ranks, experts), dtype=np.int64)
    for p in range(count):
        r = p // per_rank
        loads[r] += load[slots[p]]
        copies[r, slots[p]] += 1
        near[r] += excess[slots[p]]
    mean = max(loads.sum() / ranks, 1e-12)
    unit = 1.0 / (ranks * mean * mean)
    for _ in range(sweeps):
        improved = False
        for p in range(count):
            a = p // per_rank
            for q in range((a + 1) * per_rank, count):
                b = q // per_rank
                x, y = slots[p], slots[q]
                if x == y or copies[b, x] > 0 or copies[a, y] > 0:
                    continue
                shift = load[y] - load[x]
                gain = -unit * shift * (2.0 * loads[a] - 2.0 * loads[b] + 2.0 * shift)
                gain += cost[x, a] + cost[y, b] - cost[x, b] - cost[y, a]
                gain += 2.0 * together * (near[b, x] + near[a, y] - near[a, x] - near[b, y] - 2.0 * excess[x, y])
                if gain > 1e-9:
                    slots[p], slots[q] = y, x
                    loads[a] += shift
                    loads[b] -= shift
                    copies[a, x] -= 1
                    copies[b, x] += 1
                    copies[b, y] -= 1
                    copies[a, y] += 1
                    near[a] += excess[y] - excess[x]
                    near[b] += excess[x] - excess[y]
                    improved = True
        if not improved:
            break
