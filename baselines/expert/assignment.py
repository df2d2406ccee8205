"""Assigning experts to ranks by load and by affinity together: greedy, then pairwise exchange.

The objective of one layer is ``balance * sum_r (load_r / mean)^2 / ranks + sum_i cost[i, rank(i)]`` over its slots
``i``, with equal slots per rank and, where possible, no two copies of an expert on one rank. Published rules differ in
what they put into ``cost``.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.expert.eplb import keep_slots
from servegym.baselines.interface import FloatArray, IntArray, Placement
from servegym.compilation import compiled

_SWEEPS = 8


@compiled
def assign_layer(expert: IntArray, load: FloatArray, cost: FloatArray, balance: float, sweeps: int) -> IntArray:
    """Assign the copies of one layer's experts to ranks.

    Args:
        expert: expert of each copy, shape (slots,).
        load: tokens of each copy, shape (slots,).
        cost: cost of each expert on each rank, shape (experts, ranks).
        balance: weight of the loads' squares.
        sweeps: passes of pairwise exchange at most.

    Returns:
        the rank of each copy, shape (slots,).
    """
    slots, ranks = len(expert), cost.shape[1]
    room = slots // ranks
    mean = max(load.sum() / ranks, 1e-12)
    unit = balance / (ranks * mean * mean)
    rank_of = np.full(slots, -1, dtype=np.int64)
    loads = np.zeros(ranks)
    counts = np.zeros(ranks, dtype=np.int64)
    copies = np.zeros((cost.shape[0], ranks), dtype=np.int64)
    order = np.argsort(-load, kind="mergesort")
    for n in range(slots):
        i = order[n]
        e = expert[i]
        best, lowest = -1, np.inf
        for r in range(ranks):
            if counts[r] == room:
                continue
            price = unit * load[i] * (2.0 * loads[r] + load[i]) + cost[e, r] + 1e6 * copies[e, r]
            if price < lowest:
                best, lowest = r, price
        rank_of[i] = best
        loads[best] += load[i]
        counts[best] += 1
        copies[e, best] += 1
    for _ in range(sweeps):
        improved = False
        for i in range(slots):
            for j in range(i + 1, slots):
                a, b = rank_of[i], rank_of[j]
                if a == b or copies[expert[i], b] > 0 or copies[expert[j], a] > 0:
                    continue
                shift = load[j] - load[i]
                gain = -unit * shift * (2.0 * loads[a] + shift - 2.0 * loads[b] + shift)
                gain += cost[expert[i], a] - cost[expert[i], b] + cost[expert[j], b] - cost[expert[j], a]
                if gain > 1e-9:
                    rank_of[i], rank_of[j] = b, a
                    loads[a] += shift
                    loads[b] -= shift
                    copies[expert[i], a] -= 1
                    copies[expert[i], b] += 1
                    copies[expert[j], b] -= 1
                    copies[expert[j], a] += 1
                    improved = True
        if not improved:
            break
    return rank_of


def to_slots(expert: IntArray, rank_of: IntArray, ranks: int) -> IntArray:
    """Return the slots of one layer, rank by rank, shape (slots,)."""
    order = np.argsort(rank_of, kind="stable")
    assert np.all(np.bincount(rank_of, minlength=ranks) == len(expert) // ranks)
    return expert[order]


def assigned(
    experts: IntArray, loads: FloatArray, costs: FloatArray, balance: float, current: Placement, sweeps: int = _SWEEPS
) -> Placement | None:
    """Assign all layers apart from each other; None if the current placement comes out.

    Args:
        experts: expert of each copy, shape (layers, slots).
        loads: tokens of each copy, shape (layers, slots).
        costs: shape (layers, experts, ranks).
        balance: weight of the loads' squares.
        current: what stands.
        sweeps: passes of pairwise exchange at most.
    """
    wanted = np.empty_like(experts)
    for layer in range(len(experts)):
        rank_of = assign_layer(experts[layer], loads[layer], costs[layer], balance, sweeps)
        wanted[layer] = to_slots(experts[layer], rank_of, current.ranks)
    return settled(wanted, current)


def settled(wanted: IntArray, current: Placement) -> Placement | None:
    """Return a placement whose staying experts keep their slots, or None if it is the current one."""
    wanted = keep_slots(wanted, current)
    if np.array_equal(wanted, current.physical_to_logical):
        return None
    return Placement(wanted, current.ranks)


def relabelled(wanted: IntArray, current: Placement) -> IntArray:
    """Rename the ranks of each layer so that more experts stay where they are; shape (layers, slots).

    Ranks are interchangeable for a rule that only balances. Greedy: the pair of new and old rank with the most experts
    in common first.
    """
    per_rank = wanted.shape[1] // current.ranks
    renamed = np.empty_like(wanted)
    _relabel(wanted, current.physical_to_logical, current.ranks, per_rank, renamed)
    return renamed


@compiled
def _relabel(wanted: IntArray, current: IntArray, ranks: int, per_rank: int, renamed: IntArray) -> None:
    for layer in range(len(wanted)):
        common = np.zeros((ranks, ranks), dtype=np.int64)
        for a in range(ranks):
            for b in range(ranks):
                for i in range(per_rank):
                    for j in range(per_rank):
                        common[a, b] += wanted[layer, a * per_rank + i] == current[layer, b * per_rank + j]
        for _ in range(ranks):
            best = int(common.argmax())
            a, b = best // ranks, best % ranks
            renamed[layer, b * per_rank : (b + 1) * per_rank] = wanted[layer, a * per_rank : (a + 1) * per_rank]
            common[a, :] = -1
            common[:, b] = -1
